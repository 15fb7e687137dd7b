"""The mixer against a literal reading of SPEC 1: four calls, one a direction, each on its own flipped copy."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emrrg_cli.models.adapters import encoder_lora
from emrrg_cli.models.arm.encoder import ArmEncoder, direction_orders
from emrrg_cli.models.arm.mixer import Block, Direction, Mixer, SwiGLU

ENGINES = ["reference", "recompute"]


def _transposed(tokens: Tensor) -> Tensor:
    """`[b, g*g + 1, d]`: the patch grid transposed, the class token in the middle before and after."""
    b, length, d = tokens.shape
    grid, middle = math.isqrt(length - 1), (length - 1) // 2
    cls = tokens[:, middle : middle + 1]
    patches = torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1)
    patches = patches.reshape(b, grid, grid, d).transpose(1, 2).reshape(b, grid * grid, d)
    return torch.cat([patches[:, :middle], cls, patches[:, middle:]], dim=1)


def _flipped(tokens: Tensor) -> Tensor:
    return tokens.flip(1)


def _one_direction(mixer: Mixer, k: int, x: Tensor, z: Tensor) -> Tensor:
    """The published Mamba call on tokens already in the order of direction `k`."""
    d = x.shape[-1]
    direction = mixer.directions[k]
    u = F.conv1d(x.transpose(1, 2), mixer.conv_weight[k, :, None], mixer.conv_bias[k], padding=3, groups=d)
    u = F.silu(u[..., : x.shape[1]].transpose(1, 2))
    x_proj = torch.cat([direction.dt.weight, direction.B.weight, direction.C.weight])
    rank, n = direction.dt.out_features, direction.B.out_features
    low, B, C = (u @ x_proj.T).split([rank, n, n], dim=-1)
    dt = F.softplus(low @ direction.dt_proj.weight.T + direction.dt_proj.bias)
    A = -torch.exp(mixer.A_log[k])
    h = x.new_zeros(x.shape[0], d, n)
    ys = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + dt[:, t, :, None] * B[:, t, None, :] * u[:, t, :, None]
        ys.append((C[:, t, None, :] * h).sum(-1) + mixer.D[k] * u[:, t])
    return torch.stack(ys, dim=1) * F.silu(z)


def _literal(mixer: Mixer, tokens: Tensor) -> Tensor:
    in_proj = torch.cat([mixer.X.weight, mixer.Z.weight])
    x, z = (tokens @ in_proj.T).chunk(2, dim=-1)
    rows = _one_direction(mixer, 0, x, z)
    rows_back = _flipped(_one_direction(mixer, 1, _flipped(x), _flipped(z)))
    columns = _transposed(_one_direction(mixer, 2, _transposed(x), _transposed(z)))
    columns_back = _one_direction(mixer, 3, _flipped(_transposed(x)), _flipped(_transposed(z)))
    columns_back = _transposed(_flipped(columns_back))
    return (rows + rows_back + columns + columns_back) / 4 @ mixer.out_proj.weight.T


def _shaken(mixer: Mixer) -> Mixer:
    """Away from the initialisation, where the directions are alike and D is one."""
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return mixer


def _value_and_gradients(out: Tensor, module: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    weight = torch.linspace(-3, 3, out.numel(), dtype=torch.float64).view_as(out).cos().to(out.dtype)
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad((out * weight).sum(), [tokens, *parameters.values()])
    return {"value": out.detach(), "tokens": gradients[0], **dict(zip(parameters, gradients[1:], strict=True))}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("grid", [2, 3, 4, 5])
def test_four_directions_equal_four_published_calls(grid: int, engine: str) -> None:
    torch.manual_seed(grid)
    mixer = _shaken(Mixer(d_model=24, d_state=8, scan=engine))
    tokens = torch.randn(3, grid * grid + 1, 24, requires_grad=True)
    ours = _value_and_gradients(mixer(tokens, direction_orders(grid)), mixer, tokens)
    literal = _value_and_gradients(_literal(mixer, tokens), mixer, tokens)
    assert len(ours) == 2 + 7 + 4 * 5  # value, tokens, X Z out_proj conv A_log D, five tensors a direction
    for name, expected in literal.items():
        error = float((ours[name] - expected).abs().max() / expected.abs().max())
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("engine", ENGINES)
def test_one_direction_equals_the_published_call(engine: str) -> None:
    torch.manual_seed(0)
    mixer = _shaken(Mixer(d_model=16, d_state=4, directions=1, scan=engine))
    tokens = torch.randn(2, 19, 16, requires_grad=True)
    x, z = mixer.X(tokens), mixer.Z(tokens)
    literal = _value_and_gradients(_one_direction(mixer, 0, x, z) @ mixer.out_proj.weight.T, mixer, tokens)
    ours = _value_and_gradients(mixer(tokens, torch.arange(19)[None]), mixer, tokens)
    for name, expected in literal.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=float(1e-5 * expected.abs().max()))


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_do_not_see_each_other(engine: str) -> None:
    torch.manual_seed(0)
    mixer, order = Mixer(16, 4, scan=engine), direction_orders(3)
    tokens = torch.randn(3, 10, 16)
    alone = torch.cat([mixer(sample[None], order) for sample in tokens])
    torch.testing.assert_close(mixer(tokens, order), alone, rtol=1e-5, atol=1e-6)


def test_a_single_direction_is_causal() -> None:
    torch.manual_seed(0)
    mixer = _shaken(Mixer(16, 4, directions=1))
    tokens = torch.randn(1, 12, 16)
    changed = tokens.clone()
    changed[:, 5] += 1
    difference = (mixer(changed, torch.arange(12)[None]) - mixer(tokens, torch.arange(12)[None])).abs().sum(-1)[0]
    assert not difference[:5].any()
    assert (difference[5:] > 0).all()


def test_initialisation_of_dt() -> None:
    torch.manual_seed(0)
    direction = Direction(d_model=8192, d_state=4, dt_rank=64)
    dt = F.softplus(direction.dt_proj.bias.detach().double())
    assert 0.999e-3 < float(dt.min()) < 1.02e-3
    assert 0.098 < float(dt.max()) < 0.1001
    # Log-uniform: the quantiles of log(dt) lie on a line.
    quantiles = torch.quantile(dt.log(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    expected = math.log(1e-3) + torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64) * math.log(100)
    torch.testing.assert_close(quantiles, expected, rtol=0, atol=0.1)
    weight = direction.dt_proj.weight.detach()
    assert 0.99 / 8 < float(weight.abs().max()) <= 1 / 8  # uniform in +-1/sqrt(rank)


def test_initialisation_of_state_and_skip() -> None:
    mixer = Mixer(d_model=32, d_state=16)
    assert mixer.A_log.shape == (4, 32, 16)
    torch.testing.assert_close(mixer.A_log.detach().exp(), torch.arange(1.0, 17).expand(4, 32, -1))
    assert torch.equal(mixer.D.detach(), torch.ones(4, 32))
    assert mixer.X.bias is mixer.Z.bias is mixer.out_proj.bias is None
    assert not torch.equal(mixer.directions[0].B.weight, mixer.directions[1].B.weight)
    assert not torch.equal(mixer.conv_weight[0], mixer.conv_weight[1])


@pytest.mark.parametrize("depth", [1, 24])
def test_out_proj_starts_smaller_in_deeper_encoders(depth: int) -> None:
    torch.manual_seed(0)
    largest = float(Mixer(256, 4, depth=depth).out_proj.weight.detach().abs().max())
    bound = 1 / math.sqrt(256) / math.sqrt(depth)  # Kaiming-uniform with a = sqrt(5) is uniform in +-1/sqrt(d)
    assert 0.99 * bound < largest <= bound * (1 + 1e-6)


@pytest.mark.parametrize(("d_model", "rank"), [(16, 1), (40, 3), (768, 48), (1024, 64)])
def test_dt_rank_is_a_sixteenth_of_the_width_rounded_up(d_model: int, rank: int) -> None:
    with torch.device("meta"):
        mixer = Mixer(d_model)
    assert mixer.directions[3].dt.weight.shape == (rank, d_model)
    assert mixer.directions[3].dt_proj.weight.shape == (d_model, rank)


@pytest.mark.parametrize(("d_model", "hidden"), [(768, 2048), (1024, 2730), (1536, 4096), (20, 53)])
def test_width_of_the_mlp(d_model: int, hidden: int) -> None:
    with torch.device("meta"):
        mlp = SwiGLU(d_model)
    shapes = {name: tuple(parameter.shape) for name, parameter in mlp.named_parameters()}
    assert shapes == {
        "w1.weight": (hidden, d_model),
        "w1.bias": (hidden,),
        "w2.weight": (hidden, d_model),
        "w2.bias": (hidden,),
        "w3.weight": (d_model, hidden),
        "w3.bias": (d_model,),
    }


def test_mlp_gates_the_second_branch_with_the_first() -> None:
    torch.manual_seed(0)
    mlp, x = SwiGLU(12), torch.randn(2, 3, 12)
    a, b = x @ mlp.w1.weight.T + mlp.w1.bias, x @ mlp.w2.weight.T + mlp.w2.bias
    torch.testing.assert_close(mlp(x), (a * torch.sigmoid(a) * b) @ mlp.w3.weight.T + mlp.w3.bias)


def test_block_is_pre_norm_and_residual() -> None:
    torch.manual_seed(0)
    block, order = Block(16, 4, directions=4, depth=2), direction_orders(3)
    assert block.norm1.eps == block.norm2.eps == 1e-5
    x = torch.randn(2, 10, 16)
    middle = x + block.mixer(F.layer_norm(x, (16,), eps=1e-5), order)
    torch.testing.assert_close(block(x, order), middle + block.mlp(F.layer_norm(middle, (16,), eps=1e-5)))


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    block = Block(16, 4, directions=4, depth=2, drop_path=0.25).train()
    branch = torch.randn(4000, 2, 3)
    nothing = torch.zeros_like(branch)
    dropped = block._add(nothing, branch)
    kept = dropped.flatten(1).any(dim=1)
    assert 0.7 < float(kept.float().mean()) < 0.8
    torch.testing.assert_close(dropped[kept], branch[kept] / 0.75)
    assert torch.equal(block.eval()._add(nothing, branch), branch)

    # Both branches of a block are dropped, each on its own.
    block = Block(16, 4, directions=4, depth=2, drop_path=0.5).train()
    x, order = torch.randn(1, 10, 16).expand(64, -1, -1), direction_orders(3)
    assert len({round(float(sample.detach().sum()), 3) for sample in block(x, order)}) == 4


def test_a_bf16_branch_is_dropped_and_added_in_fp32() -> None:
    torch.manual_seed(0)
    block = Block(16, 4, directions=4, depth=2, drop_path=0.25).train()
    x, branch = torch.randn(8, 2, 3), torch.randn(8, 2, 3).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = block._add(x, branch)
    assert out.dtype == torch.float32
    added = (out - x).detach()
    kept = added.flatten(1).any(dim=1)
    assert 0 < kept.sum() < 8
    torch.testing.assert_close(added[kept], branch[kept].float() / 0.75)
    out.sum().backward()
    assert branch.grad is not None
    torch.testing.assert_close(branch.grad, (kept / 0.75).bfloat16()[:, None, None].expand_as(branch))


def test_bf16_autocast_is_close_to_fp32() -> None:
    torch.manual_seed(0)
    mixer, order = Mixer(32, 8), direction_orders(4)
    tokens = torch.randn(2, 17, 32)
    exact = mixer(tokens, order).detach()
    with torch.autocast("cpu", torch.bfloat16):
        ours = mixer(tokens, order)
    assert ours.dtype == torch.bfloat16
    assert 0 < float((ours.detach().float() - exact).abs().max() / exact.abs().max()) < 0.03


@pytest.mark.parametrize("run_adapted", [False, True])
def test_a_frozen_encoder_follows_a_merge_of_adapters(run_adapted: bool) -> None:
    from peft import get_peft_model

    torch.manual_seed(0)
    encoder = ArmEncoder(32, 2, image_size=32, d_state=4).requires_grad_(False).eval()
    images = torch.randn(1, 3, 32, 32)
    encoder.freeze_mixers()
    before = encoder(images)
    for layer in encoder.layers:
        layer.mixer.release()
    adapted: Any = get_peft_model(encoder, encoder_lora(["dt", "B", "C", "dt_proj"], 4, 8.0))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    expected = adapted(images).detach() if run_adapted else None
    merged = adapted.merge_and_unload().requires_grad_(False)
    merged.freeze_mixers()
    after = merged(images)
    fresh = ArmEncoder(32, 2, image_size=32, d_state=4).eval()
    fresh.load_state_dict(merged.state_dict())
    torch.testing.assert_close(after, fresh(images).detach())
    assert not torch.allclose(after, before, atol=1e-3)
    if expected is not None:
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_mixer_can_be_trained_through_after_inference() -> None:
    mixer, order = Mixer(16, 8).requires_grad_(False), direction_orders(2)
    tokens = torch.randn(1, 5, 16)
    with torch.inference_mode():
        mixer.freeze()
        mixer(tokens, order)
    tokens.requires_grad_()
    mixer(tokens, order).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.any()


def test_frozen_weights_are_kept_until_they_are_released() -> None:
    torch.manual_seed(0)
    mixer, order = Mixer(16, 8).requires_grad_(False), direction_orders(2)
    tokens = torch.randn(1, 5, 16)
    before = mixer(tokens, order)
    mixer.freeze()
    assert torch.equal(mixer(tokens, order), before)
    with torch.no_grad():
        mixer.directions[0].dt.weight.mul_(5)
    assert torch.equal(mixer(tokens, order), before)  # as the caller promised, nobody looks
    mixer.release()
    after = mixer(tokens, order)
    assert not torch.allclose(after, before)
    mixer.freeze()
    assert torch.equal(mixer(tokens, order), after)


def test_kept_weights_are_moved_and_replaced_by_loading() -> None:
    torch.manual_seed(0)
    mixer, order = Mixer(16, 8).requires_grad_(False), direction_orders(2)
    tokens = torch.randn(1, 5, 16)
    mixer.freeze()
    expected = copy.deepcopy(mixer).double()
    expected.release()
    assert torch.equal(mixer.double()(tokens.double(), order), expected(tokens.double(), order))
    other = Mixer(16, 8).double()
    mixer.load_state_dict(other.state_dict())
    assert torch.equal(mixer(tokens.double(), order), other(tokens.double(), order))


def test_weights_that_are_trained_are_not_kept() -> None:
    mixer, order = Mixer(16, 8).requires_grad_(False), direction_orders(2)
    mixer.directions[2].B.weight.requires_grad = True
    mixer.freeze()
    mixer(torch.randn(1, 5, 16), order).sum().backward()
    assert mixer.directions[2].B.weight.grad is not None
