"""What is written into a run directory is the model that comes out of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emrrg_cli.datasets.report_dataset import Batch
from emrrg_cli.decoding.reference import generation_config
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.models import adapters, build
from emrrg_cli.models.build import (
    assemble,
    build_encoder,
    fresh_llm,
    load_model,
    save_static,
    save_trained,
)
from emrrg_cli.models.hybrid_decoder import hybrid_parameters
from emrrg_cli.models.report_generator import ReportGenerator
from emrrg_cli.models.weights import load_weights
from emrrg_cli.recipe.finetuning import GenerationSettings, ModelSettings

ENCODER = {"size": None, "d_model": 32, "depth": 2, "d_state": 4, "image_size": 64, "drop_path": 0.2}
SCRATCH = {"name": "scratch", "scratch": {"hidden_size": 32, "layers": 3, "heads": 4, "kv_heads": 2}}


@pytest.fixture
def llm_dir(make_llm: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Path:
    directory = tmp_path / "llm"
    make_llm().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@dataclass
class Run:
    """A trained model and the directory that it was written to."""

    directory: Path
    settings: ModelSettings
    model: ReportGenerator

    def load(self, dtype: torch.dtype = torch.float32, *, merge: bool = True) -> ReportGenerator:
        return load_model(self.directory, self.settings, dtype, merge=merge)


def _train(model: nn.Module, seed: int = 0) -> None:
    """Moves everything that is trained, and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def make_run(tokenizer: Any, tmp_path: Path) -> Callable[..., Run]:
    """Does what `finetune` does to a run directory."""

    def make(
        targets: Any = "none", llm: dict[str, Any] = SCRATCH, dtype: torch.dtype = torch.float32, **others: Any
    ) -> Run:
        settings = ModelSettings.model_validate(
            {
                "encoder": ENCODER,
                "adapter": {"targets": targets, "rank": 4, "alpha": 8.0},
                "llm": llm,
                "hybrid": {"every": 2},
            }
            | others
        )
        directory = tmp_path / "run"
        directory.mkdir()
        torch.manual_seed(0)
        encoder = build_encoder(settings.encoder)
        fresh = fresh_llm(settings, tokenizer, dtype)
        save_static(directory, settings, encoder, fresh, tokenizer)
        model = assemble(settings, encoder, fresh, tokenizer)
        _train(model)
        save_trained(directory, settings, model)
        return Run(directory, settings, model.eval())

    return make


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        indices=[0, 1],
        study_ids=["a", "b"],
        pixels=torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator),
        views=torch.tensor([2, 1]),
        reports=["", ""],
        labels=torch.tensor([[40, 41, 42, 2], [50, 51, 2, -100]]),
    )


def _logits(model: ReportGenerator) -> Tensor:
    """Of the whole batch, prompt and report, as one tensor."""
    batch = _batch()
    seen: list[Tensor] = []
    handle = adapters.plain(model.llm).lm_head.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        model(batch)
    handle.remove()
    return seen[0].float()


def _reports(model: ReportGenerator) -> list[str]:
    config = generation_config(GenerationSettings(num_beams=2, max_new_tokens=8))()
    return model.generate(_batch().pixels, _batch().views, config)


def _files(directory: Path) -> set[str]:
    return {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()}


CASES = [
    ("full", "scratch"),
    ("none", "scratch"),
    (["X"], "scratch"),
    ("full", "directory"),
    ("none", "directory"),
    (["X"], "directory"),
    (["llm"], "directory"),
    (["X", "B", "dt_proj", "mlp", "patch_embed", "llm"], "directory"),
    (["X", "llm"], "copied"),
    ("full", "trained"),
    (["Z"], "trained"),
]


