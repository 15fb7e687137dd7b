"""Tables of an evaluation for the terminal: scores beside their controls, and clinical scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from emrrg_cli.console import counted
from emrrg_cli.vocabulary import SCORE_LABELS

CONTROLS = {
    "dealt": "shuffled reports",
    "most_frequent": "most frequent report",
    "most_typical": "most typical report",
    "blank_films": "blank films",
    "other_films": "films of others",
    "nearest_training_study": "nearest training study",
}
POLICY = {"uncertain_positive": "positive", "uncertain_negative": "negative"}
AVERAGES = {
    "micro": "micro",
    "macro": "macro",
    "macro_defined": "macro, defined",
    "example": "example",
}


# In narrower terminals, tables with more than five controls leave out the weaker of the two controls with one report.
_WIDE = 98


def evaluation_tables(result: Mapping[str, Any], title: str, width: int) -> list[Table]:
    """Returns the table of scores with intervals and controls, then a table for each labeler.

    Args:
        result: Result of an evaluation.
        title: Title of the first table.
        width: Width of the terminal in characters, at least 80.
    """
    if width < _WIDE and len(result["controls"]) > 5:
        few = {name: made for name, made in result["controls"].items() if name != "most_frequent"}
        result = {**result, "controls": few}
    tables = [_scores(result, title)]
    for name, grid in result["clinical"].items():
        tables += [_clinical(name, {policy: grid[policy]}, result["controls"]) for policy in grid]
    return tables


def labeler_name(name: str) -> str:
    """Returns the name of a labeler in tables."""
    return {"rules": "rules (ours; not CheXbert)", "chexbert": "CheXbert"}.get(name, name)


def _scores(result: Mapping[str, Any], title: str) -> Table:
    controls = {name: made["scores"] for name, made in result["controls"].items()}
    reasons = result["left_out"]
    heads = ["score", "value", "95 % interval", *(CONTROLS.get(name, name) for name in controls)]
    table = _table(title, heads, digits=6)
    table.columns[1].width = None  # as wide as the reason for a missing score
    if few := reasons.get("intervals"):
        table.caption = Text(f"No intervals: {few}.")
    elif patients := result.get("patients"):
        table.caption = Text(f"Intervals and tests draw {counted(patients, 'patient')}, each with all studies.")
    if result["intervals"]:
        table.columns[2].width = max(len(_interval(ends)) for ends in result["intervals"].values())
    for name, value in result["scores"].items():
        ends = result["intervals"].get(name)
        cells = [
            Text("" if ends is None else _interval(ends)),
            *(_value(scores.get(name), "-") for scores in controls.values()),
        ]
        table.add_row(
            Text(SCORE_LABELS.get(name, name)),
            _value(value, "needs Java" if "Java" in reasons.get(name, "") else "left out"),
            *cells,
        )
    for name, value in result.get("merged", {}).items():
        table.add_row(Text(f"{name} (merged)"), Text(f"{value:.4f}"))
    return table


def _interval(ends: Sequence[float]) -> str:
    return f"{ends[0]:.3f}-{ends[1]:.3f}"


def controls_with(name: str, controls: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the controls that have clinical scores of a labeler."""
    return {control: made for control, made in controls.items() if name in made.get("clinical", {})}


def clinical_rows(
    name: str, grid: Mapping[str, Any], controls: Mapping[str, Any]
) -> Iterator[tuple[str, str, str, list[float]]]:
    """Returns the rows of the clinical table: policy for uncertain labels, number of labels, average, and scores.

    The scores are precision, recall, F1, and F1 of each control. The macro average of defined labels is omitted if all
    labels are defined.
    """
    for policy, figures in grid.items():
        for labels in ("14", "13", "5"):
            for average, words in AVERAGES.items():
                if average == "macro_defined" and not figures[labels]["undefined"]:
                    continue
                row = figures[labels][average]
                others = [made["clinical"][name][policy][labels][average]["f1"] for made in controls.values()]
                yield POLICY[policy], labels, words, [row["precision"], row["recall"], row["f1"], *others]


def clinical_note(grid: Mapping[str, Any]) -> str:
    """Returns the note below the clinical table, with the intervals, which few of its rows have."""
    undefined = max(figures["14"]["undefined"] for figures in grid.values())
    notes = ['13 labels: without "No Finding", which reports without findings have.']
    if undefined:
        notes.append(f"{undefined} of 14 labels occur on neither side; macro counts them as 0.")
    for policy, figures in grid.items():
        if intervals := figures.get("intervals"):
            above = {name: f", p = {p:.4f}" for name, p in figures.get("p_above_dealt", {}).items()}
            named = ((*name.split("_"), _interval(ends) + above.get(name, "")) for name, ends in intervals.items())
            shown = "; ".join(f"{labels}, {average}: {ends}" for _, average, labels, ends in named)  # F1_micro_14
            title = "95 % intervals of F1" + (", and p that F1 is above that of the shuffled reports" if above else "")
            notes.append(f"{title}, uncertain as {POLICY[policy]}: {shown}.")
    return " ".join(notes)


def _clinical(name: str, grid: Mapping[str, Any], controls: Mapping[str, Any]) -> Table:
    [policy] = grid
    shown = controls_with(name, controls)
    heads = ["labels, average", "precision", "recall", "F1"]
    heads += [f"F1, {CONTROLS.get(control, control)}" for control in shown]
    table = _table(f"Clinical findings by {labeler_name(name)}, uncertain as {POLICY[policy]}", heads, digits=5)
    for _, labels, words, values in clinical_rows(name, grid, shown):
        table.add_row(f"{labels}, {words}", *(f"{value:.3f}" for value in values))
    table.caption = Text(clinical_note(grid))
    return table


def _table(title: str, heads: Sequence[str], digits: int) -> Table:
    """Makes a table that fits into 80 columns with all controls: heads may have several lines, but no word is cut.

    Args:
        heads: Column heads; the first column has text, the others numbers.
        digits: Number of characters of a number.
    """
    table = Table(
        title=Text(f"\n{title}"), title_justify="left", title_style="bold", min_width=len(title),
        box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1), pad_edge=False,
    )  # fmt: skip
    table.add_column(heads[0])
    for head in heads[1:]:
        table.add_column(head, justify="right", width=max(digits, *map(len, head.split())))
    return table


def _value(value: float | None, instead: str) -> Text:
    return Text(instead, style="dim") if value is None else Text(f"{value:.4f}")
