"""Images per second of the encoder on each scan engine: `python tests/benchmarks/encoder.py [--sizes base,large]`.

Forward as in generation, and forward + backward with LoRA on X of a frozen encoder, the fine-tuning of the paper; bf16
on a GPU, fp32 on a CPU (with the time of a step in milliseconds). The peer is the same encoder on mamba-ssm, if it is
installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from emrrg_cli.models.adapters import encoder_lora
from emrrg_cli.models.arm.encoder import ArmEncoder
from emrrg_cli.models.scan import available_engines

SIZES = {"base": (768, 12), "large": (1024, 24)}


def seconds(run: Callable[[], Any], device: str, runs: int) -> float:
    """Measures the median time of a call, after two calls that are not counted."""
    times = []
    for i in range(runs + 2):
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(engine: str, size: str, batch: int, device: str, runs: int) -> dict[str, Any]:
    """Measures images per second, forward and forward + backward with LoRA, and peak MiB of the latter."""
    from peft import get_peft_model

    torch.manual_seed(0)
    width, depth = SIZES[size]
    encoder = ArmEncoder(width, depth, scan=engine).to(device).requires_grad_(False).eval()
    images = torch.randn(batch, 3, 224, 224, device=device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def forward() -> None:
        with torch.no_grad(), torch.autocast(device, dtype, enabled=device == "cuda"):
            encoder(images)

    row: dict[str, Any] = {"engine": engine, "size": size, "batch": batch}
    row["forward"] = batch / seconds(forward, device, runs)
    adapted = get_peft_model(encoder, encoder_lora(["X"], 16, 16.0, 0.0)).train()

    def both() -> None:
        adapted.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype, enabled=device == "cuda"):
            loss = adapted(images).float().square().mean()
        loss.backward()

    row["lora"] = batch / seconds(both, device, runs)
    row["peak"] = None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        both()
        row["peak"] = torch.cuda.max_memory_allocated() / 2**20
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--sizes", default="base,large" if device == "cuda" else "base")
    parser.add_argument("--batches", default="8,64" if device == "cuda" else "4")
    parser.add_argument("--engines", default="triton,mamba_ssm" if device == "cuda" else "numba,recompute,reference")
    parser.add_argument("--runs", type=int, default=10 if device == "cuda" else 3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    states = available_engines()
    rows = []
    for size in options.sizes.split(","):
        for batch in map(int, options.batches.split(",")):
            for engine in options.engines.split(","):
                if states[engine] != "ok":
                    print(f"{engine}: left out ({states[engine]})", file=sys.stderr)
                    continue
                rows.append(measure(engine, size, batch, device, options.runs))
                if device == "cuda":
                    torch.cuda.empty_cache()
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}; 224 px")
    print(f"{'size':<7}{'batch':>6}  {'engine':<10}{'forward':>16}{'LoRA on X, fwd+bwd':>24}{'peak MiB':>10}")
    for row in rows:
        rates = [f"{row[key]:.1f}/s {1e3 * row['batch'] / row[key]:.0f} ms" for key in ("forward", "lora")]
        peak = f"{row['peak']:10,.0f}" if row["peak"] else ""
        print(f"{row['size']:<7}{row['batch']:>6}  {row['engine']:<10}{rates[0]:>16}{rates[1]:>24}{peak}")
    if options.json:
        options.json.write_text(
            json.dumps({"device": where, "torch": torch.__version__, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
