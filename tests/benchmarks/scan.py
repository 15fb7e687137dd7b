"""Time and memory of the scan engines in the encoder: `python tests/benchmarks/scan.py [--batch 2] [--size base]`.

Each engine runs forward and backward in a process of its own, so that its peak memory is its own; the median of the
runs after the first is shown, and each figure's ratio to the reference.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

ENGINES = ("reference", "recompute")


def measure(engine: str, size: str, batch: int, runs: int) -> dict[str, float]:
    """Seconds of forward and backward (medians), peak memory over that of the model alone in MiB."""
    import torch

    from emrrg_cli.models.arm.encoder import ArmEncoder
    from emrrg_cli.recipe.schema import ENCODER_SIZES

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width, depth = ENCODER_SIZES[size]
    encoder = ArmEncoder(width, depth, scan=engine).to(device)
    images = torch.randn(batch, 3, 224, 224, device=device)

    def peak() -> float:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before, forward, backward = peak(), [], []
    for _ in range(runs + 1):
        _synchronize(device)
        began = time.perf_counter()
        loss = encoder(images).square().mean()
        _synchronize(device)
        middle = time.perf_counter()
        loss.backward()
        _synchronize(device)
        forward.append(middle - began)
        backward.append(time.perf_counter() - middle)
        encoder.zero_grad(set_to_none=True)
    return {
        "forward": statistics.median(forward[1:]),
        "backward": statistics.median(backward[1:]),
        "peak": peak() - before,
    }


def _synchronize(device: object) -> None:
    import torch

    if torch.device(str(device)).type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Prints the table, and JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("base", "large", "huge"), default="base")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        print(json.dumps(measure(options.engine, options.size, options.batch, options.runs)))
        return
    results = {}
    for engine in ENGINES:
        command = [sys.executable, __file__, "--engine", engine, "--size", options.size]
        command += ["--batch", str(options.batch), "--runs", str(options.runs)]
        results[engine] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print(f"encoder {options.size}, batch {options.batch}, 224 px; ratio to the reference in brackets")
    print(f"{'engine':<12}{'forward s':>18}{'backward s':>18}{'peak MiB':>18}")
    for engine, row in results.items():
        cells = (
            f"{row[key]:.2f} ({row[key] / results['reference'][key]:.2f})" for key in ("forward", "backward", "peak")
        )
        print(f"{engine:<12}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
