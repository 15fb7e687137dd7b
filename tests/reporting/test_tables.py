"""The tables say what they must, and take any text as it is."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from emrrg_cli.reporting import tables


def _shown(table: Any, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_score_table_says_what_is_missing() -> None:
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
