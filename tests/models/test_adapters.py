"""Partial LoRA: where it goes, that it goes there alone, and that PEFT reads what we write."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.models import adapters
from emrrg_cli.models.arm.encoder import ArmEncoder
from emrrg_cli.models.build import assemble
from emrrg_cli.recipe.finetuning import AdapterSettings, ModelSettings
from emrrg_cli.vocabulary import ADAPTER_TARGETS

INSIDE_BLOCKS = [target for target in adapters.ENCODER_TARGETS if target != "patch_embed"]
RANK, ALPHA = 4, 6.0

# What each target stands for, without the pattern language: modules of one block.
MODULES = {
    "X": ["mixer.X"],
    "Z": ["mixer.Z"],
    "dt": [f"mixer.directions.{k}.dt" for k in range(4)],
    "B": [f"mixer.directions.{k}.B" for k in range(4)],
    "C": [f"mixer.directions.{k}.C" for k in range(4)],
    "in_proj": ["mixer.X", "mixer.Z"],
    "x_proj": [f"mixer.directions.{k}.{name}" for k in range(4) for name in ("dt", "B", "C")],
    "dt_proj": [f"mixer.directions.{k}.dt_proj" for k in range(4)],
    "out_proj": ["mixer.out_proj"],
    "mlp": ["mlp.w1", "mlp.w2", "mlp.w3"],
}


def _adapted(encoder: ArmEncoder, targets: list[str]) -> Any:
    config = adapters.encoder_lora(targets, RANK, ALPHA)
    assert config is not None
    return get_peft_model(encoder, config).eval()


def _adapted_modules(model: nn.Module) -> list[str]:
    return sorted(name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A"))


def _train(model: nn.Module, only: str = "") -> None:
    """Gives the LoRA updates (of modules whose name has `only` in it) a value, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name and only in name:
                parameter += torch.randn(parameter.shape, generator=generator)


def _block_outputs(model: Any, images: Tensor) -> list[Tensor]:
    """What comes out of the patch embedding and of each block."""
    encoder = adapters.plain(model)
    outputs: list[Tensor] = []
    modules = [encoder.patch_embed, *encoder.layers]
    handles = [module.register_forward_hook(lambda m, args, out: outputs.append(out.detach())) for module in modules]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("target", sorted(MODULES))
def test_a_target_names_these_modules_in_every_block(target: str, make_encoder: Callable[..., ArmEncoder]) -> None:
    model = _adapted(make_encoder(depth=2), [target])
    expected = [f"layers.{block}.{module}" for block in range(2) for module in MODULES[target]]
    assert _adapted_modules(adapters.plain(model)) == sorted(expected)


def test_patch_embed_and_lists_of_targets(make_encoder: Callable[..., ArmEncoder]) -> None:
    assert set(MODULES) | {"patch_embed"} == set(adapters.ENCODER_TARGETS)
    assert (*adapters.ENCODER_TARGETS, "llm") == ADAPTER_TARGETS
    model = _adapted(make_encoder(depth=1), ["patch_embed", "X", "B", "llm"])
    expected = ["patch_embed", "layers.0.mixer.X", *(f"layers.0.{module}" for module in MODULES["B"])]
    assert _adapted_modules(adapters.plain(model)) == sorted(expected)


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("target", INSIDE_BLOCKS)
def test_lora_on_a_block_changes_only_that_block(
    target: str, block: int, make_encoder: Callable[..., ArmEncoder]
) -> None:
    model = _adapted(make_encoder(), [target])
    encoder = adapters.plain(model)
    torch.manual_seed(0)
    images, tokens = torch.randn(2, 3, 64, 64), torch.randn(2, 17, 32)
    before = _block_outputs(model, images)
    alone_before = [layer(tokens, encoder.order).detach() for layer in encoder.layers]
    _train(model, only=f"layers.{block}.")
    after = _block_outputs(model, images)
    alone_after = [layer(tokens, encoder.order).detach() for layer in encoder.layers]

    # In the encoder: nothing before the block moves, the block does.
    assert all(torch.equal(before[i], after[i]) for i in range(block + 1))
    assert float((before[block + 1] - after[block + 1]).abs().max()) > 1e-3
    # For equal inputs: the block and no other.
    changed = [not torch.equal(one, other) for one, other in zip(alone_before, alone_after, strict=True)]
    assert changed == [index == block for index in range(3)]


