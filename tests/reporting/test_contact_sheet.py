from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from emrrg_cli.reporting.contact_sheet import Tile, _font, _wrapped, draw_contact_sheet


def test_a_sheet_shows_all_studies_and_grows_with_reports(tmp_path: Path) -> None:
    grey = Image.new("L", (200, 100), 128)
    tiles = [
        Tile("study [1]", "train · PA", [grey, grey, grey], "Short."),
        Tile("étude 胸", "test", [None], "word " * 300),
        *[Tile(f"s{n}", "train", [Image.new("L", (10, 900), 255)], "") for n in range(4)],
    ]
    draw_contact_sheet(tmp_path / "new" / "sheet.png", "A <title>", "synthetic", tiles)
    draw_contact_sheet(tmp_path / "one.png", "title " * 99, "", tiles[:1])
    with Image.open(tmp_path / "new" / "sheet.png") as sheet, Image.open(tmp_path / "one.png") as one:
        assert sheet.size[0] == 4 * (380 + 24) + 24
        assert one.size[0] == 720
        assert sheet.size[1] > 2 * one.size[1]
        pixels = np.asarray(sheet.convert("L"))
    middle = pixels[96 + 150, 24 : 24 + 380]
    assert (middle == 128).sum() > 360  # two images side by side, the third is counted
    assert (pixels[96 : 96 + 300, 24 + 404 : 24 + 404 + 380] > 150).sum() > 50  # "cannot be decoded"
    below = pixels[-300:]
    assert (below > 250).any()


def test_text_is_cut_to_its_width_and_its_lines() -> None:
    font = _font(15)
    text = "Heart size is normal. " * 40
    lines = _wrapped(text, font, 300, 5)
    assert len(lines) == 5
    assert all(font.getlength(line) <= 300 for line in lines)
    assert lines[-1].endswith("…")
    assert " ".join(lines[:-1]) == text[: len(" ".join(lines[:-1]))]
    assert _wrapped("short text", font, 300, 5) == ["short text"]
    assert _wrapped("", font, 300, 1) == [""]
    unbroken = _wrapped("x" * 200, font, 100, 50)
    assert "".join(unbroken) == "x" * 200
    assert all(font.getlength(line) <= 100 for line in unbroken)
