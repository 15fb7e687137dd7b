"""Measures the drawing of synthetic films: images per second by number of workers, and the time of each part.

    python tests/benchmarks/phantom.py [--size 256] [--count 400]

Stages are timed in CPU milliseconds of one process, which is more reliable on a shared machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import joblib
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from emrrg_cli.imaging.raster import encode
from emrrg_cli.ingest.sources.phantom import synthetic_study
from emrrg_cli.phantom.anatomy import build_thorax
from emrrg_cli.phantom.bones import bones
from emrrg_cli.phantom.disease import diseased
from emrrg_cli.phantom.film import expose
from emrrg_cli.phantom.ink import Ink
from emrrg_cli.phantom.render import attenuation, case_grid, healthy, reference_pixels, render
from emrrg_cli.phantom.vessels import vessels


def make(index: int, size: int) -> int:
    """Makes one study as `preprocess` does: parameters, report, film, JPEG."""
    case, _ = synthetic_study(0, index)
    return len(encode(Image.fromarray(render(case, size)), "jpeg", 95))


def rate(workers: int, count: int, size: int) -> tuple[float, float]:
    """Measures images per second of wall time, and of the CPU time of the first worker (only with 1 worker)."""
    with joblib.Parallel(n_jobs=workers) as parallel:
        parallel(joblib.delayed(make)(index, size) for index in range(4 * workers))  # starts and warms the processes
        clock, cpu = time.perf_counter(), time.process_time()
        parallel(joblib.delayed(make)(index, size) for index in range(count))
        return count / (time.perf_counter() - clock), count / max(time.process_time() - cpu, 1e-9)


def stages(size: int, count: int = 40) -> dict[str, float]:
    """Measures the mean CPU milliseconds of the parts of a film."""
    cases = [synthetic_study(0, index)[0] for index in range(count)]
    grids = [case_grid(case, size, size) for case in cases]
    thoraxes = [build_thorax(case, grid) for case, grid in zip(cases, grids, strict=True)]
    seen = [attenuation(thorax, np.random.default_rng(0)) for thorax in thoraxes]
    lateral = next(case.lateral for case in cases if case.lateral)
    films = [Image.fromarray(render(case, size)) for case in cases]
    each: dict[str, Callable[[int], object]] = {
        "parameters and report": partial(synthetic_study, 0),
        "anatomy": lambda i: build_thorax(cases[i], grids[i]),
        "bones": lambda i: bones(thoraxes[i], Ink(grids[i])),
        "disease": lambda i: diseased(thoraxes[i], np.random.default_rng(0)),
        "vessels": lambda i: vessels(thoraxes[i], np.random.default_rng(0)),
        "attenuation (bones, disease, vessels and more)": lambda i: attenuation(thoraxes[i], np.random.default_rng(0)),
        "film": lambda i: expose(
            seen[i],
            healthy(thoraxes[i]),
            cases[i].film,
            grids[i],
            *reference_pixels(thoraxes[i]),
            np.random.default_rng(0),
        ),
        "render (anatomy, attenuation, film)": lambda i: render(cases[i], size),
        "lateral film": lambda i: render(cases[i], size, film=lateral),
        "JPEG": lambda i: encode(films[i], "jpeg", 95),
    }
    return {name: _cpu(stage, count) for name, stage in each.items()}


def _cpu(stage: Callable[[int], object], count: int) -> float:
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        for index in range(count):
            stage(index)
        best = min(best, time.process_time() - started)
    return best / count * 1000


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--count", type=int, default=400)
    arguments = parser.parse_args()
    table = Table(title=f"synthetic films, {arguments.size} px", title_justify="left")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for name, milliseconds in stages(arguments.size).items():
        table.add_row(name, f"{milliseconds:.2f} ms")
    table.add_section()
    for workers in (1, 2):
        clock, cpu = rate(workers, arguments.count, arguments.size)
        table.add_row(f"{workers} worker{'s'[: workers - 1]}, by the clock", f"{clock:.0f} images/s")
        if workers == 1:
            table.add_row("1 worker, by its CPU time", f"{cpu:.0f} images/s")
    Console().print(table)


if __name__ == "__main__":
    main()
