"""The published architecture once more: slow, literal, from its description alone, on published state dicts.

Nothing here comes from the package. Every sum over tokens is a loop, every direction is gathered and put back by an
explicit list of tokens, and every tensor is looked up by its published name, so that gradients come out by those
names too. It is what the conversion and the model are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]
PATCH = 16
CLUSTER = 4
# Suffix of conv1d, x_proj, dt_proj and D, and the name of A, of each direction.
DIRECTIONS = (("", "A_log"), ("_b", "A_b_log"), ("_c", "A_c_log"), ("_c_b", "A_c_b_log"))


# -- small pieces ------------------------------------------------------------------------------------------------


def linear(sd: State, name: str, x: Tensor) -> Tensor:
    y = x @ sd[f"{name}.weight"].T
    return y + sd[f"{name}.bias"] if f"{name}.bias" in sd else y


def layer_norm(sd: State, name: str, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5) * sd[f"{name}.weight"] + sd[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + torch.log1p(torch.exp(-x.abs())), torch.log1p(torch.exp(-x.abs())))


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def patches(sd: State, image: Tensor) -> Tensor:
    """`[3, h, w] -> [l, d]`, row-major."""
    weight, bias = sd["patch_embed.proj.weight"], sd["patch_embed.proj.bias"]
    tokens = []
    for row in range(image.shape[1] // PATCH):
        for column in range(image.shape[2] // PATCH):
            crop = image[:, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)]
            tokens.append((weight * crop).sum((1, 2, 3)) + bias)
    return torch.stack(tokens)


# -- the mixer ---------------------------------------------------------------------------------------------------


def direction(sd: State, mixer: str, suffix: str, a_log: str, x: Tensor, z: Tensor) -> Tensor:
    """One scan over tokens in the order they are visited: `x`, `z` `[l, d]` to `[l, d]`."""
    length, d = x.shape
    n = sd[f"{mixer}.{a_log}"].shape[1]
    rank = math.ceil(d / 16)
    kernel = sd[f"{mixer}.conv1d{suffix}.weight"][:, 0]  # [d, 4]
    convolved = []
    for t in range(length):
        value = sd[f"{mixer}.conv1d{suffix}.bias"]
        for tap in range(4):
            if t - 3 + tap >= 0:
                value = value + kernel[:, tap] * x[t - 3 + tap]
        convolved.append(silu(value))
    A = -torch.exp(sd[f"{mixer}.{a_log}"])
    D = sd[f"{mixer}.D{suffix}"]
    h = torch.zeros(d, n, dtype=x.dtype)
    out = []
    for t in range(length):
        u = convolved[t]
        projected = sd[f"{mixer}.x_proj{suffix}.weight"] @ u
        dt, B, C = projected[:rank], projected[rank : rank + n], projected[rank + n :]
        dt = softplus(sd[f"{mixer}.dt_proj{suffix}.weight"] @ dt + sd[f"{mixer}.dt_proj{suffix}.bias"])
        h = torch.exp(dt[:, None] * A) * h + dt[:, None] * B[None, :] * u[:, None]
        y = (h * C[None, :]).sum(1)
        out.append((y + D * u) * silu(z[t]))
    return torch.stack(out)


def mixer(sd: State, name: str, x: Tensor, orders: list[list[int]]) -> Tensor:
    d = x.shape[1]
    both = x @ sd[f"{name}.in_proj.weight"].T
    X, Z = both[:, :d], both[:, d:]
    total = torch.zeros_like(x)
    for order, (suffix, a_log) in zip(orders, DIRECTIONS, strict=False):
        scanned = direction(sd, name, suffix, a_log, X[order], Z[order])
        back = [order.index(token) for token in range(len(order))]
        total = total + scanned[back]
    return (total / len(orders)) @ sd[f"{name}.out_proj.weight"].T


def block(sd: State, i: int, x: Tensor, orders: list[list[int]]) -> Tensor:
    x = x + mixer(sd, f"layers.{i}.mixer", layer_norm(sd, f"layers.{i}.norm1", x), orders)
    h = layer_norm(sd, f"layers.{i}.norm2", x)
    gate = silu(linear(sd, f"layers.{i}.mlp.w1", h)) * linear(sd, f"layers.{i}.mlp.w2", h)
    return x + linear(sd, f"layers.{i}.mlp.w3", gate)


def depth_of(sd: State) -> int:
    return len({name.split(".")[1] for name in sd if name.startswith("layers.")})


# -- stages 2 and 3 ----------------------------------------------------------------------------------------------


def four_orders(grid: int) -> list[list[int]]:
    """Tokens in the order each direction visits them; the class token is token `grid**2 // 2` of the sequence."""
    middle = grid * grid // 2

    def token(patch: int) -> int:
        return patch if patch < middle else patch + 1

    by_row = [token(row * grid + column) for row in range(grid) for column in range(grid)]
    by_column = [token(row * grid + column) for column in range(grid) for row in range(grid)]
    orders = []
    for order in (by_row, by_column):
        whole = [*order[:middle], middle, *order[middle:]]
        orders += [whole, whole[::-1]]
    return orders


def encoder(sd: State, images: Tensor) -> Tensor:
    """`[b, 3, h, w] -> [b, l + 1, d]`."""
    grid = images.shape[-1] // PATCH
    out = []
    for image in images:
        x = patches(sd, image)
        middle = len(x) // 2
        x = torch.cat([x[:middle], sd["cls_token"][0], x[middle:]]) + sd["pos_embed"][0]
        for i in range(depth_of(sd)):
            x = block(sd, i, x, four_orders(grid))
        out.append(layer_norm(sd, "norm_f", x))
    return torch.stack(out)


# -- stage 1 -----------------------------------------------------------------------------------------------------


def clusters(grid: int) -> list[list[int]]:
    """The patches of each cluster, row-major among clusters and inside each."""
    side = grid // CLUSTER
    return [
        [
            (CLUSTER * cluster_row + row) * grid + CLUSTER * cluster_column + column
            for row in range(CLUSTER)
            for column in range(CLUSTER)
        ]
        for cluster_row in range(side)
        for cluster_column in range(side)
    ]


def attention(sd: State, name: str, q: Tensor, kv: Tensor, seen: list[list[int]]) -> Tensor:
    """Query `t` attends to the tokens `seen[t]`: `[t, w]`, `[s, w] -> [t, w]`."""
    width = q.shape[1]
    heads = max(1, width // 64)
    size = width // heads
    queries = linear(sd, f"{name}.q", q)
    both = linear(sd, f"{name}.kv", kv)
    keys, values = both[:, :width], both[:, width:]
    rows = []
    for t in range(len(q)):
        parts = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = keys[seen[t], part] @ queries[t, part] * size**-0.5
            weights = torch.exp(scores - scores.max())
            parts.append((weights / weights.sum()) @ values[seen[t], part])
        rows.append(torch.cat(parts))
    return linear(sd, f"{name}.proj", torch.stack(rows))


def pretrainer(sd: State, images: Tensor, taps: list[int]) -> tuple[Tensor, Tensor]:
    """The loss, and the prediction `[b, l - 16, 768]`, tokens in cluster order."""
    grid = images.shape[-1] // PATCH
    groups = clusters(grid)
    given = [patch for group in groups[:-1] for patch in group]
    wanted = [patch for group in groups[1:] for patch in group]
    blocks = len(taps)
    width = sd["ar_token"].shape[-1]
    predictions, squares = [], []
    for image in images:
        x = (patches(sd, image) + sd["pos_embed"][0])[given]
        kept = {}
        for i in range(depth_of(sd)):
            x = block(sd, i, x, [list(range(len(given)))])
            kept[i + 1] = x
        normed = [layer_norm(sd, f"norm_{j + 1}", kept[tap]) for j, tap in enumerate(taps)]
        memory = linear(sd, "enc2dec", torch.cat(normed, dim=-1)).view(len(given), width, blocks)
        q = sd["ar_token"][0] + sd["dec_pos_embed"][0][wanted]
        # A query of cluster c + 1 sees the clusters 0..c, which are the first 16 (c + 1) given tokens.
        seen = [list(range(16 * (t // 16 + 1))) for t in range(len(wanted))]
        for j in range(blocks):
            name = f"dec_block.{j}"
            keys = layer_norm(sd, f"{name}.norm2_2", memory[:, :, j])
            q = q + attention(sd, f"{name}.attn2", layer_norm(sd, f"{name}.norm2_1", q), keys, seen)
            hidden = gelu(linear(sd, f"{name}.mlp.fc1", layer_norm(sd, f"{name}.norm2", q)))
            q = q + linear(sd, f"{name}.mlp.fc2", hidden)
        prediction = linear(sd, "ar_pred", layer_norm(sd, "ar_norm", q))
        predictions.append(prediction)
        for t, patch in enumerate(wanted):
            row, column = PATCH * (patch // grid), PATCH * (patch % grid)
            pixels = image[:, row : row + PATCH, column : column + PATCH].permute(1, 2, 0).reshape(-1)
            target = (pixels - pixels.mean()) / torch.sqrt(pixels.var(unbiased=True) + 1e-6)
            squares.append((prediction[t] - target) ** 2)
    return torch.stack(squares).mean(), torch.stack(predictions)


# -- random state dicts ------------------------------------------------------------------------------------------


def random_tensor(name: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Values that keep activations of order one and every path at work."""
    noise = torch.randn(shape, generator=rng)
    last = name.rsplit(".", 1)[-1]
    if last.startswith("A_") and last.endswith("log"):
        return torch.log(torch.arange(1, shape[1] + 1.0)) + 0.2 * noise
    if ".dt_proj" in name and last == "bias":
        return noise - 1
    if last.startswith("D") or ("norm" in name and last == "weight"):
        return 1 + 0.2 * noise
    if last == "weight" and len(shape) > 1:
        return 0.5 * noise / math.sqrt(math.prod(shape[1:]))
    return 0.3 * noise