def test_lora_on_the_patch_embedding_changes_no_block(make_encoder: Callable[..., ArmEncoder]) -> None:
    model = _adapted(make_encoder(), ["patch_embed"])
    encoder = adapters.plain(model)
    images, tokens = torch.randn(2, 3, 64, 64), torch.randn(2, 17, 32)
    before, alone = _block_outputs(model, images), [layer(tokens, encoder.order) for layer in encoder.layers]
    _train(model)
    assert not torch.equal(before[0], _block_outputs(model, images)[0])
    assert all(torch.equal(layer(tokens, encoder.order), out) for layer, out in zip(encoder.layers, alone, strict=True))


@pytest.mark.parametrize("target", [*INSIDE_BLOCKS, "patch_embed"])
def test_outputs_are_those_of_weights_with_the_update_added(
    target: str, make_encoder: Callable[..., ArmEncoder]
) -> None:
    """`W + alpha / rank * B A`, formed here without PEFT."""
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    fresh, model = make_encoder().eval(), _adapted(make_encoder(), [target])
    with torch.no_grad():
        assert torch.equal(model(images), fresh(images))  # B starts at zero
        _train(model)
        out = model(images)
        state = fresh.state_dict()
        for name in _adapted_modules(adapters.plain(model)):
            module = adapters.plain(model).get_submodule(name)
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            state[f"{name}.weight"] += ALPHA / RANK * (b.flatten(1) @ a.flatten(1)).view_as(state[f"{name}.weight"])
        fresh.load_state_dict(state)
        assert float((out - make_encoder().eval()(images)).abs().max()) > 1e-2
        torch.testing.assert_close(out, fresh(images), rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            assert torch.equal(model(images), make_encoder().eval()(images))


@pytest.mark.parametrize("target", [*INSIDE_BLOCKS, "patch_embed"])
def test_merged_equals_unmerged(target: str, make_encoder: Callable[..., ArmEncoder]) -> None:
    model = _adapted(make_encoder(), [target])
    _train(model)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        unmerged = model(images)
        merged = adapters.merge(model)
        assert isinstance(merged, ArmEncoder)
        assert not any("lora" in name for name, _ in merged.named_parameters())
        assert set(merged.state_dict()) == set(make_encoder().state_dict())
        torch.testing.assert_close(merged(images), unmerged, rtol=1e-5, atol=1e-5)


def test_merging_nothing_changes_nothing(make_encoder: Callable[..., ArmEncoder]) -> None:
    encoder = make_encoder()
    assert adapters.merge(encoder) is encoder
    assert adapters.plain(encoder) is encoder
    assert not adapters.is_adapted(encoder)
    assert adapters.is_adapted(_adapted(encoder, ["X"]))


@pytest.mark.parametrize("target", [*INSIDE_BLOCKS, "patch_embed"])
def test_gradients_reach_every_update(target: str, make_encoder: Callable[..., ArmEncoder]) -> None:
    """The projections inside directions are read as weights and not called: they must learn all the same."""
    model = _adapted(make_encoder(), [target]).train()
    _train(model)
    model(torch.randn(2, 3, 64, 64)).square()[..., :7].sum().backward()
    updates = {name: p.grad for name, p in model.named_parameters() if ".lora_" in name}
    assert len(updates) == 2 * (1 if target == "patch_embed" else 3 * len(MODULES[target]))
    assert all(grad is not None and float(grad.abs().max()) > 0 for grad in updates.values())
    assert all(p.grad is None for name, p in model.named_parameters() if ".lora_" not in name)


def test_updates_inside_directions_learn_under_autocast(make_encoder: Callable[..., ArmEncoder]) -> None:
    model = _adapted(make_encoder(), ["x_proj", "dt_proj", "X"]).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 3, 64, 64))
    out.float().square()[..., :7].sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if ".lora_B." in name}
    assert all(grad is not None and grad.dtype == torch.float32 and bool(grad.any()) for grad in grads.values())


@pytest.mark.parametrize(("size", "expected"), [("base", 294_912), ("large", 786_432)])
def test_trainable_parameters_of_lora_x(size: str, expected: int, make_llm: Callable[..., Any], tokenizer: Any) -> None:
    settings = ModelSettings.model_validate(
        {
            "encoder": {"size": size},
            "adapter": {"targets": ["X"], "rank": 16, "alpha": 16.0},
            "llm": {"name": "some/llm"},
            "hybrid": {"every": None},
        }
    )
    with torch.device("meta"):
        encoder = ArmEncoder(*settings.encoder.width_and_depth)
    model = assemble(settings, encoder, make_llm(), tokenizer)
    trainable = [p.numel() for p in model.encoder.parameters() if p.requires_grad]
    assert sum(trainable) == expected
    scaling = adapters.plain(model.encoder).layers[0].mixer.X.scaling
    assert scaling == {"default": 1.0}


