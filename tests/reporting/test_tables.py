"""The tables say what they must, and take any text as it is."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from emrrg_cli.console import counted
from emrrg_cli.reporting import tables
from emrrg_cli.reporting.comparison_tables import comparison_csv, comparison_table
from emrrg_cli.reporting.evaluation_tables import CONTROLS, evaluation_tables


def _shown(table: Any, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_score_table_says_what_a_missing_score_needs() -> None:
    text = _shown(
        tables.score_table({"BLEU_4": 0.12345, "METEOR": None, "F1": None}, "test split [published protocol]")
    )
    assert "test split [published protocol]" in text
    assert "BLEU-4" in text
    assert "0.1235" in text
    assert "needs Java" in text
    assert "not computed" in text


def test_reports_table_shows_the_disclaimer_and_counts_the_rest() -> None:
    rows = [{"path": f"[b]/{i}.png", "report": "lungs are clear .", "seconds": 1.5} for i in range(4)]
    text = _shown(tables.reports_table(iter(rows), 3))
    assert "[b]/2.png" in text
    assert "[b]/3.png" not in text
    assert f"1 more not shown. {tables.DISCLAIMER}" in text
    assert "1.50" in text
    narrow = _shown(tables.reports_table([{"study_id": 7, "report": ""}], 3))
    assert "(empty)" in narrow
    assert tables.DISCLAIMER in narrow
    assert "seconds" not in narrow


@pytest.mark.parametrize("width", [80, 98])
def test_tables_with_all_controls_fit_into_the_width(width: int) -> None:
    row = {"precision": 0.5, "recall": 0.25, "f1": 1 / 3}
    labels = {"undefined": 2, "micro": row, "macro": row, "macro_defined": row, "example": row}
    ends = {"F1_micro_14": [0.3, 0.4], "F1_macro_14": [0.2, 0.31], "F1_micro_13": [0.25, 0.5]}
    p = {"F1_micro_14": 0.0001, "F1_macro_14": 0.02, "F1_micro_13": 0.3}
    figures = dict.fromkeys(("14", "13", "5"), labels) | {"intervals": ends, "p_above_dealt": p}
    grid = dict.fromkeys(("uncertain_positive", "uncertain_negative"), figures)
    scores = {"BLEU_1": 0.12345, "METEOR": None, "CIDEr": 1.23456}
    controls = {name: {"clinical": {"rules": grid}, "scores": scores} for name in CONTROLS}
    result = {"controls": controls, "clinical": {"rules": grid}, "scores": scores, "left_out": {}}
    made = evaluation_tables(result | {"intervals": {"CIDEr": [1.1234, 1.3456]}}, "test split", width)
    text = "".join(_shown(table, width=width) for table in made)
    assert "\u2026" not in text
    told = "14, micro: 0.300-0.400, p = 0.0001; 14, macro: 0.200-0.310, p = 0.0200; 13, micro: 0.250-0.500, p = 0.3000."
    assert told in " ".join(text.split())
    for said in ("0.1235", "1.2346", "1.123-1.346", "left out", "uncertain as positive", "uncertain as negative"):
        assert said in text
    shown = [head for name, head in CONTROLS.items() if width > 80 or name != "most_frequent"]
    words = [word for head in shown for word in head.split()]
    for word in (*words, "precision", "recall", "0.333", "macro,", "defined", "No Finding"):
        assert word in text
    assert text.count("0.333") == 2 * 12 * (1 + len(shown))


@pytest.mark.parametrize(("width", "cell"), [(72, "0.123*"), (120, "0.123* [0.100, 0.200]")])
def test_a_comparison_has_a_line_for_each_score(width: int, cell: str) -> None:
    names = ["BLEU_1", "CIDEr", "rules_F1_micro_13"]
    rows = [
        {"name": name, "settings": {"model.views": views}, "scores": dict.fromkeys(names, 0.1234),
         "intervals": {key: [0.1, 0.2] for key in names}, "against_first": {"p": dict.fromkeys(names, 0.01)}}
        for name, views in (("a" * 20, "average"), ("b" * 20, "concat"))
    ]  # fmt: skip
    result = {"rows": rows, "groups": [], "settings": ["model.views"], "remarks": []}
    text = _shown(comparison_table(result, width), width=width)
    lines = [[part.strip() for part in line.strip("│┃\n").split("│")] for line in text.splitlines() if "│" in line]
    assert lines == [["views", "average", "concat"],
                     *([name, cell, cell] for name in ("BLEU-1", "CIDEr", "rules F1 of 13, micro"))]  # fmt: skip
    assert ("--output writes the intervals" in " ".join(text.split())) is (width == 72)


def test_a_comparison_of_seeds_shows_their_means() -> None:
    row = {"name": "x-1", "settings": {}, "scores": {"CIDEr": 0.5}, "intervals": {"CIDEr": [0.4, 0.6]}}
    groups = [
        {"name": "x, mean of 2 seeds", "settings": {}, "mean": {"CIDEr": 0.51}, "deviation": {"CIDEr": 0.02}},
        {"name": "theirs", "settings": {}, "mean": {"CIDEr": 0.3}, "deviation": {"CIDEr": None},
         "against_first": {"p": {"CIDEr": 0.01}, "differences": {"CIDEr": -0.21},
                           "intervals": {"CIDEr": [-0.3, -0.1]}}},
    ]  # fmt: skip
    result = {"rows": [row], "groups": groups, "settings": [], "remarks": []}
    text = _shown(comparison_table(result, 120), width=120)
    assert "0.510 ± 0.020" in text
    assert "0.300*" in text
    assert "x-1" not in text
    csv = comparison_csv(result).splitlines()
    assert csv[1] == "x-1,,CIDEr,0.5,0.4,0.6,,,,,"
    assert csv[3] == "theirs,,CIDEr,0.3,,,,-0.21,-0.3,-0.1,0.01"


def test_many_runs_go_into_several_tables() -> None:
    rows = [
        {"name": f"run-{i}", "settings": {"model.encoder.weights": "/a/long/path/" * 5}, "scores": {"CIDEr": i / 10},
         "intervals": {"CIDEr": [0, 1]}}
        for i in range(10)
    ]  # fmt: skip
    result = {"rows": rows, "groups": [], "settings": ["model.encoder.weights"], "remarks": []}
    text = _shown(comparison_table(result, 80), width=80)
    heads = [line for line in text.splitlines() if "reports" in line]
    assert [line.count("run-") for line in heads] == [3, 3, 3, 1]
    for row in rows:
        assert row["name"] in text
        assert f"{row['scores']['CIDEr']:.3f}" in text
    assert text.count("paired bootstrap") == 1


def test_a_count_has_the_right_unit() -> None:
    assert [counted(n, "study") for n in (0, 1, 2955)] == ["0 studies", "1 study", "2,955 studies"]
    assert [counted(n, "image") for n in (1, 2)] == ["1 image", "2 images"]
