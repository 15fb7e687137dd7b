"""The model that travels with the package, where the checkout has its weights, and the limits that runs state."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emrrg_cli import load_generator
from emrrg_cli.app import main
from emrrg_cli.checksums import CHECKSUMS, check_directory
from emrrg_cli.commands.demo import SEED
from emrrg_cli.default_model import LIMITS, SYNTHETIC_ONLY, default_model_dir, read_limits
from emrrg_cli.errors import RunError
from emrrg_cli.models.film_distance import FILM_DISTANCE

BOX = default_model_dir()
needs_weights = pytest.mark.skipif(not (BOX / "model").is_dir(), reason="this checkout has no default model")


@needs_weights
def test_the_default_model_is_small_complete_and_has_a_card() -> None:
    files = [file for file in BOX.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 15e6
    assert check_directory(BOX)
    assert check_directory(BOX / "model")
    assert {LIMITS, FILM_DISTANCE} <= set(json.loads((BOX / CHECKSUMS).read_text()))
    assert read_limits(BOX) == SYNTHETIC_ONLY
    card = (BOX / "README.md").read_text()
    assert "not for clinical use" in card
    trained_on = re.search(r"--seed (\d+)", card)
    assert trained_on is not None
    assert int(trained_on[1]) != SEED  # of the demo
    for file in (file for file in files if file.suffix in (".json", ".yaml", ".md")):
        assert not re.search(r"/(tmp|root|home|work)/", file.read_text()), file


@pytest.mark.slow
@needs_weights
def test_the_default_model_marks_noise_as_unlike(tmp_path: Path) -> None:
    data, reports, films = tmp_path / "data", tmp_path / "reports", tmp_path / "films"
    size = str(load_generator(device="cpu").recipe.model.encoder.image_size)
    drawing = ["--count", "20", "--size", size, "--split", "0,0,1", "--workers", "1"]
    assert main(["preprocess", "phantom", str(data), "--seed", str(SEED), *drawing]) == 0
    films.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8)
    Image.fromarray(noise).save(films / "noise.png")
    assert main(["generate", str(data), str(films), "--output", str(reports), "--no-grounding"]) == 0
    rows = [json.loads(line) for line in (reports / "reports.jsonl").read_text().splitlines()]
    assert all(row["report"] for row in rows)
    unlike = [row["study"] for row in rows if any("do not read the report" in note for note in row["notes"])]
    assert str(films / "noise.png") in unlike
    assert len(unlike) <= 3


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a" * 1001])
def test_limits_that_cannot_be_read_are_an_error(content: bytes, tmp_path: Path) -> None:
    assert read_limits(tmp_path) == ""
    (tmp_path / LIMITS).write_bytes(b" knows drawings\nonly.\n")
    assert read_limits(tmp_path) == "knows drawings only"
    (tmp_path / LIMITS).write_bytes(content)
    with pytest.raises(RunError, match="the limits of a model, cannot be read"):
        read_limits(tmp_path)
