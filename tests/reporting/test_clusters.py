from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from emrrg_cli.reporting.clusters import CAPTION, draw_predictions


def test_the_picture_has_each_column_in_its_place(tmp_path: Path) -> None:
    films = np.full((3, 128, 128), 200, np.float32)
    targets = np.full((3, 128, 128), 2.5, np.float32)
    predictions = np.full((3, 128, 128), -9.0, np.float32)
    restored = np.full((3, 128, 128), 60.4, np.float32)
    draw_predictions(films, targets, predictions, restored, tmp_path / "new" / "picture.png", "a run, after epoch 3")
    with Image.open(tmp_path / "new" / "picture.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] == 8 + 4 * 200
    for row in range(3):
        for column, grey in enumerate((200, 255, 0, 60)):
            middle = pixels[44 + row * 200 + 150, 8 + column * 200 + 150]
            assert middle.tolist() == [grey] * 3
            outline = pixels[44 + row * 200, 8 + column * 200 + 40]
            assert len(set(outline.tolist())) > 1
    assert len(np.unique(pixels[-len(CAPTION) * 14 :])) > 10  # the caption is written
