"""Draws the picture of the README from the folder of a demo.

    emrrg demo && python tests/benchmarks/picture.py emrrg-demo tests/readme/demo.png

Shows three films of the test split with reference and generated report, findings in both marked as on the demo's page.
"""

from __future__ import annotations

import io
import sys
import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.report_text import readable_report
from emrrg_cli.demo import read_result
from emrrg_cli.files.atomic import atomic_write_bytes
from emrrg_cli.files.records import read_jsonl
from emrrg_cli.phantom.reader import read_labels

COUNT = 3


def main() -> None:
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    reports = read_jsonl(folder / "reports" / "reports.jsonl")
    result = read_result(folder / "data", {row["study"]: row["report"] for row in reports})
    studies = list(zip(result.study_ids, result.truth, result.references, result.hypotheses, strict=True))
    # The first films of the split with two findings or more, whether the report is right or not.
    chosen = [study for study in studies if len(study[1]) > 1][:COUNT]
    test = open_dataset(folder / "data")["test"]
    rows = {study: row for row, study in enumerate(test["study_id"])}
    figure = Figure(figsize=(10, 2.1 * COUNT), dpi=80)
    places = figure.subplots(COUNT, 2, width_ratios=[1, 3.6])
    for (film, text), (study, truth, reference, report) in zip(places, chosen, strict=True):
        film.imshow(Image.open(io.BytesIO(test[rows[study]]["images"][0]["bytes"])), cmap="gray")
        found = read_labels(report)
        marks = [f"✓ {name}" for name in sorted(found & truth)] + [
            f"✗ {name} (invented)" for name in sorted(found - truth)
        ]
        marks += [f"○ {name} (missed)" for name in sorted(truth - found)]
        lines = [
            *_wrapped("Reference: ", readable_report(reference)),
            "",
            *_wrapped("Generated: ", readable_report(report)),
            "",
            "   ".join(marks),
        ]
        text.text(0, 1, "\n".join(lines), va="top", fontsize=9, family="DejaVu Sans")
    for axis in figure.axes:
        axis.axis("off")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    small = Image.open(buffer).convert("L").quantize(32)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(target, buffer.getvalue())
    print(f"{target}: {len(buffer.getvalue()):,} bytes; the first report: {chosen[0][3]}")


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(label + text, 105)


if __name__ == "__main__":
    main()
