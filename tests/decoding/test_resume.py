"""A second run in the same output: what it keeps, what it writes again, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from emrrg_cli.decoding import read_studies
from emrrg_cli.decoding.fingerprint import fingerprint_of
from emrrg_cli.decoding.outputs import Output
from emrrg_cli.decoding.studies import StudyFiles, find_studies
from emrrg_cli.errors import Interrupted, UsageError
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from tests.decoding.test_generate_folder import Writer, recipe, run_generation, writer

__all__ = ["recipe", "writer"]  # fixtures


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """A study of two films in a subfolder, and a third film."""
    folder = tmp_path / "films"
    for number, name in enumerate(("s/1.png", "s/2.png", "x.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 30), 50 * number).save(folder / name)
    return folder


def _records(out: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "reports.jsonl").read_text().splitlines()]
    assert len({row["study"] for row in rows}) == len(rows)
    return {row["study"]: row for row in rows}


def test_a_study_with_other_files_is_written_again(
    tmp_path: Path, films: Path, writer: Writer, recipe: FinetuneRecipe
) -> None:
    out, study = tmp_path / "out", str(films / "s")

    def run() -> Any:
        return run_generation(list(find_studies([str(films)])), tmp_path / "run", recipe, out)

    run()
    (films / "s" / "3.png").write_bytes((films / "x.png").read_bytes())
    (films / "s" / "4.png").write_text("broken")
    result = run()
    assert (result.earlier, result.changed, result.reports) == (1, 1, 2)
    row = _records(out)[study]
    assert (len(row["files"]), row["unused_files"]) == (3, [str(films / "s" / "4.png")])
    assert (run().earlier, sum(writer.batches)) == (2, 3)  # nothing has changed
    for name in ("2.png", "3.png", "4.png"):
        (films / "s" / name).unlink()
    assert run().changed == 1
    assert _records(out)[study]["files"] == [str(films / "s" / "1.png")]


def test_a_file_that_was_replaced_is_noticed(
    tmp_path: Path, films: Path, writer: Writer, recipe: FinetuneRecipe
) -> None:
    out, broken = tmp_path / "out", films / "s" / "broken.png"
    broken.write_text("not yet")

    def changed() -> int:
        result = run_generation(list(find_studies([str(films)])), tmp_path / "run", recipe, out)
        assert result.reports == 2
        return result.changed

    assert (changed(), changed()) == (0, 0)
    shutil.copy(films / "x.png", films / "y.png")  # a copy of the folder: other times, the same content
    (films / "y.png").replace(films / "x.png")
    os.utime(films / "x.png", ns=(1, 1))
    assert changed() == 0
    Image.new("L", (20, 30), 99).save(films / "x.png")
    assert (changed(), changed()) == (1, 0)
    content = bytearray((films / "s" / "2.png").read_bytes())
    content[-5] ^= 1  # of the same size
    (films / "s" / "2.png").write_bytes(content)
    assert (changed(), changed()) == (1, 0)
    shutil.copy(films / "x.png", broken)  # mended
    assert (changed(), changed()) == (1, 0)
    # Records of earlier versions have no stamps.
    rows = [{name: value for name, value in row.items() if name != "stamps"} for row in _records(out).values()]
    (out / "reports.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("L", (20, 30), 7).save(films / "x.png")
    assert changed() == 0


def test_another_grouping_of_the_files_is_refused(
    tmp_path: Path, films: Path, writer: Writer, recipe: FinetuneRecipe
) -> None:
    arguments = (tmp_path / "run", recipe, tmp_path / "out")
    run_generation(list(find_studies([str(films)])), *arguments)
    before = (tmp_path / "out" / "reports.jsonl").read_text()
    single = list(find_studies([str(films)], "file"))
    with pytest.raises(UsageError, match=r"report of study .*films/s, but its image .*1\.png is now in study .*1\.png"):
        run_generation(single, *arguments)
    assert (tmp_path / "out" / "reports.jsonl").read_text() == before
    assert run_generation(single, *arguments, overwrite=True).reports == 3
    other = tmp_path / "other.png"
    other.write_bytes((films / "x.png").read_bytes())
    assert run_generation([other], *arguments).earlier == 3  # studies of other files stay


def test_a_study_of_very_many_images_is_bounded(
    tmp_path: Path, films: Path, writer: Writer, recipe: FinetuneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_studies, "_MOST_VIEWS", 2)
    files = tuple(tmp_path / f"{number}.png" for number in range(5))
    for file in files[1:]:
        Image.new("L", (20, 30)).save(file)
    studies = [StudyFiles("many", files, ("",) * 5), *find_studies([str(films)])]
    result = run_generation(studies, tmp_path / "run", recipe, tmp_path / "out")
    row = _records(tmp_path / "out")["many"]
    assert (row["files"], row["unused_files"]) == ([str(f) for f in files[1:3]], [str(files[n]) for n in (0, 3, 4)])
    assert row["notes"][0] == "only 2 of 5 images of study many are used; data.max_views=N allows more"
    assert (result.reports, result.first_noted[0][0]) == (3, str(files[1]))
    more = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_views": 4})})
    run_generation(studies[:1], tmp_path / "run", more, tmp_path / "more")
    assert len(_records(tmp_path / "more")["many"]["files"]) == 4


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_stopped_replacement_is_continued(
    overwrite: bool, tmp_path: Path, films: Path, writer: Writer, recipe: FinetuneRecipe
) -> None:
    out, run_dir = tmp_path / "out", tmp_path / "run"
    for number in range(4):
        Image.new("L", (20, 30), 40 * number).save(films / f"{number}.png")
    files = list(find_studies([str(films)], "file"))
    run_generation(files, run_dir, recipe, out)
    before, asked = (out / "reports.jsonl").read_text(), recipe.generation.model_copy(update={"num_beams": 7})
    beams = recipe.model_copy(update={"generation": asked})
    writer.batches.clear()
    writer.before = lambda: os.kill(os.getpid(), signal.SIGINT) if writer.batches else None  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match=r"earlier reports are unchanged; run it again to continue"):
        run_generation(files, run_dir, beams, out, overwrite=True)
    assert (out / "reports.jsonl").read_text() == before
    writer.before = lambda: None  # type: ignore[method-assign]
    other = [replace(file, context={"age": "45 years"}) for file in files]
    place = Output(out, None, fingerprint_of(run_dir, beams))
    place.find_earlier(other, overwrite=True)
    assert len(place.records) == 0
    result = run_generation(files, run_dir, beams, out, overwrite=overwrite)
    assert (result.earlier, result.reports) == (2, 7)
    assert len({row["fingerprint"] for row in _records(out).values()}) == 1
    assert not list(out.glob("*.partial"))


def test_a_stopped_replacement_of_other_studies_is_not_kept(
    tmp_path: Path, films: Path, writer: Writer, recipe: FinetuneRecipe
) -> None:
    arguments, files = (tmp_path / "run", recipe, tmp_path / "out"), list(find_studies([str(films)], "file"))
    run_generation(files, *arguments)
    writer.batches.clear()
    writer.before = lambda: os.kill(os.getpid(), signal.SIGINT) if writer.batches else None  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        run_generation(files, *arguments, overwrite=True)
    writer.before = lambda: None  # type: ignore[method-assign]
    other = tmp_path / "other.png"
    other.write_bytes((films / "x.png").read_bytes())
    assert run_generation([other], *arguments).reports == 4
    assert not list((tmp_path / "out").glob("*.partial"))


def test_reports_of_other_studies_do_not_hide_a_failure(
    tmp_path: Path, films: Path, writer: Writer, recipe: FinetuneRecipe
) -> None:
    arguments, files = (tmp_path / "run", recipe, tmp_path / "out"), list(find_studies([str(films)], "file"))
    run_generation(files, *arguments)
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    result = run_generation([broken], *arguments)
    assert (result.reports, result.of_call) == (3, 0)
    assert run_generation([broken, *files], *arguments).of_call == 3
