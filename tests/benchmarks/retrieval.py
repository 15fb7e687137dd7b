"""Measures retrieval of an `align` run on unseen pairs in both directions, compared with chance.

python tests/benchmarks/retrieval.py DATASET_DIR --model RUN [--count 200] [--split test]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from emrrg_cli.evaluation.retrieval import KS, WAYS, Retrieval, retrieval
from emrrg_cli.models.build_alignment import load_alignment
from emrrg_cli.recipe.load import load_recipe
from emrrg_cli.runtime import make_accelerator
from emrrg_cli.silence_libraries import silence_libraries
from emrrg_cli.training.align import embed_pairs, open_pairs, truncated_tokens


def measure(dataset: Path, run_dir: Path, split: str, count: int) -> Retrieval:
    """Computes retrieval among the first `count` studies of a split with text, by the run's own text rule."""
    recipe = load_recipe(str(run_dir / "recipe.yaml"), stage="align")
    settings = recipe.data.model_copy(update={"root": str(dataset), "sets": [], "limit": count})
    model = load_alignment(run_dir)
    pairs = open_pairs(settings, split, model.encoder.image_size)
    assert pairs is not None
    accelerator = make_accelerator("fp32", 0)
    model.to(accelerator.device)
    images, texts = embed_pairs(model, pairs, range(len(pairs)), 50, accelerator)
    return retrieval(images, texts, truncated_tokens(model, pairs.reports))


def show(found: Retrieval, run_dir: Path) -> None:
    """Prints the table."""
    title = (
        f"{run_dir}: {found.studies} pairs, {found.studies - found.distinct} of the reports read like an earlier one"
    )
    table = Table(title=title, title_justify="left")
    for name in ("", *(f"recall@{k}" for k in KS), "times chance @1"):
        table.add_column(name, justify="right" if name else "left")
    for label, recall, chance in (
        ("the study itself", found.recall, found.chance),
        ("or one whose report reads the same", found.recall_lenient, found.chance_lenient),
    ):
        for way in WAYS:
            row = [f"{100 * recall[way][k]:.1f} %" for k in KS]
            table.add_row(f"{label}, {way.replace('_', ' ')}", *row, f"{recall[way][1] / chance[1]:.1f}")
        table.add_row("  by chance", *(f"{100 * chance[k]:.2f} %" for k in KS), "1.0")
    table.add_row("the study itself, at most", *(f"{100 * found.ceiling[k]:.1f} %" for k in KS), "")
    Console(width=120).print(table)


def main() -> None:
    """Measures each run on the same pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--model", type=Path, required=True, nargs="+", help="run directories, one beside the other")
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, default=200)
    arguments = parser.parse_args()
    silence_libraries()
    for run_dir in arguments.model:
        show(measure(arguments.dataset, run_dir, arguments.split, arguments.count), run_dir)


if __name__ == "__main__":
    main()