@pytest.mark.parametrize(
    ("targets", "llm"),
    [
        (["X"], {"name": "some/llm"}),
        (["x_proj", "dt_proj", "mlp", "patch_embed"], {"name": "some/llm"}),
        (["llm"], {"name": "some/llm"}),
        (["X", "llm"], {"name": "some/llm"}),
        ("none", {"name": "some/llm"}),
        ("full", {"name": "some/llm"}),
        ("none", {"name": "scratch"}),
        (["X"], {"name": "some/llm", "frozen": False}),
    ],
    ids=str,
)
def test_freezing_leaves_adapters_and_bridge_trainable(
    targets: Any,
    llm: dict[str, Any],
    make_encoder: Callable[..., ArmEncoder],
    make_llm: Callable[..., Any],
    tokenizer: Any,
) -> None:
    settings = ModelSettings.model_validate({"adapter": {"targets": targets}, "llm": llm, "hybrid": {"every": 2}})
    model = assemble(settings, make_encoder(), make_llm(), tokenizer)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}

    def wanted(name: str) -> bool:
        tower = name.split(".")[0]
        return (
            tower == "bridge"
            or ".cross." in name
            or ".lora_A." in name
            or ".lora_B." in name
            or (tower == "encoder" and targets == "full")
            or (tower == "llm" and not settings.llm.is_frozen)
        )

    assert trainable == {name for name, _ in model.named_parameters() if wanted(name)}
    adapted = {name.split(".")[0] for name in trainable if ".lora_" in name}
    names = targets if isinstance(targets, list) else []
    assert adapted == ({"llm"} if "llm" in names else set()) | ({"encoder"} if set(names) - {"llm"} else set())
    assert sum(name.endswith("cross.warmup") for name in trainable) == 2


def test_llm_adapters_go_on_queries_and_values(make_llm: Callable[..., Any]) -> None:
    config = adapters.llm_lora(["X", "llm"], RANK, ALPHA)
    assert config is not None
    model = get_peft_model(make_llm(), config)
    expected = [f"model.layers.{i}.self_attn.{name}" for i in range(3) for name in ("q_proj", "v_proj")]
    assert _adapted_modules(adapters.plain(model)) == expected
    assert adapters.llm_lora(["X"], RANK, ALPHA) is None
    assert adapters.encoder_lora(["llm"], RANK, ALPHA) is None


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown adapter targets \['Y'\]"):
        adapters.encoder_lora(["X", "Y"], RANK, ALPHA)


@pytest.mark.parametrize("target", ["dt", "B", "C", "x_proj", "dt_proj"])
def test_dropout_inside_directions_is_refused(target: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(f"dropout must be 0 with targets ['{target}']")):
        AdapterSettings.model_validate({"targets": ["X", target], "dropout": 0.1})


def test_dropout_outside_directions_works_in_training(make_encoder: Callable[..., ArmEncoder]) -> None:
    settings = AdapterSettings.model_validate({"targets": ["X", "out_proj"], "dropout": 0.5})
    model = get_peft_model(make_encoder(), adapters.encoder_lora(settings.targets, 4, 4.0, settings.dropout))
    _train(model)
    images = torch.randn(1, 3, 64, 64)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_plain_peft_reads_the_adapters_of_an_encoder(make_encoder: Callable[..., ArmEncoder], tmp_path: Path) -> None:
    targets = ["X", "B", "dt_proj", "out_proj", "patch_embed"]
    model = _adapted(make_encoder(), targets)
    _train(model)
    images = torch.randn(2, 3, 64, 64)
    adapters.save_adapters(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        name.replace(".default.", ".") for name, _ in model.named_parameters() if ".lora_" in name
    }
    with torch.no_grad():
        read = PeftModel.from_pretrained(make_encoder().eval(), str(tmp_path)).eval()
        assert torch.equal(read(images), model(images))
        ours = adapters.load_adapters(make_encoder().eval(), tmp_path).eval()
        assert torch.equal(ours(images), model(images))
    assert not any(parameter.requires_grad for name, parameter in ours.named_parameters() if ".lora_" in name)


