"""CSV files for spreadsheets: what would be a formula, and that our own readers get the same texts."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from emrrg_cli.decoding.outputs import write_reports
from emrrg_cli.evaluation.outputs import _table
from emrrg_cli.evaluation.prediction_layouts import read_table as read_predictions
from emrrg_cli.files.spreadsheets import plain_text, spreadsheet_writer
from emrrg_cli.ingest.sources.table import read_table
from emrrg_cli.reporting.comparison_tables import comparison_csv

FORMULAS = ["=1+1", "- no effusion", "+cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "\n=1", "'=1", "''-x", "\uff1d1+1"]
PLAIN = ["", "-", "'", "'clear'", "Clear, ü.", "a=b", "-1.5", "1", " =1"]


@pytest.mark.parametrize("text", [*FORMULAS, *PLAIN])
def test_no_text_is_a_formula_and_all_are_kept(text: str) -> None:
    stream = io.StringIO()
    spreadsheet_writer(stream, ["a", "b"])([text, -0.5])
    assert stream.getvalue().startswith("\ufeffa,b\n")
    written, number = list(csv.reader(io.StringIO(stream.getvalue(), newline="")))[1]
    assert (plain_text(written), number) == (text, "-0.5")
    assert written == (f"'{text}" if text in FORMULAS else text)


def test_a_carriage_return_does_not_end_a_row() -> None:
    stream = io.StringIO()
    spreadsheet_writer(stream, ["a"])(["x\ry\r\n\r=z"])
    assert list(csv.reader(io.StringIO(stream.getvalue(), newline=""))) == [["\ufeffa"], ["x\ny\n\n=z"]]


def test_every_table_for_people_is_safe_and_read_again(tmp_path: Path) -> None:
    row = {"study": "=s", "path": "-a.png", "files": ["@b.png"], "report": "- größer", "notes": ["+x"], "seconds": 1}
    write_reports(tmp_path / "reports.jsonl", [row], with_table=True)
    study = {"study_id": "=s", "reference": "-r", "hypothesis": "- größer", "missed": ["=x", "y"]}
    (tmp_path / "studies.csv").write_text(_table([study]), encoding="utf-8")
    one = {"name": "=a", "studies": 1, "settings": {"k": "-v w"}, "scores": {"BLEU_1": 0.5}}
    comparison = comparison_csv({"rows": [one], "groups": [], "settings": ["k"]})
    (tmp_path / "compare.csv").write_text(comparison, encoding="utf-8")
    for name in ("reports.csv", "studies.csv", "compare.csv"):
        text = (tmp_path / name).read_bytes().decode("utf-8")
        cells = next(iter(csv.reader([text.splitlines()[1]])))
        assert text[0] == "\ufeff"
        assert not any(cell[:1] in set("=+-@") for cell in cells)
    [(_, read)] = read_table(tmp_path / "reports.csv").rows()
    assert read is not None
    assert [read[name] for name in ("path", "report", "study", "files", "notes")] == [
        "-a.png", "- größer", "=s", "@b.png", "+x",
    ]  # fmt: skip
    [record] = read_predictions(tmp_path / "studies.csv").records
    assert record == study | {"missed": "=x; y"}
