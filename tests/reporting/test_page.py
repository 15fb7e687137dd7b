"""The page: complete, escaped, with its images inside."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from emrrg_cli.reporting.page import Card, Page, write_page
from emrrg_cli.reporting.tables import DISCLAIMER


def test_page(tmp_path: Path) -> None:
    image = Image.linear_gradient("L").resize((800, 600))
    cards = [
        Card("a<b>.png", [image, image], "lungs & heart <script>", truth="clear"),
        Card("second", [image], ""),
    ]
    page = Page("Title", "Synthetic films", cards, [("Scores", {"BLEU-1": ["0.5", "0.1"]})])
    write_page(tmp_path / "page.html", page)
    text = (tmp_path / "page.html").read_text()
    HTMLParser().feed(text)
    assert DISCLAIMER in text
    assert "<script>" not in text
    assert "a&lt;b&gt;.png" in text
    assert "(empty)" in text
    assert text.count("<h3>Reference</h3>") == 1  # the second study has none
    sources = re.findall(r"data:image/jpeg;base64,([^']+)'", text)
    assert len(sources) == 3
    shown = Image.open(io.BytesIO(base64.b64decode(sources[0])))
    assert shown.size == (480, 360)
    assert not re.search(r"(src|href)='?http", text)  # nothing is fetched
