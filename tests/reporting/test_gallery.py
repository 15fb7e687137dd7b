"""The gallery: what stands on its pages, and how it behaves in a real browser."""

from __future__ import annotations

import base64
import re
import tracemalloc
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emrrg_cli.datasets.report_text import readable_report, sentence_spans
from emrrg_cli.reporting.gallery import About, Pictures, shaded_words, write_gallery
from emrrg_cli.reporting.tables import DISCLAIMER
from tests.browser import find_on_page, needs_browser, print_page

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
ABOUT = About(
    facts=[("Model", "runs/<b>x"), ("Command", "emrrg generate films/ --model 'runs/<b>x'")],
    skipped=[("a<i>.txt", "not an image")],
    skipped_count=3,
    reports=3,
    map_note="The map is the attention.",
)


def encoded(*places: int) -> str:
    """A map of two views of 2 x 2 patches with 255 at one place of each view (-1: nowhere)."""
    values = np.zeros((2, 4), np.uint8)
    for view, place in enumerate(places):
        if place >= 0:
            values[view, place] = 255
    return base64.b64encode(values.tobytes()).decode()


def record(name: str, text: str, sure: list[float], **others: Any) -> dict[str, Any]:
    spans = sentence_spans(text)
    sentences = [{"start": a, "end": b, "confidence": 0.5 + 0.1 * n} for n, (a, b) in enumerate(spans)]
    return {
        "study": name,
        "report": text,
        "views": ["PA", "LATERAL"],
        "sentences": sentences,
        "word_confidence": sure,
        "mean_token_logprob": float(np.log(sure).mean()) if sure else -1.0,
        "findings": {},
        "notes": [],
        **others,
    }


def studies() -> Iterator[tuple[dict[str, Any], Pictures]]:
    two = Pictures([PIXEL, PIXEL], 2, [encoded(1, -1), encoded(-1, 2)], [8.0, 8.0])
    text = "the heart is enlarged . no pneumothorax ."
    findings = {"Cardiomegaly": "positive", "Pneumothorax": "negative"}
    yield (
        record(
            "films/s10.png",
            text,
            [1, 1, 1, 0.04, 1, 0.7, 1, 1],
            findings=findings,
            context={"indication": "pain <now>"},
        ),
        two,
    )
    uncertain = {"Edema": "uncertain"}
    yield (
        record("films/s2.png", "possible edema .", [0.9, 0.9, 1], findings=uncertain, notes=["looks inverted"]),
        Pictures([PIXEL], 2, [""], [0.0]),
    )
    yield record("<b>s3", "<script>alert(1)</script> & co .", [0.1] * 4), Pictures()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path,) = write_gallery(tmp_path_factory.mktemp("gallery"), ABOUT, studies(), 3)
    return path


def test_the_page_shows_everything_and_escapes_it(page: Path) -> None:
    text = page.read_text()
    HTMLParser().feed(text)
    for said in (
        DISCLAIMER,
        "runs/&lt;b&gt;x",
        "3 files were skipped",
        "a&lt;i&gt;.txt",
        "All are in skipped.jsonl",
        "PA",
    ):
        assert said in text
    assert "<script>alert" not in text
    assert "<b>s3" not in text
    assert "&lt;script&gt;alert(1)" in text.lower()
    assert "default-src 'none'" in text or "default-src &#39;none&#39;" in text
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text)
    assert text.count("data:image/png") == 3
    assert text.count("data-map=") == 2
    assert "Edema?" in text
    assert "looks inverted" in text
    assert "Context given to the model: indication: pain &lt;now&gt;" in text
    assert ">enlarged</i>" in text


def test_a_page_may_have_no_studies_and_no_facts(tmp_path: Path) -> None:
    (path,) = write_gallery(tmp_path, About([]), iter(()), 0)
    assert DISCLAIMER in path.read_text()


def test_an_earlier_record_without_confidence_is_shown(tmp_path: Path) -> None:
    row = {"study": "s", "report": "the lungs are clear . no effusion .", "findings": {}, "notes": []}
    (path,) = write_gallery(tmp_path, About([]), [(row, Pictures([PIXEL]))], 1)
    text = path.read_text()
    assert "The lungs are clear." in text
    assert "No effusion." in text
    assert "confidence 0" not in text


def test_a_compared_report_shows_agreement(tmp_path: Path) -> None:
    row = record("s", "a nodule . clear .", [1.0] * 5, findings={"Lung Lesion": "positive"})
    row["sentence_tags"] = ["bad", ""]
    row["reference"] = [("an effusion <b> .", "missed"), ("clear .", "")]
    row["tags"] = [("nodule", "bad"), ("effusion", "missed")]
    tables = [("F1", {"nodule": ["0.00"]})]
    about = About([], title="Compared", tables=tables, legend=[("nowhere", "missed")], limits="it knows nothing")
    (path,) = write_gallery(tmp_path, about, [(row, Pictures([PIXEL]))], 1)
    text = path.read_text()
    HTMLParser().feed(text)
    assert "<h1>Compared</h1>" in text
    assert "<p class=warning>Note: it knows nothing.</p>" in text
    assert '<span class="sentence is-bad"' in text
    assert "<span class=is-missed>An effusion &lt;b&gt;.</span>" in text
    assert 'data-findings="nodule: invented|effusion: missed"' in text
    assert text.count("<span class='tag missed'>") == 2
    assert "Lung Lesion" not in text


