"""Scores of other tools beside ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emrrg_cli.app import main
from emrrg_cli.errors import UsageError
from emrrg_cli.evaluation.merged_scores import read_merged


def test_numbers_are_taken_by_name(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text('{"radgraph": {"f1": 0.2, "each": [1, 2]}, "green": 0.3, "model": "x", "nan": NaN, "ok": true}')
    assert read_merged(path) == {"radgraph.f1": 0.2, "green": 0.3}
    path.write_text('{"scores": {"RaTEScore": 1}, "seconds": 7}')
    assert read_merged(path) == {"RaTEScore": 1.0}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[1]", "contains no scores"),
        ("{}", "contains no scores"),
        ("{", "is not a JSON file"),
        ("[" * 99999, "not a JSON file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(UsageError, match=told):
        read_merged(tmp_path / "scores.json")
    with pytest.raises(UsageError, match="cannot read"):
        read_merged(tmp_path / "none.json")


def test_merged_scores_are_in_table_page_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"study_id": f"s{i}", "reference": f"no effusion {i} .", "hypothesis": "clear ."} for i in range(4)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "theirs.json").write_text('{"GREEN <b>": 0.5}')
    out = tmp_path / "out"
    arguments = ["evaluate", "--predictions", str(tmp_path / "p.jsonl"), "--merge", str(tmp_path / "theirs.json")]
    assert main([*arguments, "--no-meteor", "-o", str(out)]) == 0
    assert "GREEN <b> (merged)" in capsys.readouterr().out
    assert json.loads((out / "scores.json").read_text())["merged"] == {"GREEN <b>": 0.5}
    assert "GREEN &lt;b&gt; (merged)" in (out / "page.html").read_text()