def test_plain_peft_reads_the_adapters_of_a_hybrid_llm(
    make_encoder: Callable[..., ArmEncoder], make_llm: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    settings = ModelSettings.model_validate(
        {"adapter": {"targets": ["llm"], "rank": RANK}, "llm": {"name": "some/llm"}, "hybrid": {"every": 2}}
    )
    model = assemble(settings, make_encoder(), make_llm(), tokenizer).eval()
    _train(model.llm)
    adapters.save_adapters(model.llm, tmp_path)
    assert not any(".cross." in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    ids = torch.tensor([[1, 5, 9, 200, 31]])
    with torch.no_grad():
        plain = PeftModel.from_pretrained(make_llm(), str(tmp_path)).eval()
        assert torch.equal(plain(input_ids=ids).logits, model.llm(input_ids=ids).logits)
        assert not torch.equal(plain(input_ids=ids).logits, make_llm()(input_ids=ids).logits)


def test_adapters_that_do_not_fit_are_refused(make_encoder: Callable[..., ArmEncoder], tmp_path: Path) -> None:
    model = _adapted(make_encoder(depth=2), ["X"])
    adapters.save_adapters(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)

    torch.manual_seed(0)
    wider = ArmEncoder(48, 2, image_size=64, d_state=4)
    with pytest.raises(RunError, match=f"{re.escape(str(tmp_path))}: these adapters do not fit"):
        adapters.load_adapters(wider, tmp_path)
    with pytest.raises(RunError, match="do not fit"):  # a block more than was trained
        adapters.load_adapters(make_encoder(depth=3), tmp_path)
    with pytest.raises(RunError, match="do not fit"):  # a block less
        adapters.load_adapters(make_encoder(depth=1), tmp_path)

    name = next(iter(whole))
    save_file({key: tensor for key, tensor in whole.items() if key != name}, file)
    with pytest.raises(RunError, match="do not fit"):
        adapters.load_adapters(make_encoder(depth=2), tmp_path)
    file.write_bytes(b"not safetensors")
    with pytest.raises(RunError, match="do not fit"):
        adapters.load_adapters(make_encoder(depth=2), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(RunError, match="do not fit"):
        adapters.load_adapters(make_encoder(depth=2), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": "(a+)+$"}, "target_modules were not written by emrrg"),
        ({"target_modules": ["X"]}, "target_modules were not written by emrrg"),
        ({"r": 10**9}, "r or lora_alpha is not a valid number"),
        ({"lora_alpha": "16"}, "r or lora_alpha is not a valid number"),
        ({"use_rslora": True}, "use_rslora is not supported"),
        ({"lora_alpha": 99.0}, "lora_alpha differs from the recipe"),
        ({"target_modules": r"(?:layers\.\d+\.mixer\.Z)"}, "target_modules differs from the recipe"),
    ],
)
def test_a_changed_adapter_config_is_refused(
    make_encoder: Callable[..., ArmEncoder], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    adapters.save_adapters(_adapted(make_encoder(depth=2), ["X"]), tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    expected = adapters.encoder_lora(["X"], saved["r"], saved["lora_alpha"])
    adapters.load_adapters(make_encoder(depth=2), tmp_path, expected)
    file.write_text(json.dumps(saved | {"auto_mapping": {"parent_library": "antigravity"}}))  # imported by PEFT
    adapters.load_adapters(make_encoder(depth=2), tmp_path, expected)
    file.write_text(json.dumps(saved | change))
    with pytest.raises(RunError, match=message):
        adapters.load_adapters(make_encoder(depth=2), tmp_path, expected)


def test_effective_weight_of_a_linear_and_its_adapters() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5)
    assert adapters.effective_weight(linear) is linear.weight
    model = get_peft_model(nn.Sequential(linear), LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    layer = model.base_model.model[0]
    _train(model)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = adapters.effective_weight(layer)
    torch.testing.assert_close(weight, layer.base_layer.weight + 1.5 * b @ a)
    grads = torch.autograd.grad(weight.sum(), [a, b])
    assert all(bool(grad.any()) for grad in grads)
    layer.merge()
    assert adapters.effective_weight(layer) is layer.base_layer.weight
    layer.unmerge()
    with model.disable_adapter():
        assert adapters.effective_weight(layer) is layer.base_layer.weight
