"""From stage to stage: where an encoder is found, what becomes of every tensor, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import emrrg_cli
from emrrg_cli.app import main
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.models.arm.encoder import ArmEncoder, sincos_position_embedding
from emrrg_cli.models.encoder_files import encoder_source, save_encoder
from emrrg_cli.models.transfer import fill_encoder, fit_positions

D, DEPTH, N = 32, 2, 4


def _encoder(image_size: int = 64, stage: int = 2, seed: int = 0, **sizes: int) -> ArmEncoder:
    torch.manual_seed(seed)
    options = {"directions": 1, "class_token": False, "final_norm": False} if stage == 1 else {}
    encoder = ArmEncoder(
        sizes.get("d_model", D), sizes.get("depth", DEPTH), image_size, sizes.get("d_state", N), **options
    )
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return encoder


def _state(encoder: ArmEncoder) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in encoder.state_dict().items()}


@pytest.fixture
def pretrainer(tmp_path: Path) -> Path:
    """What `pretrain` exports: the encoder under `encoder.`, and a decoder beside it."""
    tensors = {f"encoder.{name}": tensor for name, tensor in _state(_encoder(128, stage=1)).items()}
    tensors |= {"ar_token": torch.randn(1, 1, 8), "blocks.0.attn.q.weight": torch.randn(8, 8)}
    directory = tmp_path / "stage1"
    directory.mkdir()
    save_file(tensors, directory / "pretrainer.safetensors")
    return directory


# -- stage 1 to 2 ------------------------------------------------------------------------------------------------


def test_one_direction_becomes_four_equal_ones(pretrainer: Path) -> None:
    source, encoder = _state(_encoder(128, stage=1)), _encoder(64, seed=1)
    fill_encoder(encoder, pretrainer)
    state = encoder.state_dict()
    for i in range(DEPTH):
        for k in range(4):
            for name in ("conv_weight", "conv_bias", "A_log", "D"):
                assert torch.equal(state[f"layers.{i}.mixer.{name}"][k], source[f"layers.{i}.mixer.{name}"][0])
            for name in ("dt.weight", "B.weight", "C.weight", "dt_proj.weight", "dt_proj.bias"):
                ours, theirs = (f"layers.{i}.mixer.directions.{j}.{name}" for j in (k, 0))
                assert torch.equal(state[ours], source[theirs])
        for name in ("norm1.bias", "norm2.weight", "mixer.X.weight", "mixer.Z.weight", "mixer.out_proj.weight"):
            assert torch.equal(state[f"layers.{i}.{name}"], source[f"layers.{i}.{name}"])
        for name in ("w1", "w2", "w3"):
            assert torch.equal(state[f"layers.{i}.mlp.{name}.bias"], source[f"layers.{i}.mlp.{name}.bias"])
    assert torch.equal(state["patch_embed.weight"], source["patch_embed.weight"])


def test_positions_are_interpolated_and_get_a_zero_row(pretrainer: Path) -> None:
    positions = _state(_encoder(128, stage=1))["pos_embed"]  # 8 x 8 patches
    image = positions.reshape(8, 8, D).permute(2, 0, 1)[None]
    for size in (64, 112, 176):
        grid = size // 16
        encoder = _encoder(size, seed=1)
        fill_encoder(encoder, pretrainer)
        found, middle = encoder.pos_embed.detach(), grid * grid // 2
        assert found.shape == (1, grid * grid + 1, D)
        assert torch.equal(found[0, middle], torch.zeros(D))
        expected = F.interpolate(image, (grid, grid), mode="bicubic")[0].flatten(1).T
        torch.testing.assert_close(torch.cat([found[0, :middle], found[0, middle + 1 :]]), expected)


def test_the_same_grid_keeps_positions_exactly(pretrainer: Path) -> None:
    encoder = _encoder(128, seed=1)
    fill_encoder(encoder, pretrainer)
    found = encoder.pos_embed.detach()
    patches = torch.cat([found[:, :32], found[:, 33:]], dim=1)
    assert torch.equal(patches, sincos_position_embedding(D, 8))


def test_every_tensor_is_accounted_for(pretrainer: Path) -> None:
    encoder = _encoder(64, seed=1)
    before = _state(encoder)
    report = fill_encoder(encoder, pretrainer)
    source = load_file(pretrainer / "pretrainer.safetensors")
    assert set(report.used) | set(report.dropped) == set(source)
    assert set(report.dropped) == {"ar_token", "blocks.0.attn.q.weight"}
    assert set(report.made) == {"cls_token", "norm_f.weight", "norm_f.bias"}
    assert report.used["encoder.layers.1.mixer.D"] == "1 direction to 4"
    assert report.used["encoder.pos_embed"] == "8 x 8 to 4 x 4, bicubic; a zero row for the class token"
    assert report.used["encoder.layers.0.norm1.weight"] == ""
    after = encoder.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in report.made)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == set(after) - set(report.made)
    lines = report.lines(verbose=True)
    assert lines[0].endswith(f"{len(source) - 2} tensors used, 2 dropped, 3 initialised")
    for name in [*source, *report.made]:
        assert any(line.split()[1] == name for line in lines[1:])
    assert report.lines()[0].endswith("(--verbose names them)")
    assert len(report.lines()) == 1


def test_stage_1_continues_as_stage_1(pretrainer: Path) -> None:
    same, other = _encoder(128, stage=1, seed=1), _encoder(64, stage=1, seed=1)
    fill_encoder(same, pretrainer)
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in _state(_encoder(128, stage=1)).items())
    report = fill_encoder(other, pretrainer)
    assert report.dropped["encoder.pos_embed"] == "fixed by the image size"
    assert set(report.made) == {"pos_embed"}
    assert torch.equal(other.pos_embed, sincos_position_embedding(D, 4))


# -- stage 2 to 3 ------------------------------------------------------------------------------------------------


def test_an_equal_encoder_is_copied(tmp_path: Path) -> None:
    source, encoder = _encoder(), _encoder(seed=1)
    save_encoder(tmp_path, source)
    report = fill_encoder(encoder, tmp_path)
    state = _state(source)
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in state.items())
    assert report.used == dict.fromkeys(state, "")
    assert not report.dropped
    assert not report.made
    assert json.loads((tmp_path / "encoder.json").read_text()) == {
        "format": 1,
        "kind": "encoder",
        "d_model": D,
        "depth": DEPTH,
        "d_state": N,
        "image_size": 64,
    }


@pytest.mark.parametrize(("old", "new"), [(64, 112), (112, 64), (64, 80), (80, 64)])
def test_another_image_size_keeps_the_row_of_the_class_token(tmp_path: Path, old: int, new: int) -> None:
    source, encoder = _encoder(old), _encoder(new, seed=1)
    save_encoder(tmp_path, source)
    fill_encoder(encoder, tmp_path / "encoder.safetensors")
    one, other = source.pos_embed.detach()[0], encoder.pos_embed.detach()[0]
    a, b = old // 16, new // 16
    assert torch.equal(other[b * b // 2], one[a * a // 2])
    patches = torch.cat([one[: a * a // 2], one[a * a // 2 + 1 :]]).T.reshape(1, D, a, a)
    expected = F.interpolate(patches, (b, b), mode="bicubic")[0].flatten(1).T
    torch.testing.assert_close(torch.cat([other[: b * b // 2], other[b * b // 2 + 1 :]]), expected)


def test_a_constant_position_embedding_stays_constant() -> None:
    positions = torch.full((1, 145, 3), 0.5)
    positions[0, 72] = 7
    found = fit_positions(positions, 14, class_token=True)
    expected = torch.full((1, 197, 3), 0.5)
    expected[0, 98] = 7
    torch.testing.assert_close(found, expected)


def test_half_precision_sources_fill_full_precision(tmp_path: Path) -> None:
    source = {name: tensor.bfloat16() for name, tensor in _state(_encoder()).items()}
    save_file(source, tmp_path / "encoder.safetensors")
    encoder = _encoder(112, seed=1)
    fill_encoder(encoder, tmp_path)
    assert {tensor.dtype for tensor in encoder.state_dict().values()} == {torch.float32}
    assert torch.equal(encoder.norm_f.weight.detach(), source["norm_f.weight"].float())


# -- where an encoder is found -----------------------------------------------------------------------------------


def test_runs_and_files_of_every_stage(tmp_path: Path, pretrainer: Path) -> None:
    encoder = _encoder()
    (tmp_path / "pretrain").mkdir()
    shutil.copytree(pretrainer, tmp_path / "pretrain/model")
    (tmp_path / "align/model").mkdir(parents=True)
    save_encoder(tmp_path / "align/model", encoder)
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "align/model/alignment.safetensors")
    (tmp_path / "frozen").mkdir()
    save_encoder(tmp_path / "frozen", encoder)
    (tmp_path / "frozen/model").mkdir()
    save_file({"bridge.norm.bias": torch.zeros(3)}, tmp_path / "frozen/model/bridge.safetensors")
    (tmp_path / "frozen/checkpoints/step-1").mkdir(parents=True)
    save_file({"x": torch.zeros(3)}, tmp_path / "frozen/checkpoints/step-1/trainable.safetensors")
    for path, others in {
        "pretrain": {"ar_token", "blocks.0.attn.q.weight"},
        "pretrain/model": {"ar_token", "blocks.0.attn.q.weight"},
        "pretrain/model/pretrainer.safetensors": {"ar_token", "blocks.0.attn.q.weight"},
        "align": {"model/alignment.safetensors:logit_scale"},
        "align/model": {"alignment.safetensors:logit_scale"},
        "align/model/encoder.safetensors": set(),
        "frozen": {"model/bridge.safetensors:bridge.norm.bias"},
    }.items():
        source = encoder_source(tmp_path / path)
        assert set(source.others) == others, path
        expected = (128, 1, False) if "pretrain" in path else (64, 4, True)
        config = source.config
        assert (config.image_size, config.directions, config.class_token) == expected
        assert (config.d_model, config.depth, config.d_state) == (D, DEPTH, N)


def test_adapters_are_not_merged_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_encoder(tmp_path, _encoder())
    adapters = tmp_path / "model/adapters/encoder"
    adapters.mkdir(parents=True)
    save_file({"lora_A.weight": torch.zeros(2)}, adapters / "adapter_model.safetensors")
    report = fill_encoder(_encoder(seed=1), tmp_path)
    assert "adapters are not used" in report.lines()[1]
    assert set(report.dropped) == {"model/adapters/encoder/adapter_model.safetensors:lora_A.weight"}
    emrrg_cli.load_encoder(tmp_path)
    assert "adapters are not used" in capsys.readouterr().err


def test_load_encoder_is_the_encoder_that_was_saved(tmp_path: Path) -> None:
    encoder = _encoder(80).eval()
    save_encoder(tmp_path, encoder)
    images = torch.randn(2, 3, 80, 80)
    loaded = emrrg_cli.load_encoder(str(tmp_path))
    assert not loaded.training
    assert torch.equal(loaded(images), encoder(images))
    reference = emrrg_cli.load_encoder(tmp_path, scan="reference")
    assert reference.layers[0].mixer.engine == "reference"


def test_load_encoder_of_stage_1_equals_the_start_of_stage_2(pretrainer: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, other = emrrg_cli.load_encoder(pretrainer), emrrg_cli.load_encoder(pretrainer)
    assert torch.equal(torch.get_rng_state(), before)
    images = torch.randn(1, 3, 128, 128)
    out = one(images)
    assert out.shape == (1, 65, D)
    assert torch.equal(out, other(images))


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"d_model": 48}, "width 32, the model has 48"),
        ({"depth": 3}, "depth 2, the model has 3"),
        ({"d_state": 8, "depth": 1}, "depth 2, the model has 1; state size 4, the model has 8"),
    ],
)
def test_other_sizes_are_one_message(tmp_path: Path, sizes: dict[str, int], told: str) -> None:
    save_encoder(tmp_path, _encoder())
    with pytest.raises(UsageError, match=f"another size: {told}\n") as refused:
        fill_encoder(_encoder(**sizes), tmp_path)
    assert refused.value.hint is not None
    assert "model.encoder" in refused.value.hint


def test_stage_1_does_not_start_from_stage_2(tmp_path: Path) -> None:
    save_encoder(tmp_path, _encoder())
    with pytest.raises(UsageError, match="has 4 scan directions, the model has 1"):
        fill_encoder(_encoder(stage=1), tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("norm_f.weight"), "norm_f.weight is missing"),
        (lambda s: (s.pop("cls_token"), s.update(pos_embed=torch.zeros(1, 16, 32))), "cls_token is missing"),
        (lambda s: s.pop("layers.1.mixer.D"), "layers.1.mixer.D is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda s: s.update({"layers.0.mixer.D": torch.zeros(4, 31)}), r"mixer.D is \[4, 31\], expected \[4, 32\]"),
        (lambda s: s.pop("patch_embed.weight"), "not an encoder: patch_embed.weight is missing"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 16, 32)), "15 patches, which is not a square number"),
    ],
)
def test_unfit_tensors_are_named(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], told: str) -> None:
    state = _state(_encoder())
    change(state)
    save_file(state, tmp_path / "encoder.safetensors")
    encoder = _encoder(seed=1)
    before = _state(encoder)
    with pytest.raises((RunError, UsageError), match=told):
        fill_encoder(encoder, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_misshapen_stage_1_tensors_are_named_with_shapes(pretrainer: Path) -> None:
    file = pretrainer / "pretrainer.safetensors"
    state = load_file(file)
    state["encoder.layers.0.mixer.D"] = torch.zeros(1, 31)
    save_file(state, file)
    with pytest.raises(RunError, match=r"encoder.layers.0.mixer.D is \[1, 31\], expected \[1, 32\]$"):
        fill_encoder(_encoder(64), pretrainer)


def test_paths_without_an_encoder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/recipe.yaml").touch()
    torch.save({"model": {}}, tmp_path / "stage2.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"not one")
    save_file({"visual_encoder.cls_token": torch.zeros(1)}, tmp_path / "published.safetensors")
    for name, told in {
        "nowhere": "no such file or directory, expected an encoder",
        "empty": "there is no encoder in this directory",
        "begun": "this run has not exported an encoder yet",
        "stage2.pth": "not a safetensors file but a PyTorch checkpoint",
        "broken.safetensors": "not a readable safetensors file",
        "published.safetensors": "has the published layout",
    }.items():
        with pytest.raises((UsageError, RunError), match=f"{name}: .*{told}"):
            encoder_source(tmp_path / name)


# -- finetune from any of them -----------------------------------------------------------------------------------


def test_finetune_starts_from_stage_1_by_path(
    tiny_overrides: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    stage1 = ArmEncoder(16, 2, 64, 4, directions=1, class_token=False, final_norm=False)
    (tmp_path / "pre/model").mkdir(parents=True)
    state = {f"encoder.{name}": tensor for name, tensor in stage1.state_dict().items()}
    save_file(state | {"ar_token": torch.zeros(1)}, tmp_path / "pre/model/pretrainer.safetensors")
    options = (f"model.encoder.weights={tmp_path / 'pre'}", "model.adapter.targets=none", "train.epochs=1")
    run = tmp_path / "run"
    assert main(["finetune", "tiny/finetune", *tiny_overrides, *options, "-o", str(run), "--verbose"]) == 0
    told = capsys.readouterr().err
    assert "47 tensors used, 1 dropped, 3 initialised" in told
    assert "dropped  ar_token" in told
    frozen = load_file(run / "encoder.safetensors")
    assert torch.equal(frozen["layers.1.mixer.X.weight"], state["encoder.layers.1.mixer.X.weight"])
    # And that run is itself a place to start from, with less said.
    options = (f"model.encoder.weights={run}", "model.adapter.targets=full", "train.epochs=1")
    assert main(["finetune", "tiny/finetune", *tiny_overrides, *options, "-o", str(tmp_path / "next")]) == 0
    told = capsys.readouterr().err
    assert f"encoder from {run / 'encoder.safetensors'}: 80 tensors used" in told
    assert "dropped  " not in told
    # Of another size: one message, and nothing left behind.
    options = ("model.encoder={d_model: 32, depth: 2, image_size: 32}", f"model.encoder.weights={run}")
    assert main(["finetune", "tiny/finetune", *tiny_overrides, *options, "-o", str(tmp_path / "wrong")]) == 2
    told = capsys.readouterr().err
    assert "this encoder is of another size: width 16, the model has 32" in told
    assert "model.encoder.size=null model.encoder.d_model=16 model.encoder.depth=" in told
    assert not (tmp_path / "wrong").exists()