def encoder_shapes(d: int, depth: int, n: int, grid: int, *, stage: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an encoder, of stage 1 or of stages 2 and 3."""
    rank, hidden = math.ceil(d / 16), d * 4 * 2 // 3
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (d, 3, 16, 16),
        "patch_embed.proj.bias": (d,),
        "pos_embed": (1, grid * grid + (stage > 1), d),
    }
    if stage > 1:
        shapes |= {"cls_token": (1, 1, d), "norm_f.weight": (d,), "norm_f.bias": (d,)}
    for i in range(depth):
        at = f"layers.{i}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{at}.{norm}.weight": (d,), f"{at}.{norm}.bias": (d,)}
        shapes |= {f"{at}.mixer.in_proj.weight": (2 * d, d), f"{at}.mixer.out_proj.weight": (d, d)}
        for suffix, a_log in DIRECTIONS[: 1 if stage == 1 else 4]:
            shapes |= {
                f"{at}.mixer.{a_log}": (d, n),
                f"{at}.mixer.D{suffix}": (d,),
                f"{at}.mixer.conv1d{suffix}.weight": (d, 1, 4),
                f"{at}.mixer.conv1d{suffix}.bias": (d,),
                f"{at}.mixer.x_proj{suffix}.weight": (rank + 2 * n, d),
                f"{at}.mixer.dt_proj{suffix}.weight": (d, rank),
                f"{at}.mixer.dt_proj{suffix}.bias": (d,),
            }
        for name, out, width in (("w1", hidden, d), ("w2", hidden, d), ("w3", d, hidden)):
            shapes |= {f"{at}.mlp.{name}.weight": (out, width), f"{at}.mlp.{name}.bias": (out,)}
    return shapes


def decoder_shapes(d: int, grid: int, width: int, blocks: int = 4) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the decoder of stage 1, without the mask."""
    shapes: dict[str, tuple[int, ...]] = {"ar_token": (1, 1, width), "dec_pos_embed": (1, grid * grid, width)}

    def add(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    def add_norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (size,), (size,)

    add("enc2dec", blocks * width, blocks * d)
    for j in range(blocks):
        add_norm(f"norm_{j + 1}", d)
        for norm in ("norm2_1", "norm2_2", "norm2"):
            add_norm(f"dec_block.{j}.{norm}", width)
        add(f"dec_block.{j}.attn2.q", width, width)
        add(f"dec_block.{j}.attn2.kv", 2 * width, width)
        add(f"dec_block.{j}.attn2.proj", width, width)
        add(f"dec_block.{j}.mlp.fc1", 4 * width, width)
        add(f"dec_block.{j}.mlp.fc2", width, 4 * width)
    add_norm("ar_norm", width)
    add("ar_pred", 768, width)
    return shapes


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int = 0, prefix: str = "") -> dict[str, Tensor]:
    """Random tensors of these names and shapes, fp32."""
    rng = torch.Generator().manual_seed(seed)
    return {prefix + name: random_tensor(name, shape, rng) for name, shape in shapes.items()}


def mask(grid: int) -> Tensor:
    """The additive mask that stage 1 checkpoints hold."""
    tokens = grid * grid - 16
    allowed = torch.tensor([[k // 16 <= q // 16 for k in range(tokens)] for q in range(tokens)])
    return torch.zeros(tokens, tokens).masked_fill(~allowed, float("-inf"))
