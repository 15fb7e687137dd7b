"""The vision backbone: sizes, token order, class token, stochastic depth, checkpointing, precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from emrrg_cli.models.arm.encoder import ArmEncoder, cluster_order, direction_orders, sincos_position_embedding
from emrrg_cli.models.build import build_encoder
from emrrg_cli.recipe.common import EncoderSettings


def _encoder(image_size: int = 64, depth: int = 2, drop_path: float = 0.0, **options: str) -> ArmEncoder:
    torch.manual_seed(0)
    return ArmEncoder(32, depth, image_size=image_size, d_state=4, drop_path=drop_path, **options)


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 5, 12, 14, 21])
def test_orders_are_permutations_around_the_class_token(grid: int) -> None:
    orders = direction_orders(grid)
    patches, middle = grid * grid, grid * grid // 2
    assert orders.shape == (4, patches + 1)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(patches + 1).expand(4, -1))
    assert orders[0, middle] == orders[2, middle] == middle  # in the middle, forwards
    assert orders[1, patches - middle] == orders[3, patches - middle] == middle  # and backwards
    assert torch.equal(orders[1], orders[0].flip(0))
    assert torch.equal(orders[3], orders[2].flip(0))
    assert orders[0].tolist() == list(range(patches + 1))
    # Without the class token the column order is the transposed grid.
    columns = [token - (token > middle) for token in orders[2].tolist() if token != middle]
    assert columns == [row * grid + column for column in range(grid) for row in range(grid)]


def test_column_order_of_a_small_grid() -> None:
    # patches 0 1 / 2 3; tokens 0 1 (2 = class) 3 4
    assert direction_orders(2)[2].tolist() == [0, 3, 2, 1, 4]


@pytest.mark.parametrize("size", [32, 48, 64, 80, 112])
def test_output_is_every_token(size: int) -> None:
    encoder = _encoder(size).eval()
    out = encoder(torch.randn(2, 3, size, size))
    assert out.shape == (2, (size // 16) ** 2 + 1, 32)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.mean(-1), torch.zeros(out.shape[:2]), rtol=0, atol=1e-5)  # the final norm


@pytest.mark.parametrize("size", [48, 64])
def test_tokens_enter_in_row_order_class_token_in_the_middle(size: int) -> None:
    encoder = _encoder(size).eval()
    entered: list[Tensor] = []
    encoder.layers[0].register_forward_pre_hook(lambda module, args: entered.append(args[0].detach()))
    images = torch.randn(2, 3, size, size)
    encoder(images)
    tokens = entered[0] - encoder.pos_embed.detach()
    grid = size // 16
    middle = grid * grid // 2
    torch.testing.assert_close(tokens[:, middle], encoder.cls_token.detach()[0].expand(2, -1))
    patches = torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1)
    weight, bias = encoder.patch_embed.weight.detach(), encoder.patch_embed.bias.detach()
    for row in range(grid):
        for column in range(grid):
            crop = images[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            expected = crop.flatten(1) @ weight.flatten(1).T + bias
            torch.testing.assert_close(patches[:, row * grid + column], expected, rtol=1e-4, atol=1e-5)


def test_position_embedding_is_added_to_the_class_token_too() -> None:
    encoder = _encoder().eval()
    images = torch.randn(1, 3, 64, 64)
    before = encoder(images)
    with torch.no_grad():
        encoder.pos_embed[:, 8] += 1
        encoder.cls_token -= 1
    torch.testing.assert_close(encoder(images), before)


@pytest.mark.parametrize(("depth", "rate"), [(1, 0.1), (3, 0.2), (12, 0.1)])
def test_stochastic_depth_rates(depth: int, rate: float) -> None:
    with torch.device("meta"):
        encoder = ArmEncoder(16, depth, drop_path=rate)
    step = rate / (depth - 1) if depth > 1 else 0
    expected = [0.0, *(step * i for i in range(depth))][:depth]  # block i takes entry i of [0] + linspace
    assert [layer.drop_path for layer in encoder.layers] == pytest.approx(expected)


def test_stochastic_depth_is_only_for_training() -> None:
    encoder = _encoder(depth=4, drop_path=0.5)
    images = torch.randn(1, 3, 64, 64).expand(16, -1, -1, -1)
    outputs = encoder.train()(images)
    assert len({round(float(out.detach().abs().sum()), 2) for out in outputs}) > 4
    outputs = encoder.eval()(images)
    torch.testing.assert_close(outputs, outputs[:1].expand_as(outputs))


def _published_shapes(d: int, depth: int, rank: int, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 197, d),
        "patch_embed.weight": (d, 3, 16, 16),
        "patch_embed.bias": (d,),
        "norm_f.weight": (d,),
        "norm_f.bias": (d,),
    }
    for i in range(depth):
        block: dict[str, tuple[int, ...]] = {
            "norm1.weight": (d,),
            "norm1.bias": (d,),
            "norm2.weight": (d,),
            "norm2.bias": (d,),
            "mixer.X.weight": (d, d),
            "mixer.Z.weight": (d, d),
            "mixer.conv_weight": (4, d, 4),
            "mixer.conv_bias": (4, d),
            "mixer.A_log": (4, d, 16),
            "mixer.D": (4, d),
            "mixer.out_proj.weight": (d, d),
        }
        for k in range(4):
            block |= {
                f"mixer.directions.{k}.dt.weight": (rank, d),
                f"mixer.directions.{k}.B.weight": (16, d),
                f"mixer.directions.{k}.C.weight": (16, d),
                f"mixer.directions.{k}.dt_proj.weight": (d, rank),
                f"mixer.directions.{k}.dt_proj.bias": (d,),
            }
        for name, shape in {"w1": (hidden, d), "w2": (hidden, d), "w3": (d, hidden)}.items():
            block |= {f"mlp.{name}.weight": shape, f"mlp.{name}.bias": shape[:1]}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in block.items()}
    return shapes


@pytest.mark.parametrize(
    ("size", "d", "depth", "rank", "hidden"),
    [("base", 768, 12, 48, 2048), ("large", 1024, 24, 64, 2730), ("huge", 1536, 24, 96, 4096)],
)
def test_published_sizes(size: str, d: int, depth: int, rank: int, hidden: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(EncoderSettings(size=size))
    found = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert found == _published_shapes(d, depth, rank, hidden)
    assert encoder.norm_f.eps == encoder.layers[0].norm1.eps == encoder.layers[-1].norm2.eps == 1e-5


def test_settings_reach_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EncoderSettings(size=None, d_model=48, depth=3, d_state=8, image_size=96, drop_path=0.3)
    encoder = build_encoder(settings, "reference")
    assert (encoder.d_model, len(encoder.layers), encoder.image_size, encoder.grid) == (48, 3, 96, 6)
    assert encoder.layers[0].mixer.A_log.shape[-1] == 8
    assert encoder.layers[2].drop_path == pytest.approx(0.15)
    assert all(layer.mixer.engine == "reference" for layer in encoder.layers)


def test_initialisation() -> None:
    encoder = _encoder(image_size=224, depth=4)
    assert 0.015 < float(encoder.pos_embed.detach().std()) < 0.025
    assert float(encoder.cls_token.detach().abs().max()) > 0
    largest = float(encoder.layers[0].mixer.out_proj.weight.detach().abs().max())
    assert 0.9 < largest * (32 * 4) ** 0.5 <= 1 + 1e-6  # divided by sqrt(depth)


def test_images_of_another_size_are_refused() -> None:
    encoder = _encoder(64)
    for shape in ((2, 3, 48, 48), (2, 1, 64, 64), (2, 3, 64, 80)):
        with pytest.raises(ValueError, match=r"images must be \[b, 3, 64, 64\], got \[2, "):
            encoder(torch.zeros(shape))
    with pytest.raises(ValueError, match="multiple of 16, got 100"):
        ArmEncoder(32, 1, image_size=100)


@pytest.mark.parametrize("engine", ["reference", "recompute"])
def test_checkpointing_changes_no_gradient(engine: str) -> None:
    encoder = _encoder(depth=3, drop_path=0.5, scan=engine).train()
    images = torch.randn(4, 3, 64, 64)
    weight = torch.randn(4, 17, 32)

    def gradients(checkpointing: bool) -> tuple[list[Tensor], int]:
        encoder.gradient_checkpointing = checkpointing
        calls: list[int] = []
        handle = encoder.layers[1].mixer.register_forward_hook(lambda *args: calls.append(1))
        torch.manual_seed(7)  # the same samples are dropped
        loss = (encoder(images) * weight).sum()
        result = torch.autograd.grad(loss, list(encoder.parameters()))
        handle.remove()
        return list(result), len(calls)

    plain, once = gradients(False)
    checkpointed, twice = gradients(True)
    assert (once, twice) == (1, 2)
    assert all(torch.equal(one, other) for one, other in zip(plain, checkpointed, strict=True))
    with torch.no_grad():
        encoder(images)


def test_bf16_autocast_is_close_to_fp32_and_trains() -> None:
    encoder = _encoder()
    images = torch.randn(2, 3, 64, 64)
    exact = encoder(images).detach()
    with torch.autocast("cpu", torch.bfloat16):
        ours = encoder(images)
    assert float((ours.detach().float() - exact).norm() / exact.norm()) < 0.02
    ours.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in encoder.parameters())
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)


def test_engines_agree() -> None:
    images = torch.randn(2, 3, 80, 80)
    torch.testing.assert_close(
        _encoder(80, scan="reference")(images), _encoder(80, scan="recompute")(images), rtol=1e-5, atol=1e-5
    )


def test_state_dict_has_only_parameters() -> None:
    encoder = _encoder()
    assert set(encoder.state_dict()) == {name for name, _ in encoder.named_parameters()}


# -- stage 1 -----------------------------------------------------------------------------------------------------


def _first_stage(image_size: int = 128, depth: int = 3, scan: str = "auto") -> ArmEncoder:
    torch.manual_seed(0)
    return ArmEncoder(
        32,
        depth,
        image_size=image_size,
        d_state=4,
        drop_path=0.0,
        scan=scan,
        directions=1,
        class_token=False,
        final_norm=False,
    )


def test_sincos_embedding_counts_columns_first() -> None:
    table = sincos_position_embedding(16, 3)
    assert table.shape == (1, 9, 16)
    assert table.dtype == torch.float32
    for row in range(3):
        for column in range(3):
            expected = []
            for position in (column, row):
                angles = [position / 10000 ** (i / 4) for i in range(4)]
                expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            assert table[0, 3 * row + column].tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="multiple of 4, got 18"):
        sincos_position_embedding(18, 3)


@pytest.mark.parametrize("grid", [4, 8, 12, 16])
def test_cluster_order(grid: int) -> None:
    expected = []
    for cluster_row in range(grid // 4):
        for cluster_column in range(grid // 4):
            for row in range(4):
                for column in range(4):
                    expected.append((4 * cluster_row + row) * grid + 4 * cluster_column + column)
    assert cluster_order(grid).tolist() == expected


def test_the_encoder_of_stage_1_scans_clusters_and_returns_rows() -> None:
    encoder = _first_stage().eval()
    names = {name.partition(".")[0] for name in encoder.state_dict()}
    assert names == {"patch_embed", "pos_embed", "layers"}
    assert not isinstance(encoder.pos_embed, torch.nn.Parameter)
    assert all(parameter.shape[0] == 1 for name, parameter in encoder.named_parameters() if name.endswith("A_log"))
    images = torch.randn(2, 3, 128, 128)
    out = encoder(images)
    assert out.shape == (2, 64, 32)
    order = cluster_order(8)
    (gathered,) = encoder.blocks(encoder.embed(images)[:, order], torch.arange(64)[None], taps=[3])
    torch.testing.assert_close(out[:, order], gathered, rtol=1e-5, atol=1e-5)


def test_taps_are_outputs_of_the_blocks_counted_from_1() -> None:
    encoder = _first_stage().eval()
    outputs: list[Tensor] = []
    for layer in encoder.layers:
        layer.register_forward_hook(lambda module, args, out: outputs.append(out))
    first, last = encoder.blocks(torch.randn(1, 16, 32), torch.arange(16)[None], taps=[1, 3])
    assert len(outputs) == 3
    assert torch.equal(first, outputs[0])
    assert torch.equal(last, outputs[2])


def test_unsupported_combinations_are_refused() -> None:
    with pytest.raises(ValueError, match="four directions need a class token"):
        ArmEncoder(32, 1, image_size=64, directions=1)
    with pytest.raises(ValueError, match="four directions need a class token"):
        ArmEncoder(32, 1, image_size=64, class_token=False)
    with pytest.raises(ValueError, match="image_size must be a multiple of 64 for clusters, got 96"):
        _first_stage(96)