@pytest.mark.parametrize(
    "text",
    ["the heart is enlarged .", "No acute disease.", "a , b ; c ( d ) .", "clear . .", "size 1.5 cm .", "", "."],
)
def test_shaded_words_are_the_readable_sentence(text: str) -> None:
    words = text.split(" ")
    pieces = shaded_words(text, [0.5] * len(words))
    assert "".join(piece for piece, _ in pieces) == readable_report(text)
    assert shaded_words(text, [0.5] * (len(words) + 1)) == [(readable_report(text), 0)]


def test_shading_grows_as_confidence_falls() -> None:
    pieces = shaded_words("the heart is enlarged .", [1.0, 0.95, 0.85, 0.04, 0.5])
    assert pieces == [("The", 0), (" heart", 0), (" is", 1), (" enlarged", 9), (".", 5)]


# -- many studies ---------------------------------------------------------------------------------------------------


def many(count: int, picture: str = PIXEL) -> Iterator[tuple[dict[str, Any], Pictures]]:
    for number in range(count):
        yield record(f"{number:05}", "the lungs are clear .", [1.0] * 5), Pictures([picture], 2, [encoded(0)], [4.0])


def test_there_are_500_studies_a_page_and_links(tmp_path: Path) -> None:
    for name in ("page-3.html", "page-4.html", "page-x.html"):
        (tmp_path / name).write_text("older")
    paths = write_gallery(tmp_path, About([], reports=2000), many(1001), 1001)
    assert [path.name for path in paths] == ["page.html", "page-2.html", "page-3.html"]
    texts = [path.read_text() for path in paths]
    assert [text.count("<article") for text in texts] == [500, 500, 1]
    assert 'data-name="00500"' in texts[1]
    assert 'href="page-3.html"' in texts[1]
    assert 'href="page.html"' in texts[2]
    assert "2,000 reports; 1,001 are shown" in texts[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "page-2.html", "page-3.html", "page-x.html", "page.html",
    ]  # fmt: skip


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pictures(tmp_path: Path) -> None:
    picture = "data:image/webp;base64," + "A" * 200_000
    peaks = []
    for count in (20, 300):
        tracemalloc.start()
        write_gallery(tmp_path, About([]), many(count, picture), count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "page.html").stat().st_size > 60e6
    assert peaks[1] < peaks[0] + 10e6


# -- in a browser ---------------------------------------------------------------------------------------------------

_TOOLS = """
  const get = (id) => document.getElementById(id);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const names = () => all("#studies .study").filter((study) => !study.hidden).map((study) => study.dataset.name);
  const change = (id, value, kind) => {
    get(id).value = value;
    get(id).dispatchEvent(new Event(kind, { bubbles: true }));
    return names();
  };
  const press = (key, target = document.activeElement) =>
    target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  const point = (kind, target, pointerType) =>
    target.dispatchEvent(new PointerEvent(kind, { pointerType, bubbles: true, relatedTarget: document.body }));
  const heat = (card) => [...card.querySelectorAll(".film")].map((film) => {
    const canvas = film.querySelector("canvas.on");
    if (!canvas) return null;
    const copy = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    return [...copy.getImageData(0, 0, 2, 2).data].filter((_, n) => n % 4 === 3);
  });
  const [first, second] = all(".sentence[data-map]");
  const card = first.closest(".study");
"""


@needs_browser
def test_sentences_show_their_maps_in_a_browser(page: Path, tmp_path: Path) -> None:
    script = (
        _TOOLS
        + """
  found.before = heat(card);
  point("pointerover", first, "mouse");
  found.hover = heat(card);
  found.hint = card.querySelector(".hint").textContent;
  point("pointerout", first, "mouse");
  found.left = heat(card);
  second.focus();
  found.focus = heat(card);
  second.blur();
  found.blurred = heat(card);
  point("pointerover", first, "touch");
  found.touched = heat(card);
  first.click();
  found.tapped = heat(card);
  point("pointerover", second, "mouse");
  point("pointerout", second, "mouse");
  found.pinned = heat(card);
  first.click();
  found.again = heat(card);
"""
    )
    found = find_on_page(page.read_text(), tmp_path, script)
    nothing, one, two = [None, None], [[0, 150, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 150, 0]]
    assert found["before"] == found["left"] == found["blurred"] == found["touched"] == found["again"] == nothing
    assert found["hover"] == found["tapped"] == found["pinned"] == one
    assert found["focus"] == two
    assert found["hint"] == "Confidence of the sentence 0.50. The strongest patch has 8.0 times an even share."
    assert found["requests"] == []


