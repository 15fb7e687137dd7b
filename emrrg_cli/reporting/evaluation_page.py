"""Writes the page of an evaluation: one HTML file with scores, controls and every study, and plots as PNG."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emrrg_cli.datasets.report_text import readable_report
from emrrg_cli.files.atomic import atomic_write_bytes, atomic_write_text
from emrrg_cli.reporting.evaluation_tables import CONTROLS, clinical_note, clinical_rows, controls_with, labeler_name
from emrrg_cli.reporting.rendering import render
from emrrg_cli.vocabulary import SCORE_LABELS

_BARS = 40
_GENERATED, _REFERENCE = "#4878a8", "#888888"


def write_evaluation_page(
    path: Path, title: str, intro: str, result: Mapping[str, Any], studies: Sequence[dict[str, Any]]
) -> None:
    """Writes the page.

    Args:
        result: the content of `scores.json`.
        studies: one record per study with texts, scores, findings and `pictures` (data URLs of its films).

    Raises:
        RunError: the file cannot be written.
    """
    shown = [
        study
        | {
            "readable_reference": readable_report(study["reference"]),
            "readable_hypothesis": readable_report(study["hypothesis"]),
            "verbatim_in_training": study.get("verbatim_in_training", False),
        }
        for study in studies
    ]
    figures = result["glance"]
    text = render(
        "evaluation.html",
        title=title,
        intro=intro,
        matters=result["image_matters"],
        sentence=result["image"],
        protocol=result["protocol_line"],
        tables=[_scores(result), *(_grid(name, grid, result) for name, grid in result["clinical"].items())],
        bars=_bars(result),
        labeler=labeler_name(_main_labeler(result)),
        lengths=figures["lengths"],
        histogram=_histogram(figures["lengths"]),
        error_figures=_error_figures(figures),
        studies=shown,
        without_pictures=sum(not study["pictures"] for study in shown) if any(s["pictures"] for s in shown) else 0,
    )
    atomic_write_text(path, text)


def draw_plots(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes `findings.png` and `lengths.png`.

    Raises:
        RunError: a file cannot be written.
    """
    from matplotlib.figure import Figure

    bars = _bars(result)
    figure = Figure(figsize=(7, 4.6), dpi=140, layout="constrained")
    axis = figure.subplots()
    axis.barh([f"{bar['name']} ({bar['support']})" for bar in reversed(bars)], [b["f1"] for b in reversed(bars)])
    axis.set_xlim(0, 1)
    axis.set_xlabel(f"F1 by {labeler_name(_main_labeler(result))}, uncertain as positive")
    _save(figure, axis, folder / "findings.png")

    bins = _histogram(result["glance"]["lengths"])
    figure = Figure(figsize=(7, 3.2), dpi=140, layout="constrained")
    axis = figure.subplots()
    starts = [bin["start"] for bin in bins]
    axis.bar([start + 3 for start in starts], [bin["own"] for bin in bins], 3.6, color=_GENERATED, label="generated")
    axis.bar([start + 7 for start in starts], [bin["other"] for bin in bins], 3.6, color=_REFERENCE, label="references")
    axis.set_xlabel("words")
    axis.set_ylabel("reports")
    axis.legend(frameon=False)
    _save(figure, axis, folder / "lengths.png")


def _save(figure: Any, axis: Any, path: Path) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    atomic_write_bytes(path, stream.getvalue())


