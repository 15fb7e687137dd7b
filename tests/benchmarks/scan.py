"""Time and memory of the mixer on each scan engine: `python tests/benchmarks/scan.py [--width 768 --batch 128 ...]`.

On a GPU: medians in bf16 of a whole mixer (X, Z, scan, out_proj) at 197 tokens, n = 16, for our engine and for
mamba-ssm as published (four calls) and grouped (one call), if mamba-ssm and causal-conv1d are installed. The floor is
the time of the exponentials, the arithmetic and the memory traffic of one forward pass at the rates of the GPU.
Without a GPU: fp32 on the plain engines, a small batch. `--json FILE` saves the results.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emrrg_cli.models.arm.encoder import direction_orders
from emrrg_cli.models.arm.mixer import Mixer
from emrrg_cli.models.scan import available_engines

GRID, STATES, DIRECTIONS = 14, 16, 4
TOKENS = GRID**2 + 1
# The main sizes first, then the rest of the range.
SIZES = [(768, 128), (1024, 64), (768, 8)]
MORE = [(768, 1), (768, 32), (768, 256), (1024, 8), (1024, 128)]


class PublishedMixer(nn.Module):
    """The peer: four calls of mamba-ssm with flips and transposes, as in the published encoder."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        """Computes `[b, l, d] -> [b, l, d]` in the orders of the published code; `order` is ignored."""
        from emrrg_cli.models.scan.mamba_ssm_engine import _functions

        scan, conv = _functions()
        m, dtype = self.mixer, x.dtype
        b, length, d = x.shape
        weights = torch.cat([m.X.weight, m.Z.weight]).to(dtype)
        xz = (weights @ x.reshape(b * length, d).t()).view(2 * d, b, length).transpose(0, 1).contiguous()

        def one(xz: Tensor, k: int) -> Tensor:
            direction = m.directions[k]
            u, z = xz.chunk(2, 1)
            u = conv(u, m.conv_weight[k].to(dtype), m.conv_bias[k].to(dtype), activation="silu")
            rows = [direction.dt.weight, direction.B.weight, direction.C.weight]
            rank = rows[0].shape[0]
            low = F.linear(u.transpose(1, 2).reshape(b * length, d), torch.cat(rows).to(dtype))
            dt = (direction.dt_proj.weight.to(dtype) @ low[:, :rank].t()).view(d, b, length).transpose(0, 1)
            B, C = (
                low[:, start : start + STATES].view(b, length, STATES).transpose(1, 2).contiguous()
                for start in (rank, rank + STATES)
            )
            A, bias = -torch.exp(m.A_log[k]), direction.dt_proj.bias
            y: Tensor = scan(u, dt.contiguous(), A, B, C, m.D[k], z=z, delta_bias=bias, delta_softplus=True)
            return y

        def turned(t: Tensor) -> Tensor:
            middle = length // 2
            patches = torch.cat([t[:, :, :middle], t[:, :, middle + 1 :]], -1).reshape(b, -1, GRID, GRID)
            patches = patches.transpose(2, 3).reshape(b, t.shape[1], -1)
            return torch.cat([patches[:, :, :middle], t[:, :, middle : middle + 1], patches[:, :, middle:]], -1)

        out = one(xz, 0) + one(xz.flip(-1), 1).flip(-1)
        columns = turned(xz)
        out = (out + turned(one(columns, 2) + one(columns.flip(-1), 3).flip(-1))) / 4
        return F.linear(out.transpose(1, 2), m.out_proj.weight.to(dtype))


def floor_ms(width: int, batch: int) -> float:
    """Computes the minimum milliseconds of a forward pass: the slowest of exponentials, arithmetic and memory traffic.

    Counts an exponential and four fused multiply-adds per state update; x, z, out once; and u, dt and y of each
    direction written and read once between kernels, in bf16.
    """
    card = torch.cuda.get_device_properties(0)
    hertz = getattr(card, "clock_rate", 1_755_000) * 1e3
    updates = DIRECTIONS * batch * TOKENS * width * STATES
    exponentials = updates / (16 * card.multi_processor_count * hertz)
    arithmetic = 4 * updates / (128 * card.multi_processor_count * hertz)
    moved = (3 + 6 * DIRECTIONS) * batch * TOKENS * width * 2 / 3.0e12
    products = 2 * batch * TOKENS * width * (3 * width + 2 * DIRECTIONS * math.ceil(width / 16)) / 600e12
    return 1e3 * (max(exponentials, arithmetic, moved) + products)


def median_ms(run: Callable[[], Any], cuda: bool) -> float:
    """Measures the median time of a call."""
    if cuda:
        from triton.testing import do_bench

        return float(do_bench(run, warmup=100, rep=300, return_mode="median"))
    run()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """Captures the same call as a CUDA graph, which has no host cost."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(name: str, module: nn.Module, width: int, batch: int, device: str) -> dict[str, Any]:
    """Measures forward with frozen weights and forward + backward, each called and as a graph (ms), and the peak
    memory of the latter when called (MiB)."""
    cuda = device == "cuda"
    gc.collect()  # graphs of the previous engine keep their memory
    if cuda:  # cuBLAS keeps memory for the streams of these graphs
        torch._C._cuda_clearCublasWorkspaces()
    order = direction_orders(GRID).to(device)
    dtype = torch.bfloat16 if cuda else torch.float32
    x = torch.randn(batch, TOKENS, width, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)
    leaves = [x, *module.parameters()]

    def forward() -> None:
        with torch.no_grad(), torch.autocast(device, dtype, enabled=cuda):
            module(x, order)

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        with torch.autocast(device, dtype, enabled=cuda):
            y = module(x, order)
        y.backward(grad)

    row: dict[str, Any] = {"engine": name, "width": width, "batch": batch, "peak": None}
    if cuda:
        both()  # permanent memory (workspaces, compiled kernels) is allocated before
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        both()
        torch.cuda.synchronize()
        row["peak"] = torch.cuda.max_memory_allocated() / 2**20
    row["both"], row["both_graph"] = median_ms(both, cuda), None
    if cuda:
        with contextlib.suppress(RuntimeError):  # the peer's backward pass cannot be captured
            row["both_graph"] = median_ms(captured(both), cuda)
    module.requires_grad_(False)
    row["forward"] = median_ms(forward, cuda)
    row["graph"] = median_ms(captured(forward), cuda) if cuda else None
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--all", action="store_true", help="the whole range of batches")
    parser.add_argument("--engines", help="names, divided by commas")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    states = available_engines()
    plain = ["numba", "recompute", "reference"] if device == "cpu" else []
    wanted = options.engines.split(",") if options.engines else [*plain, "triton", "mamba_ssm", "published"]
    sizes = SIZES + (MORE if options.all else []) if device == "cuda" else [(192, 2)]
    if options.width or options.batch:
        sizes = [(options.width or 768, options.batch or 8)]
    rows = []
    for width, batch in sizes:
        torch.manual_seed(0)
        for name in wanted:
            engine = "mamba_ssm" if name == "published" else name
            if states[engine] != "ok" or (device == "cpu" and engine in ("triton", "mamba_ssm")):
                print(f"{name}: left out ({states[engine] if states[engine] != 'ok' else 'no GPU'})", file=sys.stderr)
                continue
            mixer = Mixer(width, STATES, DIRECTIONS, scan=engine).to(device)
            rows.append(measure(name, PublishedMixer(mixer) if name == "published" else mixer, width, batch, device))
            if device == "cuda":
                rows[-1]["of floor"] = floor_ms(width, batch) / (rows[-1]["graph"] or rows[-1]["forward"])
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {TOKENS} tokens, n = {STATES}; milliseconds, MiB")
    print(f"{'':24}{'called':>18}{'as a graph':>18}")
    heads = ["forward", "fwd+bwd", "forward", "fwd+bwd"]
    print(
        f"{'width':>6}{'batch':>6}  {'engine':<10}"
        + "".join(f"{head:>9}" for head in heads)
        + f"{'peak':>7}{'of floor':>9}"
    )
    for row in rows:
        times = [row[name] for name in ("forward", "both", "graph", "both_graph")]
        cells = [f"{time:9.3f}" if time is not None else f"{'':9}" for time in times]
        cells.append(f"{row['peak']:7.0f}" if row["peak"] else f"{'':7}")
        cells.append(f"{row['of floor']:9.0%}" if "of floor" in row else "")
        print(f"{row['width']:>6}{row['batch']:>6}  {row['engine']:<10}" + "".join(cells))
    if options.json:
        options.json.write_text(
            json.dumps({"device": where, "torch": torch.__version__, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
