"""The summary as people see it."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from emrrg_cli.datasets.summary import Example, Repeated, SplitCounts, Summary, summarise
from emrrg_cli.errors import UsageError
from emrrg_cli.imaging.base import EncodedImage
from emrrg_cli.reporting.summary_page import write_summary
from emrrg_cli.reporting.summary_sections import sections, terminal
from emrrg_cli.reporting.tables import DISCLAIMER


@pytest.fixture
def odd() -> Summary:
    """Names that terminals, HTML and file systems stumble over, an image that is none, a split that is empty."""
    broken = EncodedImage("x.png", b"no image")
    return Summary(
        root="/data/[red]set<h1>",
        sources={"phantom": 2},
        splits={"train": SplitCounts(2, 2, 1, 1, 1), "test": SplitCounts()},
        views={"<b>PA": {"train": 2}},
        labels={"labels": {"[bold]edema": {"train": 1, "test": 0}}},
        words={1: 1},
        sentences=[("<script>alert(1)</script>", 1)],
        repeated=Repeated(1, 1, 2, 0, [("[/red] " + "long " * 99, 2)]),
        patients_in_several_splits=4,
        examples=[Example("a\x1b[31m<i>", "train", "phantom", [broken, broken], ["<b>PA", "unknown"], "")],
        manifest={
            "studies_skipped": 1,
            "skipped": {
                "no image [x]": {"unit": "study", "count": 1, "examples": [{"id": "a", "path": "a<b"}]},
                "other": {"unit": "study", "count": 20, "examples": [{"id": "b"}]},
            },
            "notes": {"inverted": {"unit": "image", "count": 2, "examples": []}},
            "remarks": ["Look & see."],
        },
    )


def _printed(summary: Summary, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(terminal(summary))
    return console.export_text()


def test_the_page_has_all_content_and_runs_no_code(odd: Summary, tmp_path: Path) -> None:
    write_summary(odd, tmp_path / "out")
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["page.html", "sheet.png", "summary.json"]
    text = (tmp_path / "out" / "page.html").read_text()
    HTMLParser().feed(text)
    assert "<script>" not in text
    assert "\x1b" not in text
    for said in (
        DISCLAIMER,
        "Synthetic images",
        "Skipped: 1 study",
        "inverted",
        "Patients in more than one split: 4.",
    ):
        assert said in text
    for said in ("Look &amp; see.", "cannot be decoded", "· train · &lt;b&gt;PA · synthetic"):
        assert said in text
    assert "class=bar style='width:12.00rem'" in text
    assert not re.search(r"(src|href)='?http", text)
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert told == odd.as_dict()


def test_the_terminal_shows_the_same(odd: Summary) -> None:
    text = _printed(odd)
    for said in (
        "[red]set<h1>: 2 studies, 2 images",
        "[bold]edema",
        "no image [x]",
        "a, a<b",
        "20 studies",
        "Look & see.",
        DISCLAIMER,
    ):
        assert said in text
    assert "\x1b[31m" not in text
    assert text.count("long") < 45
    assert "…" in text
    assert max(map(len, _printed(odd, 60).splitlines())) <= 60


def test_empty_columns_and_tables_are_omitted(tiny_dataset: Path) -> None:
    found = {section.name: section for section in sections(summarise(tiny_dataset, examples=0))}
    assert list(found) == [
        "Splits", "Views", "Report length, median 11 words", "Repeated reports", "Most frequent reports",
        "Most common sentences",
    ]  # fmt: skip
    assert found["Splits"].heads == ["split", "studies", "images", "without patient"]
    assert found["Views"].rows == {"unknown": ["24", "6", "6", "36"]}


def test_only_the_files_of_a_summary_are_replaced(tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "page.html").write_text("precious")
    with pytest.raises(UsageError, match="has other files than those of a summary"):
        write_summary(summarise(tiny_dataset), tmp_path / "mine")
    assert (tmp_path / "mine" / "page.html").read_text() == "precious"
    write_summary(summarise(tiny_dataset), tmp_path / "out")
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width == 4 * (380 + 24) + 24
    write_summary(summarise(tiny_dataset, examples=0), tmp_path / "out")
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["page.html", "summary.json"]