def _scores(result: Mapping[str, Any]) -> dict[str, Any]:
    controls = result["controls"]
    rows = []
    for name, value in result["scores"].items():
        ends = result["intervals"].get(name)
        shown = "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
        others = [_number(made["scores"].get(name)) for made in controls.values()]
        rows.append([SCORE_LABELS.get(name, name), _number(value), shown, *others])
    empty = [""] * (1 + len(controls))
    rows += [[f"{name} (merged)", _number(value), *empty] for name, value in result.get("merged", {}).items()]
    heads = ["score", "model", "95 % interval", *(CONTROLS.get(name, name) for name in controls)]
    note = f"No intervals: {few}. " if (few := result["left_out"].get("intervals")) else ""
    if "dealt" in controls:
        deals, few = controls["dealt"]["deals"], controls["dealt"].get("deals_of_slow_scores")
        slow = "" if few is None else f" (METEOR and BERTScore: of {few})"
        note += (
            f"Shuffled reports: the same reports, assigned to other studies at random; mean of {deals} shuffles{slow}."
        )
    return {"title": "Language scores", "heads": heads, "rows": rows, "note": note}


def _grid(name: str, grid: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    controls = controls_with(name, result["controls"])
    rows = [
        [f"{words}, {labels} labels, uncertain as {policy}", *map(_number, values)]
        for policy, labels, words, values in clinical_rows(name, grid, controls)
    ]
    heads = ["average", "precision", "recall", "F1", *(f"F1, {CONTROLS.get(key, key)}" for key in controls)]
    title = f"Clinical findings by {labeler_name(name)}"
    return {"title": title, "heads": heads, "rows": rows, "note": clinical_note(grid)}


def _main_labeler(result: Mapping[str, Any]) -> str:
    return "chexbert" if "chexbert" in result["clinical"] else "rules"


def _bars(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    labels = result["clinical"][_main_labeler(result)]["uncertain_positive"]["labels"]
    bars = [{"name": name, "f1": row["f1"], "support": row["support"]} for name, row in labels.items()]
    return sorted(bars, key=lambda bar: -bar["support"])


def _histogram(lengths: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns at most `_BARS` bars of equal width; the last bar includes all longer reports."""
    width, sides = lengths["bin"], [lengths[side]["histogram"] for side in ("hypotheses", "references")]
    own, other = (_up_to(side, width) for side in sides)
    most = max([*own.values(), *other.values()], default=1)
    last = max((0, *own, *other))
    is_open = any(int(start) > last for side in sides for start in side)
    return [
        {
            "start": start,
            "name": f"{start} or more" if start == last and is_open else f"{start} to {start + width - 1}",
            "own": own[start],
            "other": other[start],
            "own_part": 100 * own[start] / most,
            "other_part": 100 * other[start] / most,
        }
        for start in range(0, last + width, width)
    ]


def _up_to(histogram: Mapping[str, int], width: int) -> Counter[int]:
    counts: Counter[int] = Counter()
    for start, count in histogram.items():
        counts[min(int(start), width * (_BARS - 1))] += count
    return counts


def _error_figures(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    distinct, findings, repetition = figures["distinct_reports"], figures["findings"], figures["repetition"]
    contradictory = figures["contradictory_reports"]
    rows = [("distinct reports", f"{distinct['number']:,} ({100 * distinct['share']:.0f} %)")]
    if "verbatim_reports" in figures:
        rows.append(("reports that occur verbatim in training", f"{100 * figures['verbatim_reports']:.0f} %"))
        rows.append(("sentences that occur verbatim in training", f"{100 * figures['verbatim_sentences']:.0f} %"))
    rows += [
        ("findings in both", f"{findings['agreed']:,}"),
        ("findings invented", f"{findings['invented']:,} ({findings['invented_per_study']:.2f} per study)"),
        ("findings missed", f"{findings['missed']:,} ({findings['missed_per_study']:.2f} per study)"),
        ("reports that repeat a sentence", f"{100 * repetition['reports_with_a_repeated_sentence']:.0f} %"),
        (
            "reports that affirm and deny a finding (references)",
            f"{100 * contradictory['hypotheses']:.0f} % ({100 * contradictory['references']:.0f} %)",
        ),
        ("F1 of 13 findings if these do not count as found", f"{contradictory['micro_f1_without']:.3f}"),
        ("empty reports", f"{repetition['empty_reports']:,}"),
    ]
    return rows


def _number(value: float | None) -> str:
    return "left out" if value is None else f"{value:.3f}"