@needs_browser
@pytest.mark.parametrize("width", [500, 800, 1200])
def test_the_page_does_not_scroll_to_the_side(page: Path, tmp_path: Path, width: int) -> None:
    script = "found.widths = [document.documentElement.scrollWidth, document.documentElement.clientWidth];"
    found = find_on_page(page.read_text(), tmp_path, script, f"--window-size={width},700")
    assert found["widths"][0] == found["widths"][1]


@needs_browser
def test_search_filters_and_order_in_a_browser(page: Path, tmp_path: Path) -> None:
    script = (
        _TOOLS
        + """
  found.all = names();
  found.search = change("search", "HEART enlarged", "input");
  found.count = get("count").textContent;
  found.none = change("search", "no such words", "input");
  found.nothing = get("nothing").hidden;
  get("reset").click();
  found.options = [...get("finding").options].map((option) => option.textContent);
  found.finding = change("finding", "Edema", "change");
  change("finding", "", "change");
  get("noted").click();
  found.noted = names();
  get("noted").click();
  found.low = change("sort", "low", "change");
  found.high = change("sort", "high", "change");
  found.name = change("sort", "name", "change");
  found.order = change("sort", "order", "change");
  const shade = () => getComputedStyle(all(".sentence .u9")[0]).backgroundColor;
  found.unshaded = shade();
  get("shade").click();
  found.shaded = shade();
  const looks = () => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color];
  found.light = looks();
  get("theme").click();
  found.dark = looks();
"""
    )
    found = find_on_page(page.read_text(), tmp_path, script)
    assert found["all"] == found["order"] == ["films/s10.png", "films/s2.png", "<b>s3"]
    assert (found["search"], found["count"]) == (["films/s10.png"], "1 of 3 studies")
    assert (found["none"], found["nothing"]) == ([], False)
    assert found["options"] == ["any finding", "Cardiomegaly (1)", "Edema (1)"]
    assert found["finding"] == found["noted"] == ["films/s2.png"]
    assert found["low"][0] == found["high"][-1] == "<b>s3"
    assert found["name"][1:] == ["films/s2.png", "films/s10.png"]  # by number, not by letter
    assert found["unshaded"] == "rgba(0, 0, 0, 0)" != found["shaded"]
    assert found["light"] == ["rgb(255, 255, 255)", "rgb(28, 32, 36)"]
    assert found["dark"] == ["rgb(21, 24, 27)", "rgb(228, 230, 232)"]


@needs_browser
def test_the_keyboard_moves_and_enlarges_in_a_browser(page: Path, tmp_path: Path) -> None:
    script = (
        _TOOLS
        + """
  const at = () => document.activeElement.dataset.name;
  const large = get("large");
  press("j");
  found.j = at();
  press("ArrowDown");
  found.down = at();
  press("k");
  found.k = at();
  press("k");
  found.top = at();
  press("Enter");
  found.opened = [large.open, large.querySelector(".study").dataset.name];
  const copy = large.querySelector(".sentence[data-map]");
  point("pointerover", copy, "mouse");
  found.map = heat(copy.closest(".study"));
  press("j");
  found.next = large.querySelector(".study").dataset.name;
  press("Enter");
  found.closed = [large.open, at()];
  press("/");
  found.slash = document.activeElement.id;
  get("search").value = "heart";
  get("search").dispatchEvent(new Event("input"));
  press("j", get("search"));
  found.typing = document.activeElement.id;
  press("Escape", get("search"));
  found.escaped = [get("search").value, names().length];
  first.click();
  press("Escape", document.body);
  found.unpinned = heat(card);
  card.querySelector(".film").click();
  found.clicked = large.open;
"""
    )
    found = find_on_page(page.read_text(), tmp_path, script)
    assert (found["j"], found["down"]) == ("films/s10.png", "films/s2.png")
    assert found["k"] == found["top"] == "films/s10.png"
    assert found["opened"] == [True, "films/s10.png"]
    assert found["map"] == [[0, 150, 0, 0], [0, 0, 0, 0]]
    assert found["next"] == "films/s2.png"
    assert found["closed"] == [False, "films/s2.png"]
    assert found["slash"] == found["typing"] == "search"
    assert found["escaped"] == ["", 3]
    assert (found["unpinned"], found["clicked"]) == ([None, None], True)


@needs_browser
def test_a_narrow_dark_screen_has_no_sideways_scroll(page: Path, tmp_path: Path) -> None:
    script = """
  found.wide = document.documentElement.scrollWidth > innerWidth;
  found.width = innerWidth;
  found.paper = getComputedStyle(document.body).backgroundColor;
"""
    options = ("--window-size=500,800", "--blink-settings=preferredColorScheme=0")
    found = find_on_page(page.read_text(), tmp_path, script, *options)
    assert found["width"] <= 500
    assert not found["wide"]
    assert found["paper"] == "rgb(21, 24, 27)"


@needs_browser
def test_a_printed_page_has_at_most_two_studies_a_sheet(tmp_path: Path) -> None:
    (path,) = write_gallery(tmp_path, ABOUT, many(8), 8)
    content, sheets = print_page(path, tmp_path)
    assert content.startswith(b"%PDF")
    assert sheets in (4, 5)
