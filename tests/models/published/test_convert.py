"""Published checkpoints of every stage to our directories and back to the bit; what is refused, and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import emrrg_cli
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.models.arm.pretrainer import load_pretrainer
from emrrg_cli.models.encoder_files import EncoderConfig
from emrrg_cli.models.published.checkpoint import read_checkpoint
from emrrg_cli.models.published.convert import convert_to_ours, convert_to_published
from emrrg_cli.models.published.importing import import_checkpoint
from emrrg_cli.models.published.run import run_recipe
from emrrg_cli.recipe.common import ENCODER_SIZES
from emrrg_cli.recipe.load import load_recipe, load_run_recipe

State = dict[str, Tensor]
Make = Callable[..., State]
Save = Callable[..., Path]


def _assert_equal(found: State, expected: State) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        as_bytes = [t.contiguous().view(-1).view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*as_bytes), name


@pytest.fixture(scope="session")
def llm_dir(make_llm: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLM, 32 wide, with its tokenizer. Not to be changed."""
    directory = tmp_path_factory.mktemp("llm")
    make_llm(layers=2).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def no_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an empty cache of the hub."""
    monkeypatch.setattr("emrrg_cli.models.published.run._llm_here", lambda name: None)


# -- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stage", ["1", "2", "3", "3 frozen", "emrrg", "emrrg frozen"])
def test_a_round_trip_is_bit_exact(
    make_state: Make, save_published: Save, tmp_path: Path, stage: str, dtype: torch.dtype
) -> None:
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in make_state(stage).items()}
    for name in list(state):
        if name.endswith(("A_log", "A_c_log", "D_b", "norm1.weight")):  # some kept in fp32, beside others of their kind
            state[name] = state[name].float()
    if stage == "1":
        state["mask"] = state["mask"][None, None].clamp(min=-65504)
    base = save_published(make_state("2"), "base.pth") if "frozen" in stage else None
    convert_to_ours(save_published(state), tmp_path / "out", base=base)
    convert_to_published(tmp_path / "out", tmp_path / "back.pth")
    content = torch.load(tmp_path / "back.pth", weights_only=True)
    assert content.keys() == {"model", "epoch"}
    assert content["epoch"] == 7
    _assert_equal(content["model"], state)
    convert_to_published(tmp_path / "out", tmp_path / "back.safetensors")
    found = load_file(tmp_path / "back.safetensors")
    _assert_equal({name: found[name] for name in state}, state)
    # And what came back converts to the same again.
    convert_to_ours(tmp_path / "back.pth", tmp_path / "again", base=base)
    files = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.safetensors"))
    assert files == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.safetensors"))
    for file in files:
        first, second = load_file(tmp_path / "out" / file), load_file(tmp_path / "again" / file)
        _assert_equal({name: second[name] for name in sorted(second)}, {name: first[name] for name in sorted(first)})


@pytest.mark.parametrize("container", ["model", "state_dict", None])
def test_a_round_trip_keeps_names_and_container(make_state: Make, tmp_path: Path, container: str | None) -> None:
    state = {f"module.{name}": tensor for name, tensor in make_state("2").items()}
    state["module.logit_scale"] = torch.tensor([2.5])  # stored with an axis of its own
    file = tmp_path / "file.pth"
    torch.save(state if container is None else {container: state, "step": 12}, file)
    lines = convert_to_ours(file, tmp_path / "out").lines
    assert any("every name begins with `module.`" in line for line in lines)
    assert load_file(tmp_path / "out/alignment.safetensors")["logit_scale"].shape == ()
    convert_to_published(tmp_path / "out", tmp_path / "back.pth")
    content = torch.load(tmp_path / "back.pth", weights_only=True)
    if container is not None:
        assert content.keys() == {container, "step"}
        content = content[container]
    _assert_equal(content, state)


def test_tensors_that_share_memory_or_lie_across_it(make_state: Make, save_published: Save, tmp_path: Path) -> None:
    state = make_state("3")
    for name in list(state):
        if name.endswith("w1.weight"):
            state[name] = state[name].T.contiguous().T
            state[name.replace("w1", "w2")] = state[name]
    convert_to_ours(save_published(state), tmp_path / "out")
    convert_to_published(tmp_path / "out", tmp_path / "back.pth")
    _assert_equal(read_checkpoint(tmp_path / "back.pth").tensors, state)


# -- what is written ---------------------------------------------------------------------------------------------


def test_stage_1(make_state: Make, save_published: Save, tmp_path: Path) -> None:
    state = make_state("1", d=48, depth=6, n=8, grid=8, width=64)
    outcome = convert_to_ours(save_published(state), tmp_path / "out", verbose=True)
    assert outcome.stage == "pretrain"
    assert json.loads((tmp_path / "out/pretrainer.json").read_text()) == {
        "format": 1,
        "kind": "pretrainer",
        "d_model": 48,
        "depth": 6,
        "d_state": 8,
        "image_size": 128,
        "decoder_width": 64,
        "decoder_depth": 4,
        "taps": [3, 4, 5, 6],
    }
    model = load_pretrainer(tmp_path / "out")
    assert model(torch.randn(1, 3, 128, 128)).prediction.shape == (1, 48, 768)
    assert torch.equal(model.encoder.layers[5].mixer.directions[0].dt.weight, state["layers.5.mixer.x_proj.weight"][:3])
    assert emrrg_cli.load_encoder(tmp_path / "out")(torch.randn(1, 3, 128, 128)).shape == (1, 65, 48)
    # Every tensor and everything beside the model has its line.
    lines = outcome.lines
    assert f"{len(state) - 1} tensors used, 1 left out, 0 initialised" in lines[0]
    assert "stage 1 (pretrain), width 48, depth 6, state 8, 128 px" in lines[0]
    assert lines[1] == "other content of the file: epoch 7, args (dropped), optimizer (dropped)"
    used = [line.split()[1] for line in lines if line.startswith("  used ")]
    assert sorted(used) == sorted(name for name in state if name != "mask")
    assert "  left out  mask: follows from the image size" in lines


def test_stage_2(make_state: Make, save_published: Save, tmp_path: Path) -> None:
    from transformers import AutoModel

    state = make_state("2")
    assert convert_to_ours(save_published(state), tmp_path / "out").stage == "align"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "alignment.json",
        "alignment.safetensors",
        "checksums.json",
        "convert.json",
        "encoder.json",
        "encoder.safetensors",
        "left_out.safetensors",
        "text_encoder",
    ]
    encoder = emrrg_cli.load_encoder(tmp_path / "out")
    d, n = 32, 4
    published = {name.removeprefix("visual_encoder."): tensor for name, tensor in state.items()}
    mixer = encoder.layers[1].mixer
    assert torch.equal(mixer.X.weight, published["layers.1.mixer.in_proj.weight"][:d])
    assert torch.equal(mixer.Z.weight, published["layers.1.mixer.in_proj.weight"][d:])
    for k, (suffix, a_log) in enumerate((("", "A_log"), ("_b", "A_b_log"), ("_c", "A_c_log"), ("_c_b", "A_c_b_log"))):
        x_proj = published[f"layers.1.mixer.x_proj{suffix}.weight"]
        assert torch.equal(mixer.directions[k].dt.weight, x_proj[:2])
        assert torch.equal(mixer.directions[k].B.weight, x_proj[2 : 2 + n])
        assert torch.equal(mixer.directions[k].C.weight, x_proj[2 + n :])
        assert torch.equal(mixer.A_log[k], published[f"layers.1.mixer.{a_log}"])
        assert torch.equal(mixer.D[k], published[f"layers.1.mixer.D{suffix}"])
        assert torch.equal(mixer.conv_weight[k], published[f"layers.1.mixer.conv1d{suffix}.weight"][:, 0])
    text = AutoModel.from_pretrained(tmp_path / "out/text_encoder")
    own = text.state_dict()
    expected = {n.removeprefix("text_encoder."): t for n, t in state.items() if n.startswith("text_encoder.")}
    assert all(torch.equal(own[name], tensor) for name, tensor in expected.items() if "position_ids" not in name)
    assert (text.config.num_hidden_layers, text.config.hidden_size, text.config.num_attention_heads) == (2, 64, 1)


def test_published_sizes_are_known_by_name(make_state: Make, save_published: Save) -> None:
    imported = import_checkpoint(save_published(make_state("3")))
    for size, (width, depth) in ENCODER_SIZES.items():
        encoder = run_recipe(
            imported, EncoderConfig(width, depth, 16, 224), "iu_xray/finetune-full", None
        ).model.encoder
        assert (encoder.size, encoder.width_and_depth, encoder.image_size) == (size, (width, depth), 224)
    encoder = run_recipe(imported, EncoderConfig(48, 3, 8, 96), "iu_xray/finetune-full", None).model.encoder
    assert (encoder.size, encoder.width_and_depth, encoder.d_state, encoder.image_size) == (None, (48, 3), 8, 96)


@pytest.mark.parametrize("stage", ["3", "3 frozen", "emrrg"])
def test_stage_3_is_a_run_that_writes_reports(
    make_state: Make,
    save_published: Save,
    tmp_path: Path,
    llm_dir: Path,
    tiny_dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    from PIL import Image

    from emrrg_cli.app import main

    state, second = make_state(stage, seed=3), make_state("2", seed=4)
    base = save_published(second, "base.pth") if stage == "3 frozen" else None
    file = save_published(state, "Mimic-Finetune-B.pth")
    monkeypatch.chdir(llm_dir.parent)
    lines = convert_to_ours(file, tmp_path / "run", base=base, llm=llm_dir.name).lines  # a relative path
    monkeypatch.chdir(tmp_path)
    assert f"recipe mimic_cxr/finetune-full, LLM {llm_dir}, no hybrid layers, no adapters" in lines
    assert any("lora_X" in line and "half of the mixer's output" in line for line in lines) == (stage == "emrrg")
    recipe = load_recipe(str(tmp_path / "run/recipe.yaml"), stage="finetune")
    assert recipe.protocol == "published"
    assert recipe.model.adapter.targets == ("none" if stage == "3 frozen" else "full")
    assert recipe.model.hybrid.every is None
    short = ["data.workers=0", "generation.num_beams=1", "generation.min_new_tokens=0", "generation.max_new_tokens=4"]
    Image.new("L", (80, 90), 99).save(tmp_path / "film.png")
    generator = emrrg_cli.load_generator(tmp_path / "run", device="cpu", overrides=short)
    assert len(generator.generate([tmp_path / "film.png"])) == 1
    source = second if stage == "3 frozen" else state
    model = generator.model
    assert torch.equal(model.encoder.layers[0].mixer.D[2], source["visual_encoder.layers.0.mixer.D_c"])
    assert torch.equal(model.bridge.proj.weight, state["llama_proj.weight"])
    assert torch.equal(model.bridge.norm.bias, state["layer_norm.bias"])
    monkeypatch.setenv("PATH", "")  # METEOR, in Java, takes longer than all else
    assert main(["evaluate", "--model", str(tmp_path / "run"), "--data", str(tiny_dataset), *short]) == 0


@pytest.mark.usefixtures("no_llm")
def test_stage_3_is_converted_without_its_llm(
    make_state: Make, save_published: Save, tmp_path: Path, llm_dir: Path
) -> None:
    file = save_published(make_state("3"))
    lines = convert_to_ours(file, tmp_path / "run").lines
    assert "recipe iu_xray/finetune-full, LLM Qwen/Qwen1.5-1.8B-Chat, no hybrid layers, no adapters" in lines
    assert "needs an LLM of width 32, but Qwen/Qwen1.5-1.8B-Chat of the recipe has another" in lines[-1]
    assert not (tmp_path / "run/tokenizer").exists()
    # Once the recipe names an LLM that is here, the run is whole: its tokenizer is the LLM's.
    recipe = tmp_path / "run/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("Qwen/Qwen1.5-1.8B-Chat", str(llm_dir)))
    assert emrrg_cli.load_generator(tmp_path / "run", device="cpu").model.tokenizer.eos_token == "</s>"


@pytest.mark.usefixtures("no_llm")
@pytest.mark.parametrize(
    ("name", "hidden", "recipe", "llm"),
    [
        ("IU-Finetune-L.pth", 4096, "iu_xray/finetune-full", "meta-llama/Llama-2-7b-chat-hf"),
        ("IU-Finetune-B.pth", 2048, "iu_xray/finetune-full", "Qwen/Qwen1.5-1.8B-Chat"),
        ("Mimic-Finetune-L.pth", 4096, "mimic_cxr/finetune-full", "meta-llama/Llama-2-7b-chat-hf"),
        ("CheXpert-Finetune-B.pth", 4096, "chexpert_plus/finetune-full", "meta-llama/Llama-2-7b-chat-hf"),
        ("EMRRG-CXP.pth", 2048, "chexpert_plus/finetune-full", "Qwen/Qwen1.5-1.8B-Chat"),
    ],
)
def test_recipe_and_llm_follow_from_name_and_width(
    make_state: Make, save_published: Save, tmp_path: Path, name: str, hidden: int, recipe: str, llm: str
) -> None:
    file = save_published(make_state("3", hidden=hidden), name)
    lines = convert_to_ours(file, tmp_path / "run").lines
    assert f"recipe {recipe}, LLM {llm}, no hybrid layers, no adapters" in lines
    assert f"the LLM {llm} is not on this computer" in lines[-1]
    lines = convert_to_ours(file, tmp_path / "other", recipe="mimic_cxr/finetune").lines
    assert f"recipe mimic_cxr/finetune, LLM {llm}, no hybrid layers, no adapters" in lines


@pytest.mark.slow
def test_a_converted_checkpoint_starts_the_next_stage(
    make_state: Make,
    save_published: Save,
    tmp_path: Path,
    tiny_overrides: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from emrrg_cli.app import main

    states = {"1": make_state("1", d=16, depth=4, n=4), "2": make_state("2", d=16, depth=4, n=4, grid=2)}
    for stage, state in states.items():
        convert_to_ours(save_published(state), tmp_path / stage)
        capsys.readouterr()
        options = [f"model.encoder.weights={tmp_path / stage}", "model.encoder.depth=4", "model.adapter.targets=none"]
        options += ["train.max_steps=1", "--output", str(tmp_path / f"run{stage}")]
        assert main(["finetune", "tiny/finetune", *tiny_overrides, *options, "--verbose"]) == 0
        told = capsys.readouterr().err
        assert ("dropped  ar_token" in told, "dropped  text_encoder/model.safetensors:pooler.dense.bias" in told) == (
            stage == "1",
            stage == "2",
        )
        frozen = load_file(tmp_path / f"run{stage}" / "encoder.safetensors")
        name = "layers.3.mixer.D" if stage == "1" else "visual_encoder.layers.3.mixer.D_c_b"
        assert torch.equal(frozen["layers.3.mixer.D"][3], state[name])


# -- strictness --------------------------------------------------------------------------------------------------

_CHANGES: list[tuple[str, Callable[[State], Any], str, str]] = [
    ("1", lambda s: s.pop("layers.1.mixer.D"), "layers.1.mixer.D", "layers.1.mixer.D is missing"),
    ("1", lambda s: s.pop("ar_pred.bias"), "ar_pred.bias", "ar_pred.bias is missing"),
    ("1", lambda s: s.pop("norm_3.weight"), "norm_3.*", "norm_3.weight is missing"),
    ("1", lambda s: s.update(mask=s["mask"].T), "mask", r"mask \[48, 48\] is not the block-causal mask of 128 px"),
    ("1", lambda s: s.update(mask=torch.zeros(64, 64)), "mask", r"mask \[64, 64\] is not the block-causal mask"),
    ("1", lambda s: s.update({"dec_block.0.attn2.bias": torch.zeros(1)}), "dec_block*", "attn2.bias is unknown"),
    ("2", lambda s: s.pop("visual_encoder.norm_f.bias"), "*norm_f.bias", "visual_encoder.norm_f.bias is missing"),
    ("2", lambda s: s.pop("visual_encoder.layers.0.mixer.A_c_b_log"), "*A_c_b_log", "A_c_b_log is missing"),
    ("2", lambda s: s.pop("vision_proj.bias"), "vision_proj.bias", "vision_proj.bias is missing"),
    ("2", lambda s: s.pop("logit_scale"), "logit_scale", "logit_scale is missing"),
    ("2", lambda s: s.pop("text_encoder.encoder.layer.1.output.dense.bias"), "text*", "output.dense.bias is missing"),
    ("2", lambda s: s.update({"text_encoder.head.bias": torch.zeros(2)}), "text*", "text_encoder.head.bias is unknown"),
    ("2", lambda s: s.update(extra=torch.zeros(2)), "ex??a", "extra is unknown"),
    (
        "2",
        lambda s: s.update({"visual_encoder.layers.0.mixer.conv1d_b.weight": torch.zeros(32, 4)}),
        "*conv1d_b*",
        r"visual_encoder.layers.0.mixer.conv1d_b.weight is \[32, 4\], expected \[32, 1, 4\]",
    ),
    (
        "2",
        lambda s: s.update({"visual_encoder.layers.1.mixer.dt_proj.weight": torch.zeros(32, 3)}),
        "*.dt_proj.weight",
        r"dt_proj.weight is \[32, 3\], expected \[32, 2\]",
    ),
    (
        "3",
        lambda s: s.update({"visual_encoder.pos_embed": torch.zeros(1, 16, 32)}),
        "*pos_embed",
        r"expected \[1, 10, 32\]",
    ),
    ("3", lambda s: s.pop("layer_norm.weight"), "layer_norm.weight", "layer_norm.weight is missing"),
    ("3", lambda s: s.update({"layer_norm.weight": torch.ones(32, dtype=torch.int64)}), "layer*", "holds torch.int64"),
    ("3", lambda s: s.update({"llama_model.lora": torch.zeros(2)}), "llama_model.*", "llama_model.lora is unknown"),
    (
        "emrrg",
        lambda s: s.update({"visual_encoder.layers.0.mixer.lora_X.adapter_up.weight": torch.zeros(32, 4)}),
        "*lora_X*",
        r"adapter_up.weight is \[32, 4\], expected \[16, r\]",
    ),
    (
        "emrrg",
        lambda s: s.update({"visual_encoder.layers.0.mixer.lora_Z.x": torch.zeros(1)}),
        "*lora_Z*",
        "lora_Z.x is unknown",
    ),
]


@pytest.mark.parametrize(("stage", "change", "pattern", "told"), _CHANGES, ids=[f"{c[0]} {c[2]}" for c in _CHANGES])
def test_unfit_tensors_are_named_unless_allowed(
    make_state: Make,
    save_published: Save,
    tmp_path: Path,
    stage: str,
    change: Callable[[State], Any],
    pattern: str,
    told: str,
) -> None:
    state = make_state(stage)
    change(state)
    file = save_published(state)
    with pytest.raises(RunError, match=told) as refused:
        convert_to_ours(file, tmp_path / "out")
    assert refused.value.hint is not None
    assert "--allow" in refused.value.hint
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match=told):
        convert_to_ours(file, tmp_path / "out", allow=["another", "visual_encoder.layers.7*"])
    lines = convert_to_ours(file, tmp_path / "out", allow=[pattern], verbose=True).lines
    counts = lines[0].split(": ")[-1]
    assert "0 left out, 0 initialised" not in counts
    if stage == "1":
        assert torch.isfinite(load_pretrainer(tmp_path / "out")(torch.randn(1, 3, 128, 128)).loss)
    else:
        encoder = emrrg_cli.load_encoder(tmp_path / "out")
        assert torch.isfinite(encoder(torch.randn(1, 3, encoder.image_size, encoder.image_size))).all()
    # What was left out comes back, what was made does not.
    convert_to_published(tmp_path / "out", tmp_path / "back.pth")
    _assert_equal(read_checkpoint(tmp_path / "back.pth").tensors, state)


def test_many_problems_are_one_message(make_state: Make, save_published: Save, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in make_state("2").items() if "mlp" not in name}
    with pytest.raises(RunError, match=r"mlp\.w1\.weight is missing; .*; and 7 more\n") as refused:
        convert_to_ours(save_published(state), tmp_path / "out")
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("mask", ["[1, 1, q, k]", "[4, q, k]", "-1e9", "fp16", "[l, l]"])
def test_masks_of_any_leading_shape(make_state: Make, save_published: Save, tmp_path: Path, mask: str) -> None:
    state = make_state("1")
    own = state["mask"]
    state["mask"] = {
        "[1, 1, q, k]": own[None, None],
        "[4, q, k]": own.expand(4, -1, -1).clone(),
        "-1e9": own.clamp(min=-1e9),
        "fp16": own.half(),
        "[l, l]": torch.nn.functional.pad(own, (0, 16, 0, 16)).index_fill_(1, torch.arange(48, 64), float("-inf")),
    }[mask]
    if mask == "[l, l]":
        state["mask"][48:] = 0  # the last cluster sees all
    convert_to_ours(save_published(state), tmp_path / "out")
    convert_to_published(tmp_path / "out", tmp_path / "back.pth")
    _assert_equal(read_checkpoint(tmp_path / "back.pth").tensors, state)


def test_redundant_tensors_may_be_missing(make_state: Make, save_published: Save, tmp_path: Path) -> None:
    state = make_state("1")
    del state["mask"]
    convert_to_ours(save_published(state), tmp_path / "one")
    assert not (tmp_path / "one/left_out.safetensors").exists()
    state = {name: tensor for name, tensor in make_state("2").items() if "position_ids" not in name}
    convert_to_ours(save_published(state), tmp_path / "two")
    assert not (tmp_path / "two/left_out.safetensors").exists()


def test_parts_of_stage_2(make_state: Make, save_published: Save, tmp_path: Path) -> None:
    state = make_state("2")
    without_text = {name: tensor for name, tensor in state.items() if not name.startswith("text_encoder.")}
    alone = {name: tensor for name, tensor in state.items() if name.startswith("visual_encoder.")}
    bare = {name.removeprefix("visual_encoder."): tensor for name, tensor in alone.items()}
    for number, (part, stage) in enumerate([(without_text, "align"), (alone, "encoder"), (bare, "encoder")]):
        outcome = convert_to_ours(save_published(part), tmp_path / str(number))
        assert outcome.stage == stage
        convert_to_published(tmp_path / str(number), tmp_path / f"{number}.pth")
        _assert_equal(read_checkpoint(tmp_path / f"{number}.pth").tensors, part)
        encoders = [load_file(tmp_path / f"{n}/encoder.safetensors") for n in (0, number)]
        assert all(torch.equal(tensor, encoders[1][name]) for name, tensor in encoders[0].items())
    with pytest.raises(RunError, match="the projections are incomplete"):
        convert_to_ours(save_published(alone | {"logit_scale": torch.ones(())}), tmp_path / "scale")
    other = without_text | {"text_encoder.rnn.weight": torch.randn(3, 3)}
    lines = convert_to_ours(save_published(other), tmp_path / "rnn").lines
    assert any("the text tower is not a BERT" in line for line in lines)
    with pytest.raises(RunError, match=r"visual_encoder|encoder is incomplete"):
        convert_to_ours(save_published({n: t for n, t in state.items() if n not in alone}), tmp_path / "none")


# -- what is refused ---------------------------------------------------------------------------------------------


def test_checkpoints_of_other_networks(save_published: Save, tmp_path: Path) -> None:
    resnet = {
        "conv1.weight": torch.randn(64, 3, 7, 7),
        "bn1.weight": torch.ones(64),
        "layer1.0.bn1.bias": torch.ones(1),
        "fc.bias": torch.ones(1),
    }
    vit = {
        "cls_token": torch.zeros(1, 1, 8),
        "pos_embed": torch.zeros(1, 5, 8),
        "blocks.0.attn.qkv.weight": torch.ones(1),
    }
    for state, told in (
        (resnet, r"its tensors are conv1.weight, bn1.weight, layer1.0.bn1.bias, \.\.\."),
        (vit, "another network"),
    ):
        with pytest.raises(RunError, match=told):
            convert_to_ours(save_published(state), tmp_path / "out")
    with pytest.raises(RunError, match="it contains no tensors"):
        convert_to_ours(save_published({}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_fit(make_state: Make, save_published: Save, tmp_path: Path, llm_dir: Path) -> None:
    second, third = save_published(make_state("2"), "2.pth"), save_published(make_state("3"), "3.pth")
    frozen, first = save_published(make_state("3 frozen"), "f.pth"), save_published(make_state("1"), "1.pth")
    other = save_published(make_state("2", d=48), "48.pth")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (second, {"base": third}, "--base is for stage 3"),
        (first, {"llm": "x"}, "--llm is for stage 3"),
        (third, {"base": second}, "contains its own encoder"),
        (frozen, {}, "has no encoder, because its backbone was frozen"),
        (frozen, {"base": first}, "this is a checkpoint of stage 1"),
        (frozen, {"base": frozen}, "this file has no encoder"),
        (frozen, {"base": other}, "its encoder has width 48, but llama_proj needs 32"),
        (frozen, {"base": tmp_path / "none.pth"}, "no such file"),
        (third, {"recipe": "nope/nope"}, "no shipped recipe is named nope/nope"),
        (third, {"llm": str(tmp_path / "none")}, "no LLM with its tokenizer in this directory"),
        (tmp_path, {}, "is a directory, not a checkpoint file"),
    ]
    for file, options, told in cases:
        with pytest.raises((UsageError, RunError), match=told):
            convert_to_ours(file, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    wide = save_published(make_state("3", hidden=48), "wide.pth")
    with pytest.raises(UsageError, match=r"needs an LLM of width 48, but .* has width 32"):
        convert_to_ours(wide, tmp_path / "out", llm=str(llm_dir))
    assert not (tmp_path / "out").exists()


def test_the_base_may_be_a_directory_or_a_run(make_state: Make, save_published: Save, tmp_path: Path) -> None:
    second, frozen = save_published(make_state("2"), "2.pth"), save_published(make_state("3 frozen"), "f.pth")
    convert_to_ours(second, tmp_path / "second")
    for number, base in enumerate((second, tmp_path / "second")):
        convert_to_ours(frozen, tmp_path / str(number), base=base)
        _assert_equal(
            load_file(tmp_path / f"{number}/encoder.safetensors"), load_file(tmp_path / "second/encoder.safetensors")
        )


def test_nothing_else_is_overwritten(make_state: Make, save_published: Save, tmp_path: Path) -> None:
    file, out = save_published(make_state("2")), tmp_path / "out"
    out.mkdir()
    convert_to_ours(file, out)  # empty: free
    with pytest.raises(UsageError, match="already exists and is not empty"):
        convert_to_ours(file, out)
    convert_to_ours(file, out, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(UsageError, match="was not written by `emrrg convert`"):
        convert_to_ours(file, tmp_path / "mine", overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        convert_to_ours(file, tmp_path / "file", overwrite=True)
    with pytest.raises(UsageError, match="already exists"):
        convert_to_published(out, file)
    before = read_checkpoint(file).tensors
    convert_to_published(out, file, overwrite=True)
    _assert_equal(read_checkpoint(file).tensors, before)
    with pytest.raises(UsageError, match="is a directory"):
        convert_to_published(out, tmp_path / "mine")
    for path, told in (
        (file, "is a file, not a directory of emrrg"),
        (tmp_path / "none", "no such directory"),
        (tmp_path / "mine", "no model in this directory"),
    ):
        with pytest.raises(UsageError, match=told):
            convert_to_published(path, tmp_path / "new.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine", "out", "stage.pth"]


# -- from runs of ours -------------------------------------------------------------------------------------------


def test_runs_of_ours_in_the_published_layout(tmp_path: Path, make_state: Make, reference: Any) -> None:
    from emrrg_cli.models.arm.encoder import ArmEncoder
    from emrrg_cli.models.arm.pretrainer import ArmPretrainer, save_pretrainer
    from emrrg_cli.models.encoder_files import save_encoder

    torch.manual_seed(0)
    pretrainer = ArmPretrainer(32, 4, 128, 4, decoder_width=32).eval()
    save_pretrainer(tmp_path / "pre/model", pretrainer)
    convert_to_published(tmp_path / "pre", tmp_path / "1.pth")
    state = read_checkpoint(tmp_path / "1.pth").tensors
    expected = make_state("1", d=32, depth=4)
    assert {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in expected.items()}
    images = torch.randn(1, 3, 128, 128)
    loss, _ = reference.pretrainer(state, images, [1, 2, 3, 4])
    torch.testing.assert_close(loss, pretrainer(images).loss)
    convert_to_ours(tmp_path / "1.pth", tmp_path / "again")
    assert torch.equal(load_pretrainer(tmp_path / "again")(images).loss, pretrainer(images).loss)

    encoder = ArmEncoder(32, 2, 64, 4).eval()
    (tmp_path / "align/model").mkdir(parents=True)
    save_encoder(tmp_path / "align/model", encoder)
    heads = {n: t for n, t in make_state("2").items() if n.startswith(("vision_proj", "text_proj", "logit"))}
    save_file(heads, tmp_path / "align/model/alignment.safetensors")
    convert_to_published(tmp_path / "align", tmp_path / "2.pth")
    state = {n.removeprefix("visual_encoder."): t for n, t in read_checkpoint(tmp_path / "2.pth").tensors.items()}
    torch.testing.assert_close(reference.encoder(state, images[..., :64, :64]), encoder(images[..., :64, :64]))
    assert torch.equal(state["text_proj.weight"], heads["text_proj.weight"])


def test_a_run_with_more_than_the_layout_holds(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no place for llm\.model\.layers\.0.* and \d+ more") as refused:
        convert_to_published(tiny_run, tmp_path / "out.pth")
    assert refused.value.hint is not None
    assert "--allow" in refused.value.hint
    with pytest.raises(UsageError, match=r"no place for llm\n"):
        convert_to_published(tiny_run, tmp_path / "out.pth", allow=["llm.*"])
    with pytest.raises(UsageError, match=r"no place for llm\n"):
        convert_to_published(tiny_run / "model", tmp_path / "out.pth", allow=["llm.*"])
    lines = convert_to_published(tiny_run, tmp_path / "out.pth", allow=["llm*"], verbose=True).lines
    assert "  left out  llm" in lines
    state = read_checkpoint(tmp_path / "out.pth").tensors
    assert {name.split(".")[0] for name in state} == {"visual_encoder", "llama_proj", "layer_norm"}
    own = load_file(tiny_run / "model/encoder.safetensors")
    assert torch.equal(
        state["visual_encoder.layers.1.mixer.conv1d_c.weight"][:, 0], own["layers.1.mixer.conv_weight"][2]
    )


def test_files_of_others_are_not_overwritten(make_state: Make, save_published: Save, tmp_path: Path) -> None:
    file, out = save_published(make_state("2")), tmp_path / "out"
    convert_to_ours(file, out)
    inside = out / "checkpoint.pth"
    inside.write_bytes(file.read_bytes())
    with pytest.raises(UsageError, match=r"checkpoint\.pth is in .*out|checkpoint\.pth was not written by"):
        convert_to_ours(inside, out, overwrite=True)
    with pytest.raises(UsageError, match=r"checkpoint\.pth was not written by `emrrg convert`"):
        convert_to_ours(file, out, overwrite=True)
    assert inside.read_bytes() == file.read_bytes()
    inside.unlink()
    (out / "evaluation").mkdir()
    with pytest.raises(UsageError, match=r"evaluation was not written by `emrrg convert`"):
        convert_to_ours(file, out, overwrite=True)


def test_a_path_without_an_llm_is_refused(make_state: Make, save_published: Save, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="runs/mine/llm: no LLM with its tokenizer in this directory"):
        convert_to_ours(save_published(make_state("3")), tmp_path / "out", llm="runs/mine/llm")


def test_a_far_too_large_block_number_is_an_unknown_tensor(make_state: Make, save_published: Save) -> None:
    for stage, name in (("1", "dec_block.99999999.x"), ("2", "visual_encoder.layers.99999999.norm1.weight")):
        file = save_published({**make_state(stage), name: torch.zeros(32)}, f"{stage}.pth")
        with pytest.raises(RunError, match=rf"{name} is unknown"):
            import_checkpoint(file)


def test_numbers_that_cannot_be_converted_are_reported(make_state: Make, save_published: Save) -> None:
    state, name = make_state("2"), "visual_encoder.layers.0.mixer.D"
    for tensor, told in (
        (state[name].to(torch.float8_e4m3fn), r"holds torch\.float8_e4m3fn, not one of float32, float16"),
        (state[name].to("meta"), "holds no data"),
    ):
        with pytest.raises(RunError, match=told):
            import_checkpoint(save_published({**state, name: tensor}))


def test_a_text_tower_the_layout_cannot_hold_is_refused(make_state: Make, save_published: Save, tmp_path: Path) -> None:
    convert_to_ours(save_published(make_state("2")), tmp_path / "ours")
    for file, key, value in (
        ("alignment.json", "pooling", "mean"),
        ("alignment.json", "max_text_tokens", 60),
        ("text_encoder/config.json", "num_attention_heads", 4),
    ):
        path = tmp_path / "ours" / file
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | {key: value}))
        with pytest.raises(UsageError, match=f"no place for {key}={value}"):
            convert_to_published(tmp_path / "ours", tmp_path / "back.pth")
        convert_to_published(tmp_path / "ours", tmp_path / f"{key}.pth", allow=[f"{key}=*"])
        path.write_text(before)
    convert_to_published(tmp_path / "ours", tmp_path / "back.pth")


def test_a_converted_alignment_loads(
    make_state: Make, save_published: Save, tmp_path: Path, tokenizer: Any, reference: Any
) -> None:
    from emrrg_cli.models.build_alignment import load_alignment

    state = make_state("2")
    convert_to_ours(save_published(state), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "alignment.json").read_text())
    (tmp_path / "out" / "alignment.json").write_text(json.dumps(config | {"max_text_tokens": 32}))
    (tmp_path / "out" / "checksums.json").unlink()
    with pytest.raises(RunError, match="Bio_ClinicalBERT"):
        load_alignment(tmp_path / "out")  # tests have no network
    tokenizer.save_pretrained(tmp_path / "words")
    model = load_alignment(tmp_path / "out", tokenizer=str(tmp_path / "words"))
    assert torch.equal(model.text_proj.weight, state["text_proj.weight"])
    assert model.logit_scale == state["logit_scale"]
    assert torch.equal(model.encoder.cls_token, state["visual_encoder.cls_token"])


def test_files_for_qwen_keep_its_first_token_and_end(make_state: Make, save_published: Save, tmp_path: Path) -> None:
    convert_to_ours(save_published(make_state("3", hidden=2048)), tmp_path / "qwen")
    convert_to_ours(save_published(make_state("3", hidden=4096)), tmp_path / "llama")
    qwen, llama = (load_run_recipe(tmp_path / n, None, [], "generate").model.llm for n in ("qwen", "llama"))
    assert (qwen.name, qwen.begin_token_id, qwen.end_text) == ("Qwen/Qwen1.5-1.8B-Chat", 0, "</s>")
    assert (llama.begin_token_id, llama.end_text) == (None, None)