@pytest.mark.parametrize(("targets", "kind"), CASES, ids=str)
def test_a_run_gives_back_its_model(targets: Any, kind: str, make_run: Callable[..., Run], llm_dir: Path) -> None:
    llm: dict[str, Any] = {
        "scratch": SCRATCH,
        "directory": {"name": str(llm_dir)},
        "copied": {"name": str(llm_dir), "save": True},
        "trained": {"name": str(llm_dir), "frozen": False},
    }[kind]
    run = make_run(targets, llm)
    expected = _logits(run.model)
    if kind in ("copied", "trained"):
        shutil.rmtree(llm_dir)  # the run needs nothing else
    unmerged = run.load(merge=False)
    assert torch.equal(_logits(unmerged), expected)
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    found = dict(unmerged.named_parameters())
    assert all(torch.equal(found[name], parameter) for name, parameter in trained.items())

    merged = run.load()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    assert not any(module.training for module in merged.modules())
    torch.testing.assert_close(_logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert _reports(merged) == _reports(run.model)


def test_files_of_a_run_with_lora_and_a_frozen_llm(make_run: Callable[..., Run], llm_dir: Path) -> None:
    run = make_run(["X", "llm"], {"name": str(llm_dir)})
    files = _files(run.directory)
    assert files >= {
        "encoder.safetensors",
        "llm.json",
        "tokenizer/tokenizer.json",
        "model/bridge.safetensors",
        "model/adapters/encoder/adapter_config.json",
        "model/adapters/encoder/adapter_model.safetensors",
        "model/adapters/llm/adapter_model.safetensors",
    }
    assert not any(file.endswith((".tmp", "model/encoder.safetensors")) or "llm/model" in file for file in files)
    assert not any(".tmp" in path.name or "previous" in path.name for path in run.directory.rglob("*"))
    bridge = load_file(run.directory / "model" / "bridge.safetensors")
    assert len(bridge) == 4 + 2 * 4
    assert json.loads((run.directory / "llm.json").read_text())["name"] == str(llm_dir)


def test_files_of_a_run_trained_whole(make_run: Callable[..., Run]) -> None:
    run = make_run("full", SCRATCH)
    files = _files(run.directory)
    assert files >= {"model/encoder.safetensors", "model/llm/model.safetensors", "model/llm/config.json"}
    assert not files & {"encoder.safetensors", "llm.json"}
    assert not any("adapter" in file for file in files)


@pytest.mark.parametrize("kind", ["scratch", "trained"])
def test_a_trained_llm_is_a_plain_llm_on_disk(kind: str, make_run: Callable[..., Run], llm_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = make_run("none", SCRATCH if kind == "scratch" else {"name": str(llm_dir), "frozen": False})
    directory = run.directory / "model" / "llm"
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert not any(".cross." in name for name in load_file(directory / "model.safetensors"))
    plain, loaded = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(loaded[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[1, 7, 9, 200]])
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, run.model.llm(input_ids=ids).logits)
    assert any(True for _ in hybrid_parameters(run.model.llm))


def test_the_trained_part_is_replaced_as_a_whole(make_run: Callable[..., Run]) -> None:
    run = make_run(["X"], SCRATCH)
    (run.directory / "model" / "stale").write_text("of the model before")
    before = _logits(run.load())
    _train(run.model, seed=1)
    save_trained(run.directory, run.settings, run.model)
    assert not (run.directory / "model" / "stale").exists()
    after = _logits(run.load(merge=False))
    assert torch.equal(after, _logits(run.model))
    assert not torch.allclose(after, before)


def test_writing_changes_nothing_in_the_model(make_run: Callable[..., Run], llm_dir: Path) -> None:
    run = make_run(["X", "llm"], {"name": str(llm_dir)})
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    trainable = {name for name, p in run.model.named_parameters() if p.requires_grad}
    save_trained(run.directory, run.settings, run.model)
    assert all(torch.equal(before[name], p) for name, p in run.model.named_parameters())
    assert {name for name, p in run.model.named_parameters() if p.requires_grad} == trainable


def test_static_parts_are_those_before_training(make_run: Callable[..., Run], llm_dir: Path, tokenizer: Any) -> None:
    run = make_run(["X"], {"name": str(llm_dir), "save": True})
    torch.manual_seed(0)
    fresh = build_encoder(run.settings.encoder)
    saved = load_file(run.directory / "encoder.safetensors")
    assert set(saved) == set(fresh.state_dict())
    assert all(torch.equal(saved[name], tensor) for name, tensor in fresh.state_dict().items())
    # A resumed run writes them once more.
    llm = fresh_llm(run.settings, tokenizer, torch.float32)
    save_static(run.directory, run.settings, fresh, llm, tokenizer)
    assert torch.equal(_logits(run.load(merge=False)), _logits(run.model))


def test_settings_of_the_model_are_kept(make_run: Callable[..., Run]) -> None:
    run = make_run("none", SCRATCH, visual_prompt="pooled", views="concat", scan="reference", hybrid={"every": 1})
    model = run.load()
    assert (model.visual_prompt, model.views) == ("pooled", "concat")
    assert model.encoder.layers[0].mixer.engine == "reference"
    assert sum(name.endswith("warmup") for name, _ in model.named_parameters()) == 3
    torch.testing.assert_close(_logits(model), _logits(run.model))  # of another engine


def test_the_prompt_is_that_of_the_recipe(make_run: Callable[..., Run]) -> None:
    run = make_run("none", SCRATCH, prompt="Film: <ImageHere> Report:")
    assert run.load().after == run.load().tokenizer.encode(" Report:", add_special_tokens=False)
    assert run.load().after == run.model.after


def test_without_hybrid_layers(make_run: Callable[..., Run], llm_dir: Path) -> None:
    run = make_run(["X"], {"name": str(llm_dir)}, hybrid={"every": None})
    model = run.load(merge=False)
    assert not model.hybrid
    assert torch.equal(_logits(model), _logits(run.model))


# -- the LLM that a run names ---------------------------------------------------------------------------------------


def test_another_llm_in_its_place_is_refused(
    make_run: Callable[..., Run], llm_dir: Path, make_llm: Callable[..., Any]
) -> None:
    run = make_run(["X"], {"name": str(llm_dir)})
    make_llm(seed=1).save_pretrained(llm_dir)
    with pytest.raises(
        RunError, match=r"is not the one that .* was trained with \(weights_fingerprint differs"
    ) as raised:
        run.load()
    assert "model.llm.save=true" in str(raised.value)
    make_llm().save_pretrained(llm_dir)
    run.load()
    config = json.loads((llm_dir / "config.json").read_text())
    (llm_dir / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(RunError, match="config_sha256 differs"):
        run.load()
    shutil.rmtree(llm_dir)
    with pytest.raises(RunError, match="no such directory"):
        run.load()


@pytest.mark.parametrize("content", [b"", b'{"name": "x', b"[]", b"\xff\xfe"])
def test_a_broken_record_of_the_llm_is_named(make_run: Callable[..., Run], llm_dir: Path, content: bytes) -> None:
    run = make_run(["X"], {"name": str(llm_dir)})
    (run.directory / "llm.json").write_bytes(content)
    with pytest.raises(RunError, match=r"llm\.json, the record of this run's LLM, cannot be read: ") as raised:
        run.load()
    assert "used without a check" in str(raised.value.hint)
    (run.directory / "llm.json").unlink()
    run.load()


def test_a_run_in_bf16_is_used_in_fp32(make_run: Callable[..., Run], llm_dir: Path) -> None:
    """Trained on a GPU, used on a laptop: the LLM is the same."""
    run = make_run(["X"], {"name": str(llm_dir)}, torch.bfloat16)
    assert next(run.model.llm.parameters()).dtype == torch.bfloat16
    model = run.load(torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    half = run.load(torch.bfloat16, merge=False)
    assert half.llm.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for _, p in half.bridge_parameters()} == {torch.float32}
    assert torch.equal(_logits(half), _logits(run.model))
    assert len(_reports(half)) == 2


def test_a_copied_llm_keeps_its_dtype_choice(make_run: Callable[..., Run], llm_dir: Path) -> None:
    run = make_run(["X"], {"name": str(llm_dir), "save": True}, torch.bfloat16)
    assert next(run.load(torch.float32).llm.parameters()).dtype == torch.float32
    assert next(run.load(torch.bfloat16).llm.parameters()).dtype == torch.bfloat16


# -- runs that cannot be read ---------------------------------------------------------------------------------------


def test_a_run_without_a_model(make_run: Callable[..., Run]) -> None:
    run = make_run("none", SCRATCH)
    shutil.rmtree(run.directory / "model")
    with pytest.raises(RunError, match="this run has no trained model yet"):
        run.load()


def test_a_model_can_be_read_while_it_is_replaced(make_run: Callable[..., Run]) -> None:
    run = make_run("none", SCRATCH)
    (run.directory / "model").rename(run.directory / "model.previous-emrrg")
    before = sorted(run.directory.rglob("*"))
    assert torch.equal(_logits(run.load()), _logits(run.model))
    assert sorted(run.directory.rglob("*")) == before


def test_all_parts_of_a_model_come_from_one_export(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("full", SCRATCH)
    fitting_tensors = build.fitting_tensors

    def read_and_export(own: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
        tensors = fitting_tensors(own, file)
        monkeypatch.setattr(build, "fitting_tensors", fitting_tensors)
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.add_(0.01)
        build.save_trained(run.directory, run.settings, run.model)
        return tensors

    monkeypatch.setattr(build, "fitting_tensors", read_and_export)
    assert torch.equal(_logits(run.load()), _logits(run.model))


def test_parts_that_are_missing(make_run: Callable[..., Run], llm_dir: Path) -> None:
    run = make_run(["X", "llm"], {"name": str(llm_dir)})
    (run.directory / "model" / "checksums.json").unlink()
    for part in ("encoder", "llm"):
        directory = run.directory / "model" / "adapters" / part
        directory.rename(directory.with_suffix(".away"))
        with pytest.raises(RunError, match=f"adapters/{part}: the adapters of this run are missing"):
            run.load()
        directory.with_suffix(".away").rename(directory)
    run.load()
    (run.directory / "encoder.safetensors").unlink()
    with pytest.raises(RunError, match=r"encoder\.safetensors: not a readable"):
        run.load()


def test_a_missing_trained_llm_is_not_replaced_by_the_plain_one(make_run: Callable[..., Run], llm_dir: Path) -> None:
    run = make_run("none", {"name": str(llm_dir), "frozen": False})
    shutil.rmtree(run.directory / "model" / "llm")
    (run.directory / "model" / "checksums.json").unlink()
    with pytest.raises(RunError, match="the trained LLM of this run is missing"):
        run.load()


def test_a_bridge_that_does_not_fit(make_run: Callable[..., Run]) -> None:
    run = make_run("none", SCRATCH)
    file = run.directory / "model" / "bridge.safetensors"
    (run.directory / "model" / "checksums.json").unlink()
    whole = load_file(file)
    save_file(whole | {"bridge.proj.bias": torch.zeros(1)}, file)  # would broadcast
    with pytest.raises(RunError, match=r"bridge\.proj\.bias is \[1\], the model has \[32\]"):
        run.load()
    save_file({name: tensor for name, tensor in whole.items() if not name.endswith("warmup")}, file)
    with pytest.raises(RunError, match=r"cross\.warmup is missing \(and 1 more\)"):
        run.load()
    file.write_bytes(b"cut")
    with pytest.raises(RunError, match=r"bridge\.safetensors: not a readable safetensors file"):
        run.load()


def test_a_giant_encoder_takes_no_memory(make_run: Callable[..., Run]) -> None:
    run = make_run()
    giant = run.settings.encoder.model_copy(update={"d_model": 200_000, "depth": 64})  # 60 TB
    run.settings = run.settings.model_copy(update={"encoder": giant})
    with pytest.raises(RunError, match="the weights do not fit the model of the recipe"):
        run.load()


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    module, file = nn.Linear(3, 2), tmp_path / "weights.safetensors"
    good = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    save_file(good, file)
    load_weights(module, file)
    assert torch.equal(module.weight.detach(), good["weight"])
    for tensors, message in (
        ({"weight": good["weight"]}, "bias is missing"),
        (good | {"more": torch.zeros(1)}, "more is unknown"),
        (good | {"weight": torch.zeros(3, 2)}, r"weight is \[3, 2\], the model has \[2, 3\]"),
        ({"w": good["weight"]}, r"weight is missing \(and 2 more\)"),
    ):
        save_file(tensors, file)
        with pytest.raises(RunError, match=message):
            load_weights(module, file)
    assert torch.equal(module.weight.detach(), good["weight"])
    file.write_bytes(b"\0" * 40)
    with pytest.raises(RunError, match="not a readable safetensors file"):
        load_weights(module, file)
    with pytest.raises(RunError, match=r"absent\.safetensors: not a readable safetensors file"):
        load_weights(module, tmp_path / "absent.safetensors")


def test_lora_that_does_not_fit_the_llm(make_encoder: Callable[..., Any], tokenizer: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = ModelSettings.model_validate(
        {"adapter": {"targets": ["llm"]}, "llm": {"name": "gpt2"}, "hybrid": {"every": None}}
    )
    llm = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=320, bos_token_id=1, eos_token_id=2))
    with pytest.raises(UsageError, match="LoRA does not fit GPT2LMHeadModel"):
        assemble(settings, make_encoder(), llm, tokenizer)
