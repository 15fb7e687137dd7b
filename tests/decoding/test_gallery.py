"""The page of a run: cards that are kept from run to run, and what the options leave out."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from emrrg_cli.decoding import generate_folder as folder
from emrrg_cli.decoding.cards import PageOptions, pictures_with_maps, small_picture
from emrrg_cli.decoding.shards import Shard
from emrrg_cli.decoding.studies import StudyFiles
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.reporting import gallery
from tests.decoding.test_generate_folder import Writer, recipe, run_generation, writer

__all__ = ["recipe", "writer"]  # fixtures


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Five images of different greys and sizes."""
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        Image.new("L", (600, 700 + number), 20 * number).save(path)
    return paths


def cards(out: Path, name: str = "page.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def page(out: Path) -> str:
    return (out / "page.html").read_text()


def test_a_picture_is_small_and_complete() -> None:
    address = small_picture(Image.linear_gradient("L").resize((1400, 1000)))
    kind, _, data = address.partition(",")
    assert kind == "data:image/webp;base64"
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert shown.size == (512, 366)
    assert abs(np.asarray(shown.convert("L"))[:, 200].mean() - 127) < 8
    assert len(data) < 20_000


def test_maps_are_kept_at_8_bits() -> None:
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    maps[0] /= maps[0].sum()
    found = pictures_with_maps(["a"], maps)
    assert (found.grid, found.maps[1], found.peaks) == (2, "", [1.6, 0.0])
    assert list(base64.b64decode(found.maps[0])) == [64, 128, 191, 255]


def test_the_page_shows_reports_pictures_and_maps(
    tmp_path: Path, files: list[Path], writer: Writer, recipe: FinetuneRecipe
) -> None:
    (tmp_path / "x.txt").write_text("no image")
    shown = PageOptions(command="emrrg generate 'films & more'")
    run_generation([*files, tmp_path / "x.txt"], tmp_path / "run", recipe, tmp_path / "out", page=shown)
    text = page(tmp_path / "out")
    assert text.count("<article") == text.count("data:image/webp") == text.count("data-map=") == 5
    for said in ("emrrg generate &#39;films &amp; more&#39;", "1 file was skipped", "not an image", "5 reports"):
        assert said in text
    assert [card["study"] for card in cards(tmp_path / "out")] == [str(file) for file in files]
    assert sum(writer.grounded) == 5
    assert max(writer.grounded) == 2  # a batch at a time
    values = base64.b64decode(cards(tmp_path / "out")[0]["maps"][0])
    assert list(values) == [255, 64, 64, 64]


def test_all_views_of_a_study_are_shown(
    tmp_path: Path, files: list[Path], writer: Writer, recipe: FinetuneRecipe
) -> None:
    study = StudyFiles("s", tuple(files[:2]), ("PA", "LATERAL"))
    run_generation([study], tmp_path / "run", recipe, tmp_path / "out")
    (card,) = cards(tmp_path / "out")
    assert len(card["images"]) == 2
    assert len(base64.b64decode(card["maps"][0])) == 2 * 2 * 2
    assert "<figcaption>LATERAL" in page(tmp_path / "out")


def test_a_later_run_shows_the_cards_of_earlier_ones(
    tmp_path: Path, files: list[Path], writer: Writer, recipe: FinetuneRecipe
) -> None:
    arguments = (tmp_path / "run", recipe, tmp_path / "out")
    run_generation(files[:3], *arguments)
    run_generation(files, *arguments)
    assert sum(writer.grounded) == 5
    assert page(tmp_path / "out").count("data-map=") == 5
    whole = run_generation(files, tmp_path / "run", recipe, tmp_path / "whole")
    assert whole.reports == 5
    assert cards(tmp_path / "out") == cards(tmp_path / "whole")


def test_the_cards_of_a_killed_run_are_kept(
    tmp_path: Path, files: list[Path], writer: Writer, recipe: FinetuneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed() -> None:
        if len(writer.batches) == 2:
            raise KeyboardInterrupt

    writer.before = killed  # type: ignore[method-assign]
    arguments = (tmp_path / "run", recipe, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(folder._Run, "_finish", lambda *_: None)  # as after kill -9
        with pytest.raises(KeyboardInterrupt):
            run_generation(files, *arguments)
    with (tmp_path / "out" / "page.jsonl.partial").open("a") as file:
        file.write('{"study": "cut of')
    assert len((tmp_path / "out" / "page.jsonl.partial").read_text().splitlines()) == 5
    writer.before = lambda: None  # type: ignore[method-assign]
    run_generation(files, *arguments)
    assert page(tmp_path / "out").count("data-map=") == 5
    assert not (tmp_path / "out" / "page.jsonl.partial").exists()


def test_a_study_without_its_card_is_written_again(
    tmp_path: Path, files: list[Path], writer: Writer, recipe: FinetuneRecipe
) -> None:
    arguments = (tmp_path / "run", recipe, tmp_path / "out")
    run_generation(files[:4], *arguments)
    kept = (tmp_path / "out" / "page.jsonl").read_text().splitlines(keepends=True)
    foreign = json.dumps(json.loads(kept[2]) | {"fingerprint": "another"}) + "\n"
    broken = json.dumps(json.loads(kept[3]) | {"images": [5]}) + "\n"
    (tmp_path / "out" / "page.jsonl").write_text(kept[0] + foreign + broken)
    run_generation(files, *arguments)
    assert page(tmp_path / "out").count("data-map=") == len(cards(tmp_path / "out")) == 5
    (tmp_path / "out" / "page.jsonl").unlink()
    assert run_generation(files[3:], *arguments).written == 2
    text = page(tmp_path / "out")
    assert (text.count("<article"), text.count("data-map="), text.count("No picture was saved")) == (5, 2, 3)


def test_overwriting_replaces_the_cards(
    tmp_path: Path, files: list[Path], writer: Writer, recipe: FinetuneRecipe
) -> None:
    arguments = (tmp_path / "run", recipe, tmp_path / "out")
    run_generation(files[:3], *arguments)
    run_generation(files[3:], *arguments, overwrite=True)
    assert [card["study"] for card in cards(tmp_path / "out")] == [str(file) for file in files[3:]]
    assert page(tmp_path / "out").count("<article") == 2


def test_the_number_of_studies_on_the_page(
    tmp_path: Path, files: list[Path], writer: Writer, recipe: FinetuneRecipe
) -> None:
    run_generation(files, tmp_path / "run", recipe, tmp_path / "two", page=PageOptions(2))
    assert "5 reports; 2 are shown" in page(tmp_path / "two")
    assert page(tmp_path / "two").count("<article") == len(cards(tmp_path / "two")) == 2
    assert sum(writer.grounded) == 2
    run_generation(files, tmp_path / "run", recipe, tmp_path / "none", page=PageOptions(0))
    run_generation(files, tmp_path / "run", recipe, tmp_path / "part", shard=Shard(0, 2))
    for name in ("none", "part"):
        assert list((tmp_path / name).glob("page*")) == []
    assert sum(writer.grounded) == 2


def test_without_grounding_there_are_only_pictures(
    tmp_path: Path, files: list[Path], writer: Writer, recipe: FinetuneRecipe
) -> None:
    run_generation(files, tmp_path / "run", recipe, tmp_path / "out", page=PageOptions(grounding=False))
    text = page(tmp_path / "out")
    assert (text.count("data:image/webp"), text.count("data-map="), writer.grounded) == (5, 0, [])
    assert "see where the model looked" not in text


def test_a_missing_page_or_table_is_made_again(
    tmp_path: Path, files: list[Path], writer: Writer, recipe: FinetuneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "STUDIES_A_PAGE", 3)
    (tmp_path / "s.png").write_text("no image")
    study = StudyFiles("s", (files[0], tmp_path / "s.png"), ("", ""))
    arguments = ([study, *files[1:]], tmp_path / "run", recipe, tmp_path / "out")
    run_generation(*arguments)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {"page-2.html", "skipped.jsonl"} < before.keys()
    for name in ("page.html", "page-2.html", "reports.csv"):
        (tmp_path / "out" / name).unlink()
        assert run_generation(*arguments).written == 0
        assert {file.name for file in (tmp_path / "out").iterdir()} == before.keys()
    assert (tmp_path / "out" / "reports.csv").read_bytes() == before["reports.csv"]


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_files_take_no_place_on_the_page(
    workers: int,
    tmp_path: Path,
    files: list[Path],
    writer: Writer,
    recipe: FinetuneRecipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(folder, "reading_processes", lambda device: workers)
    for file in files[:2]:
        file.write_text("no image")
    run_generation(files, tmp_path / "run", recipe, tmp_path / "out", page=PageOptions(2))
    assert page(tmp_path / "out").count("data-map=") == 2
    assert [Path(card["study"]).name for card in cards(tmp_path / "out")] == ["2.png", "3.png"]
