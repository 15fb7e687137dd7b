"""Stage 1: parity with a slow, literal reading of the published description, causality, and the exported file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.models.arm.pretrainer import ArmPretrainer, default_taps, load_pretrainer, save_pretrainer


def _model(image_size: int = 192, width: int = 128, depth: int = 5, blocks: int = 3, seed: int = 0) -> ArmPretrainer:
    torch.manual_seed(seed)
    model = ArmPretrainer(32, depth, image_size, d_state=4, decoder_width=width, decoder_depth=blocks)
    with torch.no_grad():
        # Away from the initialisation, where much is 0 or 1 and steps are so small that the state hardly counts.
        for name, parameter in model.named_parameters():
            if "mixer" in name or name.endswith("bias") or "norm" in name or name == "ar_token":
                parameter += 0.2 * torch.randn_like(parameter)
            if name.endswith("dt_proj.bias"):
                parameter += 4
    return model.eval()


# -- a literal reading -------------------------------------------------------------------------------------------


def _clusters(image_size: int) -> list[list[tuple[int, int]]]:
    """Patches (row, column) of each cluster."""
    side = image_size // 64
    return [
        [(4 * down + row, 4 * right + column) for row in range(4) for column in range(4)]
        for down in range(side)
        for right in range(side)
    ]


def _norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def _linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    out = x @ state[f"{name}.weight"].T
    return out + state[f"{name}.bias"] if f"{name}.bias" in state else out


def _position(row: int, column: int, width: int) -> Tensor:
    values: list[float] = []
    for place in (column, row):
        angles = [place / 10000 ** (i / (width // 4)) for i in range(width // 4)]
        values += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(values, dtype=torch.float64)


def _mixer(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """One sequence `[t, d]`, one direction."""
    u, z = _linear(x, state, f"{name}.X"), _linear(x, state, f"{name}.Z")
    kernel, bias = state[f"{name}.conv_weight"][0], state[f"{name}.conv_bias"][0]
    A, D = -state[f"{name}.A_log"][0].exp(), state[f"{name}.D"][0]
    convolved = []
    for t in range(len(u)):
        total = bias
        for back in range(4):
            if t - back >= 0:
                total = total + kernel[:, 3 - back] * u[t - back]
        convolved.append(F.silu(total))
    direction = f"{name}.directions.0"
    h = torch.zeros_like(A)
    out = []
    for v in convolved:
        dt = F.softplus(_linear(_linear(v, state, f"{direction}.dt"), state, f"{direction}.dt_proj"))
        B, C = _linear(v, state, f"{direction}.B"), _linear(v, state, f"{direction}.C")
        h = torch.exp(dt[:, None] * A) * h + (dt * v)[:, None] * B[None]
        out.append(h @ C + D * v)
    return _linear(torch.stack(out) * F.silu(z), state, f"{name}.out_proj")


def _literal(
    image: Tensor, state: dict[str, Tensor], taps: tuple[int, ...], depth: int, width: int
) -> tuple[Tensor, Tensor]:
    """Loss and prediction `[l - 16, 768]` of one image `[3, h, w]`."""
    clusters = _clusters(image.shape[-1])
    d = state["encoder.patch_embed.weight"].shape[0]

    def patch(place: tuple[int, int]) -> Tensor:
        row, column = place
        return image[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]

    kernel = state["encoder.patch_embed.weight"]
    x = torch.stack(
        [
            (kernel * patch(place)).sum((1, 2, 3)) + state["encoder.patch_embed.bias"] + _position(*place, d)
            for cluster in clusters[:-1]
            for place in cluster
        ]
    )
    tapped = []
    for i in range(depth):
        name = f"encoder.layers.{i}"
        x = x + _mixer(_norm(x, state, f"{name}.norm1"), state, f"{name}.mixer")
        y = _norm(x, state, f"{name}.norm2")
        gate = F.silu(_linear(y, state, f"{name}.mlp.w1")) * _linear(y, state, f"{name}.mlp.w2")
        x = x + _linear(gate, state, f"{name}.mlp.w3")
        if i + 1 in taps:
            tapped.append(_norm(x, state, f"tap_norms.{len(tapped)}"))
    memory = _linear(torch.cat(tapped, -1), state, "enc2dec").reshape(len(x), width, len(taps))

    heads = width // 64
    places = [place for cluster in clusters[1:] for place in cluster]
    q = torch.stack([state["ar_token"][0, 0] + _position(*place, width) for place in places])
    for j in range(len(taps)):
        name = f"blocks.{j}"
        asked = _linear(_norm(q, state, f"{name}.norm_q"), state, f"{name}.attn.q")
        kv = _linear(_norm(memory[..., j], state, f"{name}.norm_kv"), state, f"{name}.attn.kv")
        keys, values = kv[:, :width], kv[:, width:]
        rows = []
        for t in range(len(q)):
            seen = 16 * (t // 16 + 1)  # clusters 0..c for a patch of cluster c + 1
            parts = []
            for head in range(heads):
                at = slice(64 * head, 64 * head + 64)
                weights = (keys[:seen, at] @ asked[t, at] / 8).softmax(0)
                parts.append(weights @ values[:seen, at])
            rows.append(torch.cat(parts))
        q = q + _linear(torch.stack(rows), state, f"{name}.attn.proj")
        hidden = _linear(_norm(q, state, f"{name}.norm_mlp"), state, f"{name}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        q = q + _linear(hidden, state, f"{name}.mlp.fc2")
    prediction = _linear(_norm(q, state, "norm"), state, "head")

    errors = []
    for t, place in enumerate(places):
        pixels = torch.stack(
            [patch(place)[channel, row, column] for row in range(16) for column in range(16) for channel in range(3)]
        )
        mean = pixels.mean()
        variance = (pixels - mean).square().sum() / 767
        errors.append((prediction[t] - (pixels - mean) / (variance + 1e-6).sqrt()).square().mean())
    return torch.stack(errors).mean(), prediction


@pytest.mark.slow
@pytest.mark.parametrize(("image_size", "width", "depth", "blocks"), [(128, 128, 3, 2), (192, 64, 4, 4)])
def test_forward_and_every_gradient_equal_the_literal_reading(
    image_size: int, width: int, depth: int, blocks: int
) -> None:
    model = _model(image_size, width, depth, blocks).double()
    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    out = model(images)
    ours = torch.autograd.grad(out.loss, list(parameters.values()))

    losses, predictions = zip(*(_literal(image, parameters, model.taps, depth, width) for image in images), strict=True)
    expected = torch.stack(losses).mean()
    theirs = torch.autograd.grad(expected, list(parameters.values()))
    # The loss is taken in fp32, positions are kept in it.
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.prediction, torch.stack(predictions), rtol=1e-5, atol=1e-5)
    for name, one, other in zip(parameters, ours, theirs, strict=True):
        scale = float(other.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            one, other, rtol=1e-4, atol=1e-5 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


# -- what depends on what ----------------------------------------------------------------------------------------


def _one_cluster(image_size: int, cluster: int) -> tuple[slice, slice]:
    side = image_size // 64
    row, column = divmod(cluster, side)
    return slice(64 * row, 64 * row + 64), slice(64 * column, 64 * column + 64)


def test_a_cluster_is_predicted_only_from_earlier_clusters() -> None:
    model = _model()
    images = torch.randn(1, 3, 192, 192)
    with torch.no_grad():
        before = model(images).prediction.view(8, 16, -1)
        for changed in range(9):
            rows, columns = _one_cluster(192, changed)
            other = images.clone()
            other[:, :, rows, columns] += torch.randn(1, 3, 64, 64)
            differs = (model(other).prediction.view(8, 16, -1) != before).flatten(1).any(1).tolist()
            # Place i holds the prediction of cluster i + 1: it changes from that cluster on; the last is never seen.
            assert differs == [i >= changed for i in range(8)], changed


def test_gradient_reaches_every_parameter_and_seen_pixel() -> None:
    model = _model()
    images = torch.randn(1, 3, 192, 192, requires_grad=True)
    model.decode(model.encode(images)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
    assert images.grad is not None
    rows, columns = _one_cluster(192, 8)
    seen = torch.ones(192, 192, dtype=torch.bool)
    seen[rows, columns] = False
    assert bool((images.grad[0].abs().sum(0) > 0)[seen].all())
    assert not images.grad[0][:, ~seen].any()


def test_targets_are_normalised_and_flat_patches_are_finite() -> None:
    model = _model(128)
    images = torch.randn(2, 3, 128, 128) * 3 + 1
    images[0] = 0.5
    target, mean, deviation = model.targets(images)
    assert target.shape == (2, 48, 768)
    assert not target[0].any()
    torch.testing.assert_close(target[1].var(-1), torch.ones(48), rtol=1e-5, atol=1e-5)
    patches = target * deviation + mean
    # The first token is the patch at the top left of the second cluster; a patch is row, column, channel.
    first = patches[1, 0].view(16, 16, 3).permute(2, 0, 1)
    torch.testing.assert_close(first, images[1, :, 0:16, 64:80], rtol=1e-5, atol=1e-5)
    second_row = patches[1, 4].view(16, 16, 3).permute(2, 0, 1)
    torch.testing.assert_close(second_row, images[1, :, 16:32, 64:80], rtol=1e-5, atol=1e-5)


def test_patches_are_pasted_where_they_came_from() -> None:
    model = _model()
    images = torch.randn(2, 3, 192, 192)
    target, mean, deviation = model.targets(images)
    patches = target * deviation + mean
    torch.testing.assert_close(model.paste(patches, onto=images), images, rtol=1e-5, atol=1e-5)
    alone = model.paste(patches)
    assert not alone[:, :, :64, :64].any()
    torch.testing.assert_close(alone[:, :, 64:], images[:, :, 64:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone[:, :, :64, 64:], images[:, :, :64, 64:], rtol=1e-5, atol=1e-5)


def test_loss_is_a_mean_over_images_tokens_and_pixels() -> None:
    model = _model(128)
    images = torch.randn(3, 3, 128, 128)
    with torch.no_grad():
        one_by_one = torch.stack([model(image[None]).loss for image in images])
        torch.testing.assert_close(model(images).loss, one_by_one.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_training_on_one_batch_brings_the_loss_down() -> None:
    torch.manual_seed(0)
    model = ArmPretrainer(32, 4, 128, d_state=4, decoder_width=32)
    ramp = torch.linspace(-1, 1, 128)
    images = (ramp[:, None] * ramp[None, :])[None, None].expand(2, 3, -1, -1).contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = model(images).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


# -- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "count", "expected"),
    [
        (12, 4, (6, 8, 10, 12)),
        (24, 4, (12, 16, 20, 24)),
        (4, 4, (1, 2, 3, 4)),
        (6, 4, (3, 4, 5, 6)),
        (8, 2, (4, 8)),
        (3, 1, (3,)),
    ],
)
def test_default_taps(depth: int, count: int, expected: tuple[int, ...]) -> None:
    assert default_taps(depth, count) == expected


@pytest.mark.parametrize("depth", range(4, 40))
def test_default_taps_rise_to_the_last_block(depth: int) -> None:
    taps = default_taps(depth)
    assert len(set(taps)) == 4
    assert list(taps) == sorted(taps)
    assert taps[0] >= 1
    assert taps[-1] == depth


@pytest.mark.parametrize(("size", "d", "depth"), [("base", 768, 12), ("large", 1024, 24)])
def test_published_shapes(size: str, d: int, depth: int) -> None:
    with torch.device("meta"):
        model = ArmPretrainer(d, depth)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if "layers" not in name}
    assert shapes["encoder.pos_embed"] == [1, 144, d]
    assert shapes["dec_pos_embed"] == [1, 144, 512]
    assert shapes["ar_token"] == [1, 1, 512]
    assert shapes["enc2dec.weight"] == [2048, 4 * d]
    assert shapes["blocks.3.attn.kv.weight"] == [1024, 512]
    assert shapes["head.weight"] == [768, 512]
    assert model.blocks[0].attn.heads == 8
    tops = {name.split(".")[0] for name in shapes}
    assert tops == {"encoder", "dec_pos_embed", "ar_token", "tap_norms", "enc2dec", "blocks", "norm", "head"}
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-5}


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 128, so that a cluster is predicted; got 64"):
        ArmPretrainer(32, 4, 64)
    with pytest.raises(ValueError, match="multiple of 64 for clusters, got 160"):
        ArmPretrainer(32, 4, 160)
    with pytest.raises(ValueError, match="decoder_width must be a multiple of 64"):
        ArmPretrainer(32, 4, 128, decoder_width=96)
    with pytest.raises(ValueError, match="too shallow"):
        ArmPretrainer(32, 3, 128)
    for taps in ([1, 2, 3], [1, 2, 2, 4], [4, 3, 2, 1], [0, 1, 2, 3], [2, 3, 4, 5]):
        with pytest.raises(ValueError, match="taps must be 4 blocks from 1 to 4 in rising order"):
            ArmPretrainer(32, 4, 128, taps=taps)
    assert ArmPretrainer(32, 4, 128, decoder_width=32).blocks[0].attn.heads == 1


def test_bf16_autocast_is_close_to_fp32() -> None:
    model = _model(128)
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images)
    assert half.loss.dtype == torch.float32
    assert float((half.loss - exact.loss).abs() / exact.loss) < 0.02


# -- the exported file -------------------------------------------------------------------------------------------


def test_a_saved_model_reads_back_from_directory_and_run(tmp_path: Path) -> None:
    model = _model(128)
    save_pretrainer(tmp_path / "run" / "model", model)
    assert {file.name for file in (tmp_path / "run" / "model").iterdir()} == {
        "pretrainer.safetensors",
        "pretrainer.json",
        "checksums.json",
    }
    config = json.loads((tmp_path / "run" / "model" / "pretrainer.json").read_text())
    assert config == {
        "format": 1,
        "kind": "pretrainer",
        "d_model": 32,
        "depth": 5,
        "d_state": 4,
        "image_size": 128,
        "decoder_width": 128,
        "decoder_depth": 3,
        "taps": [3, 4, 5],
    }
    images = torch.randn(1, 3, 128, 128)
    for path in (tmp_path / "run", str(tmp_path / "run" / "model")):
        loaded = load_pretrainer(path)
        assert not loaded.training
        assert torch.equal(loaded(images).prediction, model(images).prediction)


def test_a_directory_without_or_with_a_broken_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contains no pre-trained model of stage 1"):
        load_pretrainer(tmp_path)
    save_pretrainer(tmp_path, _model(128))
    good = json.loads((tmp_path / "pretrainer.json").read_text())
    for change, said in (
        ({"depth": 6}, r"the weights do not fit .*encoder\.layers\.5"),
        ({"format": 2}, "cannot be used: this version cannot read this format"),
        ({"image_size": 100}, "cannot be used: image_size must be"),
        ({"extra": 1}, "cannot be used: .*extra"),
    ):
        (tmp_path / "pretrainer.json").write_text(json.dumps(good | change))
        with pytest.raises(RunError, match=said):
            load_pretrainer(tmp_path)
    (tmp_path / "pretrainer.json").write_text("{")
    with pytest.raises(RunError, match="cannot be used"):
        load_pretrainer(tmp_path)
