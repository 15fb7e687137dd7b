"""What an evaluation leaves behind, and its page in a real browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from emrrg_cli.errors import RunError
from emrrg_cli.evaluation import outputs
from emrrg_cli.evaluation.assess import Options
from emrrg_cli.evaluation.file_evaluation import evaluate_file
from emrrg_cli.evaluation.predictions import Predictions
from tests.browser import find_on_page, needs_browser

REFERENCES = {
    "s10": "the heart is enlarged . no pneumothorax .",
    "s2": "there is a left pleural effusion .",
    "<b>s3": "lungs are clear . <script>alert(1)</script>",
}
HYPOTHESES = {
    "s10": "the heart is enlarged . no pneumothorax .",
    "s2": "there is a right pneumothorax . there is a right pneumothorax .",
    "<b>s3": "",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation") / "out"
    predictions = Predictions(list(REFERENCES), list(REFERENCES.values()), list(HYPOTHESES.values()), "p.jsonl")
    options = Options(meteor=False, resamples=50, train_reports=[REFERENCES["s10"], "other words ."])
    evaluate_file(predictions, folder, options)
    return folder


def test_each_study_is_a_row_of_json_and_csv(written: Path) -> None:
    rows = json.loads((written / "studies.json").read_text())
    assert [row["study_id"] for row in rows] == list(REFERENCES)
    assert [row["hypothesis"] for row in rows] == list(HYPOTHESES.values())  # as it is, not as it is shown
    assert (rows[0]["agreed"], rows[0]["verbatim_in_training"], rows[0]["ROUGE_L"]) == (["Cardiomegaly"], True, 1.0)
    assert (rows[1]["invented"], rows[1]["missed"]) == (["Pneumothorax"], ["Pleural Effusion"])
    table = list(csv.DictReader((written / "studies.csv").open(newline="")))
    assert table[1]["missed"] == "Pleural Effusion"
    assert [float(row["CIDEr"]) for row in table] == pytest.approx([row["CIDEr"] for row in rows])


def test_wrong_findings_are_counted(written: Path) -> None:
    glance = json.loads((written / "scores.json").read_text())["glance"]
    assert glance["distinct_reports"] == {"number": 3, "share": 1.0}
    assert glance["verbatim_reports"] == pytest.approx(1 / 3)
    assert glance["verbatim_sentences"] == pytest.approx(2 / 4)
    assert glance["repetition"]["reports_with_a_repeated_sentence"] == pytest.approx(1 / 3)
    assert glance["repetition"]["empty_reports"] == 1
    assert {key: glance["findings"][key] for key in ("agreed", "invented", "missed")} == {
        "agreed": 1, "invented": 1, "missed": 1,
    }  # fmt: skip
    contradictory = {"hypotheses": 0.0, "references": 0.0, "micro_f1_without": pytest.approx(1 / 2)}
    assert glance["contradictory_reports"] == contradictory
    assert glance["confusion"]["Pneumothorax"] == {
        "negative": {"negative": 1},
        "not mentioned": {"positive": 1, "not mentioned": 1},
    }
    assert glance["lengths"]["hypotheses"]["median"] == 8
    assert sum(glance["lengths"]["references"]["histogram"].values()) == 3


def test_the_plots_are_pictures(written: Path) -> None:
    for name in ("findings.png", "lengths.png"):
        with Image.open(written / name) as plot:
            assert plot.width > 500


def test_the_page_runs_no_code_and_loads_nothing(written: Path) -> None:
    text = (written / "page.html").read_text()
    HTMLParser().feed(text)
    assert "<script>alert" not in text
    assert "<b>s3" not in text
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text)
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    assert "The heart is enlarged. No pneumothorax." in text
    assert "Research output: not for diagnosis." in text


def test_the_page_of_very_many_studies_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_STUDIES", 2)
    evaluate_file(Predictions(["s1", "s2", "s3"], ["x"] * 3, ["x y"] * 3), tmp_path, Options(meteor=False, resamples=5))
    page = (tmp_path / "page.html").read_text()
    assert "This page shows the first 2 studies." in page
    assert ("s2" in page, "s3" in page) == (True, False)
    assert len(json.loads((tmp_path / "studies.json").read_text())) == 3


def test_an_output_removed_while_it_is_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "draw_plots", lambda folder, result: shutil.rmtree(folder))
    predictions = Predictions(["a", "b"], ["x y", "z"], ["x", "z"])
    with pytest.raises(RunError, match="out was removed while the program wrote to it"):
        evaluate_file(predictions, tmp_path / "out", Options(meteor=False, resamples=5))
    assert not (tmp_path / "out" / "scores.json").exists()


def test_one_long_report_does_not_stretch_the_plots(tmp_path: Path) -> None:
    predictions = Predictions(["a", "b"], ["clear lungs .", "no effusion ."], ["word " * 20_000, "clear"], "p.jsonl")
    evaluate_file(predictions, tmp_path / "out", Options(meteor=False, resamples=20))
    text = (tmp_path / "out" / "page.html").read_text()
    bars = re.findall(r'<div title="([^"]*) words: (\d+) generated', text)
    assert len(bars) == 40
    assert (bars[0], bars[-1]) == (("0 to 9", "1"), ("390 or more", "1"))


_ACTIONS = """
  const studies = () => [...document.querySelectorAll("#studies article")];
  const ids = () => studies().filter((study) => !study.hidden).map((study) => study.dataset.id);
  const change = (id, value, kind) => {
    const field = document.getElementById(id);
    field.value = value;
    field.dispatchEvent(new Event(kind));
    return ids();
  };
  found.first = ids();
  found.byId = change("sort", "id", "change");
  found.byCider = change("sort", "-cider", "change");
  found.byMissed = change("sort", "-missed", "change");
  found.search = change("search", "EFFUSION left", "input");
  found.count = document.getElementById("count").textContent;
  found.nothing = change("search", "no such words", "input");
  found.all = change("search", "", "input");
  const paper = () => getComputedStyle(document.body).backgroundColor;
  found.before = paper();
  document.getElementById("theme").click();
  found.after = paper();
"""


@needs_browser
def test_the_page_works_in_a_browser(written: Path, tmp_path: Path) -> None:
    found = find_on_page((written / "page.html").read_text(), tmp_path, _ACTIONS)
    assert found["first"] == ["s10", "s2", "<b>s3"]
    assert found["byId"][1:] == ["s2", "s10"]  # by number, not by letter
    assert found["byCider"][0] == "s10"
    assert found["byMissed"][0] == "s2"
    assert (found["search"], found["count"], found["nothing"]) == (["s2"], "1 of 3 studies", [])
    assert sorted(found["all"]) == ["<b>s3", "s10", "s2"]
    assert found["before"] != found["after"]
    assert found["requests"] == []
