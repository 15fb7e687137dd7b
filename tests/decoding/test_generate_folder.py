"""Reports for files and folders: what is looked at, what is skipped, and what is left when the work is cut short."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageFile

from emrrg_cli.decoding import generate_folder as folder
from emrrg_cli.decoding.confidence import Confidence, Sentence
from emrrg_cli.decoding.generate_folder import Written
from emrrg_cli.decoding.outputs import merge_shards
from emrrg_cli.decoding.read_studies import read_studies
from emrrg_cli.decoding.shards import Shard
from emrrg_cli.decoding.studies import StudyFiles, find_studies, table_studies
from emrrg_cli.decoding.writer import Studies, WrittenReport
from emrrg_cli.errors import Interrupted, RunError, UsageError
from emrrg_cli.imaging.image_paths import find_images
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.recipe.load import load_recipe


class Writer:
    """In place of a model: the mean grey value of each image, and what happens before a batch."""

    model = torch.nn.Identity()
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.numbers: list[int] = []
        self.grounded: list[int] = []

    def before(self) -> None: ...

    def write(self, studies: Iterable[Studies]) -> Iterator[list[WrittenReport]]:
        for some in studies:
            self.before()
            self.batches.append(len(some.keys))
            self.numbers += some.numbers
            pixels = torch.split(some.pixels, some.views.tolist())
            texts = [f'grey "{study.float().mean():.0f}",\n{tuple(study.shape)}' for study in pixels]
            sure = Confidence(-0.25, [Sentence(0, 4, 0.9)], [0.8, 1.0], [0, -1])
            yield [WrittenReport(key, text, -0.5, [5, 2], sure) for key, text in zip(some.keys, texts, strict=True)]

    def ground(
        self, pixels: list[torch.Tensor], reports: list[WrittenReport], contexts: list[Any], projections: torch.Tensor
    ) -> list[torch.Tensor]:
        """A map whose largest value stands at the first patch of the first view."""
        assert len(pixels) == len(reports) == len(contexts)
        assert len(projections) == sum(map(len, pixels))
        self.grounded.append(len(reports))
        maps = [torch.ones(1, len(images), 2, 2) for images in pixels]
        for one in maps:
            one[0, 0, 0, 0] = 4
        return [one / one.sum() for one in maps]


def run_generation(files: list[Any], *arguments: Any, **options: Any) -> Written:
    studies = [file if isinstance(file, StudyFiles) else StudyFiles.single(file) for file in files]
    return folder.run_generation(studies, *arguments, **options)


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Writer:
    writer = Writer()
    monkeypatch.setattr(folder, "load_generator", lambda *arguments, **options: writer)
    return writer


@pytest.fixture
def recipe() -> FinetuneRecipe:
    overrides = ["model.encoder.image_size=32", "generation.batch_size=2"]
    return load_recipe("tiny/finetune", overrides, stage="finetune")


def _image(path: Path, grey: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (20, 30), grey).save(path, "PNG")
    return path


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# -- which files -------------------------------------------------------------------------------------------------


def test_folders_are_searched_in_order_without_hidden_ones(tmp_path: Path) -> None:
    names = ["b/2.png", "b/1.png", "a.png", "b/c/3.png", ".hidden/4.png", "b/.5.png", "notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in find_images([str(tmp_path)])]
    assert found == ["a.png", "notes.txt", "b/1.png", "b/2.png", "b/c/3.png"]


def test_named_files_are_taken_once(tmp_path: Path) -> None:
    one, hidden = tmp_path / "1.png", tmp_path / ".2.png"
    one.touch()
    hidden.touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    named = [str(hidden), str(one), str(tmp_path), str(one), str(tmp_path / "gone.png")]
    assert find_images(named) == [hidden, one, tmp_path / "gone.png"]


def test_other_spellings_of_a_file_are_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/x.png", "b/y.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "folder").symlink_to("a")
    for link in ("1.png", "2.png"):
        (tmp_path / link).symlink_to("a/x.png")
        (tmp_path / "b" / link).symlink_to("../a/x.png")
    for same in (["a/x.png", "a/../a/x.png"], ["a", str(tmp_path / "a")], ["folder", "a"], ["1.png", "2.png", "a"]):
        assert len(find_images(same)) == len(find_images(same[::-1])) == 1
    assert len(find_images(["b"])) == 3  # links of a store of files with equal images


def test_missing_paths_and_empty_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none: no such file or folder"):
        find_images([str(tmp_path / "none")])
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"no files in .*empty"):
        find_images([str(tmp_path / "empty")])


# -- what is written ---------------------------------------------------------------------------------------------


def test_reports_and_skipped_files_are_written(tmp_path: Path, writer: Writer, recipe: FinetuneRecipe) -> None:
    images = tmp_path / "images"
    names = ['comma, "quote".png', "line\nbreak.png", "umlaut ü 😀.png"]
    for number, name in enumerate(names):
        _image(images / name, grey=100 * number)
    (images / "fake.png").write_text("no image")
    (images / "empty.png").touch()
    (images / "cut.png").write_bytes((images / names[0]).read_bytes()[:40])
    (images / "gone.png").symlink_to(images / "nowhere")
    result = run_generation(find_images([str(images)]), tmp_path / "run", recipe, tmp_path / "out")

    rows = _rows(tmp_path / "out" / "reports.jsonl")
    assert [Path(row["path"]).name for row in rows] == names
    assert [row["report"] for row in rows] == [f'grey "{grey}",\n(1, 32, 32)' for grey in (0, 100, 200)]
    assert all(Path(row["path"]).is_file() and row["seconds"] >= 0 for row in rows)
    with (tmp_path / "out" / "reports.csv").open(newline="", encoding="utf-8-sig") as file:
        table = list(csv.DictReader(file))
    assert [(row["path"], row["report"]) for row in table] == [(row["path"], row["report"]) for row in rows]
    assert {row["disclaimer"] for row in table} == {"Research output: not for diagnosis."}
    skipped = {Path(row["path"]).name: row["reason"] for row in _rows(tmp_path / "out" / "skipped.jsonl")}
    assert skipped.keys() == {"fake.png", "empty.png", "cut.png", "gone.png"}
    assert skipped["fake.png"] == "not an image"
    assert skipped["gone.png"].startswith("missing image")
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == [
        "page.html",
        "page.jsonl",
        "reports.csv",
        "reports.jsonl",
        "skipped.jsonl",
    ]
    assert writer.batches == [2, 1]
    assert len(set(writer.numbers)) == 3
    assert list(result.rows()) == rows
    assert (result.reports, result.skipped, result.first_skipped[0][1]) == (3, 4, skipped["cut.png"])


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
def test_a_name_that_is_not_utf8_is_written_with_escapes(
    tmp_path: Path, writer: Writer, recipe: FinetuneRecipe
) -> None:
    folder_bytes = os.fsencode(tmp_path / "images")
    _image(tmp_path / "images" / "a.png")
    os.rename(folder_bytes + b"/a.png", folder_bytes + b"/caf\xe9.png")  # noqa: PTH104
    Path(os.fsdecode(folder_bytes + b"/t\xe9.txt")).write_text("no image")
    run_generation(find_images([str(tmp_path / "images")]), tmp_path / "run", recipe, tmp_path / "out")
    assert _rows(tmp_path / "out" / "reports.jsonl")[0]["path"].endswith("images/caf\\udce9.png")
    assert _rows(tmp_path / "out" / "skipped.jsonl")[0]["path"].endswith("images/t\\udce9.txt")
    assert "caf\\udce9.png" in (tmp_path / "out" / "reports.csv").read_text(encoding="utf-8")


def test_without_readable_images_only_the_reasons_are_written(
    tmp_path: Path, writer: Writer, recipe: FinetuneRecipe
) -> None:
    (tmp_path / "a.txt").write_text("text")
    result = run_generation([tmp_path / "a.txt"], tmp_path / "run", recipe, tmp_path / "out")
    assert (list(result.rows()), result.reports, result.skipped, writer.batches) == ([], 0, 1, [])
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["skipped.jsonl"]


def test_earlier_reports_are_kept_by_default(tmp_path: Path, writer: Writer, recipe: FinetuneRecipe) -> None:
    images = [_image(tmp_path / "1.png"), tmp_path / "2.txt"]
    images[1].write_text("text")
    arguments = (tmp_path / "run", recipe, tmp_path / "out")
    run_generation(images, *arguments)
    before = (tmp_path / "out" / "reports.jsonl").read_text()
    other = recipe.model_copy(update={"generation": recipe.generation.model_copy(update={"num_beams": 7})})
    with pytest.raises(UsageError, match="already holds reports"):
        run_generation([_image(tmp_path / "3.png")], tmp_path / "run", other, tmp_path / "out")
    assert (tmp_path / "out" / "reports.jsonl").read_text() == before
    run_generation([tmp_path / "3.png"], *arguments, overwrite=True)
    assert [row["path"] for row in _rows(tmp_path / "out" / "reports.jsonl")] == [str(tmp_path / "3.png")]
    assert not (tmp_path / "out" / "skipped.jsonl").exists()  # nothing was skipped this time


def test_only_a_complete_run_replaces_earlier_reports(tmp_path: Path, writer: Writer, recipe: FinetuneRecipe) -> None:
    out, files = tmp_path / "out", [_image(tmp_path / f"{index}.png") for index in range(5)]
    (tmp_path / "text.png").write_text("no image")
    run_generation([*files, tmp_path / "text.png"], tmp_path / "run", recipe, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    writer.batches.clear()

    # It finds nothing to read,
    other = tmp_path / "other.txt"
    other.write_text("text")
    result = run_generation([other], tmp_path / "run", recipe, out, overwrite=True)
    assert result.skipped_file == out / "skipped.jsonl.partial"
    assert str(other) in result.skipped_file.read_text()
    result.skipped_file.unlink()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    # or is stopped,
    writer.before = lambda: os.kill(os.getpid(), signal.SIGINT) if writer.batches else None  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match=r"2 reports saved in .*jsonl\.partial; earlier reports are unchanged"):
        run_generation(files[2:], tmp_path / "run", recipe, out, overwrite=True)
    partial = out / "reports-new.jsonl.partial"
    assert [row["path"] for row in _rows(partial)] == [str(file) for file in files[2:4]]
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".partial"} == before

    # or is whole.
    writer.before = lambda: None  # type: ignore[method-assign]
    run_generation(files[4:], tmp_path / "run", recipe, out, overwrite=True)
    assert [row["path"] for row in _rows(out / "reports.jsonl")] == [str(files[4])]
    assert sorted(path.name for path in out.iterdir()) == ["page.html", "page.jsonl", "reports.csv", "reports.jsonl"]


def test_reports_of_a_run_that_was_killed_are_kept(tmp_path: Path, writer: Writer, recipe: FinetuneRecipe) -> None:
    image, partial = _image(tmp_path / "1.png"), tmp_path / "out" / "reports.jsonl.partial"
    partial.parent.mkdir()
    partial.write_text('{"report": "hours of work"}\n')
    with pytest.raises(UsageError, match=r"reports\.jsonl\.partial, from an interrupted run, already holds reports"):
        run_generation([image], tmp_path / "run", recipe, tmp_path / "out")
    assert partial.read_text() == '{"report": "hours of work"}\n'
    run_generation([image], tmp_path / "run", recipe, tmp_path / "out", overwrite=True)
    assert not partial.exists()


def test_a_wrong_output_is_refused_before_the_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: FinetuneRecipe
) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(folder, "load_generator", load)
    image = _image(tmp_path / "1.png")
    with pytest.raises(UsageError, match="is a file"):
        run_generation([image], tmp_path / "run", recipe, image)


# -- stops -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_keeps_what_was_written(
    tmp_path: Path, writer: Writer, recipe: FinetuneRecipe, number: signal.Signals, code: int
) -> None:
    files = [_image(tmp_path / f"{index}.png") for index in range(5)]
    (tmp_path / "0.txt").write_text("text")
    handlers = [signal.getsignal(watched) for watched in (signal.SIGINT, signal.SIGTERM)]
    writer.before = lambda: os.kill(os.getpid(), number) if writer.batches else None  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="stopped after 3 of 6 studies; 2 reports saved in") as caught:
        run_generation([tmp_path / "0.txt", *files], tmp_path / "run", recipe, tmp_path / "out")
    assert caught.value.exit_code == code
    assert [row["path"] for row in _rows(tmp_path / "out" / "reports.jsonl")] == [str(file) for file in files[:2]]
    assert len((tmp_path / "out" / "reports.csv").read_text().splitlines()) > 2
    assert len(_rows(tmp_path / "out" / "skipped.jsonl")) == 1
    assert not (tmp_path / "out" / "reports.jsonl.partial").exists()
    assert [signal.getsignal(watched) for watched in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_an_interrupted_image_is_not_reported_as_broken(
    tmp_path: Path, writer: Writer, recipe: FinetuneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [_image(tmp_path / f"{index}.png") for index in range(5)]
    load = ImageFile.ImageFile.load

    def interrupted(image: ImageFile.ImageFile) -> Any:
        if writer.batches:
            os.kill(os.getpid(), signal.SIGINT)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", interrupted)
    with pytest.raises(Interrupted, match="stopped after 2 of 5 studies"):
        run_generation(files, tmp_path / "run", recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "skipped.jsonl").exists()


def test_a_failure_keeps_what_was_written(tmp_path: Path, writer: Writer, recipe: FinetuneRecipe) -> None:
    files = [_image(tmp_path / f"{index}.png") for index in range(3)]

    def fail() -> None:
        if writer.batches:
            raise RuntimeError("out of memory")

    writer.before = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        run_generation(files, tmp_path / "run", recipe, tmp_path / "out")
    assert len(_rows(tmp_path / "out" / "reports.jsonl")) == 2


def test_each_batch_is_saved_before_the_next_begins(tmp_path: Path, writer: Writer, recipe: FinetuneRecipe) -> None:
    seen: list[int] = []

    def look() -> None:
        partial = tmp_path / "out" / "reports.jsonl.partial"
        seen.append(len(_rows(partial)) if partial.exists() else 0)

    writer.before = look  # type: ignore[method-assign]
    run_generation([_image(tmp_path / f"{i}.png") for i in range(5)], tmp_path / "run", recipe, tmp_path / "out")
    assert seen == [0, 2, 4]


# -- again -------------------------------------------------------------------------------------------------------


def test_the_same_command_again_writes_what_is_missing(tmp_path: Path, writer: Writer, recipe: FinetuneRecipe) -> None:
    files = [_image(tmp_path / f"{index}.png", 20 * index) for index in range(7)]
    arguments = (tmp_path / "run", recipe, tmp_path / "out")
    writer.before = lambda: os.kill(os.getpid(), signal.SIGINT) if writer.batches else None  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        run_generation(files, *arguments)
    writer.before = lambda: None  # type: ignore[method-assign]
    result = run_generation(files, *arguments)
    assert (result.earlier, writer.batches) == (2, [2, 2, 2, 1])
    rows = _rows(tmp_path / "out" / "reports.jsonl")
    assert [row["path"] for row in rows] == [str(file) for file in files]
    assert len((tmp_path / "out" / "reports.csv").read_text().splitlines()) == 1 + 2 * 7
    before = (tmp_path / "out" / "reports.jsonl").stat().st_mtime_ns
    result = run_generation(files, *arguments)  # nothing is left to do
    assert (result.earlier, result.reports, sum(writer.batches)) == (7, 7, 7)
    assert (tmp_path / "out" / "reports.jsonl").stat().st_mtime_ns == before


def test_a_killed_run_loses_nothing_and_repeats_nothing(
    tmp_path: Path, writer: Writer, recipe: FinetuneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [_image(tmp_path / f"{index}.png", 20 * index) for index in range(5)]
    arguments = (tmp_path / "run", recipe, tmp_path / "out")
    whole = run_generation(files, tmp_path / "run", recipe, tmp_path / "whole")

    def killed() -> None:
        if len(writer.batches) > 4:
            raise KeyboardInterrupt

    writer.before = killed  # type: ignore[method-assign]
    with monkeypatch.context() as patch:
        patch.setattr(folder._Run, "_finish", lambda *_: None)  # as after kill -9
        with pytest.raises(KeyboardInterrupt):
            run_generation(files, *arguments)
    partial = tmp_path / "out" / "reports.jsonl.partial"
    assert len(_rows(partial)) == 4
    with partial.open("a") as file:
        file.write('{"study": "cut of')
    writer.before = lambda: None  # type: ignore[method-assign]
    result = run_generation(files, *arguments)
    assert [row["report"] for row in result.rows()] == [row["report"] for row in whole.rows()]
    assert not partial.exists()
    assert writer.batches[5:] == [1]


def test_records_of_other_weights_are_not_mixed(tmp_path: Path, writer: Writer, recipe: FinetuneRecipe) -> None:
    weights = tmp_path / "run" / "model" / "bridge.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(bytes(200_000))
    arguments = ([_image(tmp_path / "1.png")], tmp_path / "run", recipe, tmp_path / "out")
    run_generation(*arguments)
    assert run_generation(*arguments).earlier == 1
    weights.write_bytes(bytes(100_000) + b"1" + bytes(99_999))
    run_generation(*arguments, overwrite=True)
    weights.write_bytes(b"1" + bytes(199_999))
    with pytest.raises(UsageError, match="of another model, of other options"):
        run_generation(*arguments)


def test_a_record_has_everything(tmp_path: Path, writer: Writer, recipe: FinetuneRecipe) -> None:
    run_generation([_image(tmp_path / "1.png")], tmp_path / "run", recipe, tmp_path / "out")
    (row,) = _rows(tmp_path / "out" / "reports.jsonl")
    keys = "study path files stamps views report findings log_probability mean_token_logprob sentences word_confidence"
    assert list(row) == [*keys.split(), "seconds", "notes", "fingerprint"]
    assert (row["mean_token_logprob"], row["word_confidence"]) == (-0.25, [0.8, 1.0])
    assert row["sentences"] == [{"start": 0, "end": 4, "confidence": 0.9}]
    assert row["files"] == [row["path"]] == [row["study"]]
    assert (row["log_probability"], row["views"]) == (-0.5, [None])


def test_an_output_removed_during_the_run_is_an_error(tmp_path: Path, writer: Writer, recipe: FinetuneRecipe) -> None:
    files = [_image(tmp_path / f"{index}.png") for index in range(5)]
    writer.before = lambda: shutil.rmtree(tmp_path / "out") if writer.batches else None  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"reports\.jsonl\.partial was removed during the run"):
        run_generation(files, tmp_path / "run", recipe, tmp_path / "out")


def test_an_output_removed_before_the_first_report_is_an_error(
    tmp_path: Path, writer: Writer, recipe: FinetuneRecipe
) -> None:
    writer.before = lambda: shutil.rmtree(tmp_path / "out")  # type: ignore[method-assign]
    with pytest.raises(RunError, match="was removed while the program wrote to it"):
        run_generation([_image(tmp_path / "1.png")], tmp_path / "run", recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["reports.jsonl", "reports.jsonl.partial", "reports.csv", "skipped.jsonl", "page.html", "page.jsonl"]
)
def test_an_output_with_links_out_of_it_is_refused(
    tmp_path: Path, writer: Writer, recipe: FinetuneRecipe, name: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("")
    (tmp_path / "out" / "films").symlink_to(tmp_path)  # not ours
    (tmp_path / "out" / name).symlink_to(tmp_path / "precious")
    files = [_image(tmp_path / "1.png")]
    with pytest.raises(RunError, match=rf"{name} is a link to .*precious: nothing is written"):
        run_generation(files, tmp_path / "run", recipe, tmp_path / "out")
    assert (writer.batches, (tmp_path / "precious").read_text()) == ([], "")
    (tmp_path / "out" / name).unlink()
    assert run_generation(files, tmp_path / "run", recipe, tmp_path / "out").reports == 1


def test_a_second_process_is_refused(tmp_path: Path, writer: Writer, recipe: FinetuneRecipe) -> None:
    from emrrg_cli.files.locks import locked

    with locked(tmp_path / "out"), pytest.raises(RunError, match="another process is writing"):
        run_generation([_image(tmp_path / "1.png")], tmp_path / "run", recipe, tmp_path / "out")


@pytest.mark.parametrize("name", ["reports.csv", "page.html"])
def test_files_of_the_user_are_not_replaced(tmp_path: Path, writer: Writer, recipe: FinetuneRecipe, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    files = [_image(tmp_path / "1.png")]
    with pytest.raises(UsageError, match=f"{name} exists without reports beside it"):
        run_generation(files, tmp_path / "run", recipe, out)
    assert (out / name).read_text() == "mine"
    assert run_generation(files, tmp_path / "run", recipe, out, overwrite=True).reports == 1
    assert run_generation(files, tmp_path / "run", recipe, out).earlier == 1


def test_the_output_is_not_searched_for_films(tmp_path: Path) -> None:
    _image(tmp_path / "1.png")
    for place in (tmp_path / "reports", tmp_path / "reports" / "pictures", tmp_path / "s"):
        place.mkdir()
        _image(place / "2.png")
    (tmp_path / "page.html").write_text("x")
    (tmp_path / "reports-0-of-2.jsonl.partial").write_text("x")

    def names(output: Path) -> list[str]:
        found = find_studies([str(tmp_path)], "file", output)
        return sorted(str(study.files[0].relative_to(tmp_path)) for study in found)  # type: ignore[union-attr]

    assert names(tmp_path / "reports") == ["1.png", "page.html", "reports-0-of-2.jsonl.partial", "s/2.png"]
    assert names(tmp_path) == ["1.png", "reports/2.png", "reports/pictures/2.png", "s/2.png"]
    assert len(names(tmp_path / "elsewhere")) == 6
    only = tmp_path / "only"
    only.mkdir()
    (only / "reports.jsonl").write_text("x")
    with pytest.raises(UsageError, match="no images outside of the output"):
        find_studies([str(only)], "file", only)


def test_each_row_of_a_table_is_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abc":
        _image(tmp_path / f"{name}.png")
    table = tmp_path / "t.csv"
    table.write_text("image,age\na.png|b.png,40\na.png|c.png,41\na.png|b.png,40\nb.png\nc.png,5,x\nc.png,50\n")
    found = {study.name.removeprefix(f"{tmp_path}/"): study for study in table_studies(table)}
    assert list(found) == ["a.png", "a.png (row 3)", "c.png"]
    assert [len(study.files) for study in found.values()] == [2, 2, 1]
    assert [study.context["age"] for study in found.values()] == ["40", "41", "50"]
    said = " ".join(capsys.readouterr().err.split())
    assert "2 rows skipped, because row and header differ in length (line 5, 6)" in said


# -- shards ------------------------------------------------------------------------------------------------------


def test_shards_together_are_one_run(tmp_path: Path, writer: Writer, recipe: FinetuneRecipe) -> None:
    files = [_image(tmp_path / f"{index}.png", 20 * index) for index in range(7)]
    one = run_generation(files, tmp_path / "run", recipe, tmp_path / "one")
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="there are no finished shards"):
        merge_shards(out)
    for index in (2, 0):
        run_generation(files, tmp_path / "run", recipe, out, shard=Shard(index, 3))
    with pytest.raises(UsageError, match=r"1 shard of 3 not finished: 1\n.*--shard 1/3"):
        merge_shards(out)
    run_generation(files, tmp_path / "run", recipe, out, shard=Shard(1, 3))
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"reports-{index}-of-3.{suffix}" for index in range(3) for suffix in ("jsonl", "done")
    )
    merged = merge_shards(out)

    def texts(rows: Iterable[dict[str, Any]]) -> set[tuple[str, str]]:
        return {(row["path"], row["report"]) for row in rows}

    assert merged == 7
    done = out / "reports-1-of-3.done"
    kept, told = done.with_suffix(".jsonl").read_text(), done.read_text()
    for left in (kept.splitlines()[0] + "\n", ""):
        done.with_suffix(".jsonl").write_text(left)
        with pytest.raises(UsageError, match=r"reports-1-of-3\.jsonl has . reports, but the shard wrote 2"):
            merge_shards(out)
    done.with_suffix(".jsonl").unlink()
    with pytest.raises(UsageError, match="has 0 reports, but the shard wrote 2"):
        merge_shards(out)
    done.with_suffix(".jsonl").write_text(kept)
    (out / "reports-9-of-3.done").write_text(told)
    with pytest.raises(UsageError, match="shard 9 of 3 cannot exist"):
        merge_shards(out)
    (out / "reports-9-of-3.done").unlink()
    whole = (out / "reports.jsonl").read_text()
    (out / "reports.jsonl").write_text(whole + '{"study": "other"}\n')
    with pytest.raises(UsageError, match="studies that the shards do not have, such as other"):
        merge_shards(out)
    assert merge_shards(out, overwrite=True) == 7
    assert (out / "reports.jsonl").read_text() == whole
    assert texts(one.rows()) == texts(_rows(out / "reports.jsonl"))
    assert run_generation(files, tmp_path / "run", recipe, out, shard=Shard(1, 3)).earlier == 2


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/3", "1/0", "1/3/5", ""])
def test_invalid_shards_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not i/N"):
        Shard.parse(text)


def test_shards_of_slurm_and_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Shard.parse("0/4") == Shard(0, 4)
    with pytest.raises(UsageError, match="SLURM_ARRAY_TASK_ID"):
        Shard.parse("auto")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    monkeypatch.setenv("JOB_COMPLETIONS", "5")
    assert Shard.parse("auto") == Shard(2, 5)
    for name, value in (("ID", "7"), ("MIN", "5"), ("COUNT", "3")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert Shard.parse("auto") == Shard(2, 3)
    monkeypatch.setenv("SLURM_ARRAY_TASK_STEP", "2")
    assert Shard.parse("auto") == Shard(1, 3)
    for wrong in ("x", "4", "99"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", wrong)
        with pytest.raises(UsageError, match=f"which shard this job is from SLURM_ARRAY_TASK_ID={wrong}, "):
            Shard.parse("auto")


# -- studies -----------------------------------------------------------------------------------------------------


def _names(studies: list[StudyFiles], root: Path) -> list[tuple[str, list[str]]]:
    return [
        (study.name.removeprefix(f"{root}/"), [str(file.relative_to(root)) for file in study.files])
        for study in studies
    ]


def test_a_subfolder_is_a_study_unless_it_is_a_collection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "b.png", "s1/1.png", "s1/2.png", "deep/s2/1.png", *(f"many/{i}.png" for i in range(9))):
        _image(tmp_path / name)
    found = _names(find_studies([str(tmp_path)]), tmp_path)
    assert found[:2] == [("a.png", ["a.png"]), ("b.png", ["b.png"])]
    assert ("s1", ["s1/1.png", "s1/2.png"]) in found
    assert ("deep/s2", ["deep/s2/1.png"]) in found
    assert ("many/3.png", ["many/3.png"]) in found
    assert len(found) == 4 + 9
    assert len(find_studies([str(tmp_path)], "file")) == 14
    assert "deep" not in (printed := capsys.readouterr().err)
    assert printed.count("s1: its 2 images are one study, and so are those of every subfolder") == 1
    by_folder = dict(_names(find_studies([str(tmp_path)], "folder"), tmp_path))
    assert len(by_folder["many"]) == 9
    assert by_folder[str(tmp_path)] == ["a.png", "b.png"]
    assert find_studies([str(tmp_path / "s1")])[0].files == (
        tmp_path / "s1" / "1.png",
    )  # named itself: a folder of films


@pytest.mark.parametrize("by", ["auto", "folder"])
def test_files_that_are_no_images_do_not_join_a_study(tmp_path: Path, by: Any) -> None:
    for index in range(8):
        _image(tmp_path / "s" / f"{index}.png")
    (tmp_path / "s" / "7.png").write_text("broken")
    _image(tmp_path / "s" / "without-suffix")
    (tmp_path / "s" / "0.png").unlink()
    for name in ("notes.txt", "notes.xml", "Thumbs.db"):
        (tmp_path / "s" / name).write_text("text")
    found = dict(_names(find_studies([str(tmp_path)], by), tmp_path))
    assert found.pop("s") == [*(f"s/{index}.png" for index in range(1, 8)), "s/without-suffix"]
    assert list(found.values()) == [["s/Thumbs.db"], ["s/notes.txt"], ["s/notes.xml"]]


def test_dicom_files_of_a_study_belong_together(tmp_path: Path, make_dicom: Any) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for name, uid, view in (("1", "1.2.3", "PA"), ("x/2", "1.2.3", "LATERAL"), ("3", "1.2.4", "AP")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(make_dicom(pixels, StudyInstanceUID=uid, ViewPosition=view))
    (tmp_path / "broken.dcm").write_bytes(b"no image")
    studies = {study.name: study for study in find_studies([str(tmp_path)])}
    assert studies["1.2.3"].files == (tmp_path / "1", tmp_path / "x" / "2")
    assert studies["1.2.3"].views == ("PA", "LATERAL")
    assert studies["1.2.4"].files == (tmp_path / "3",)
    assert str(tmp_path / "broken.dcm") in studies


def test_glob_patterns_are_expanded(tmp_path: Path) -> None:
    for name in ("1.png", "2.png", "3.jpg", "[x].png"):
        _image(tmp_path / name)
    assert len(find_studies([str(tmp_path / "*.png")])) == 3
    assert len(find_studies([str(tmp_path / "[x].png")])) == 1  # a file of that name
    with pytest.raises(UsageError, match="no file matches this pattern"):
        find_studies([str(tmp_path / "*.bmp")])


def test_a_table_lists_studies(tmp_path: Path) -> None:
    for name in ("1.png", "2.png", "3.png"):
        _image(tmp_path / name)
    table = tmp_path / "studies.csv"
    again = f"../{tmp_path.name}/1.png"
    table.write_text(f"study,image\ns1,1.png\ns1,2.png|{again}\ns2,3.png|1.png\n")
    found = table_studies(table, "image", "study")
    assert _names(found, tmp_path) == [("s1", ["1.png", "2.png"]), ("s2", ["3.png", "1.png"])]
    assert len(table_studies(table)) == 3  # each row is one
    with pytest.raises(UsageError, match="has no column 'scan'"):
        table_studies(table, "scan")


def test_the_views_of_a_study_are_read_together(tmp_path: Path, writer: Writer, recipe: FinetuneRecipe) -> None:
    files = (_image(tmp_path / "1.png", 50), tmp_path / "2.png", _image(tmp_path / "3.png", 150))
    files[1].write_text("no image")
    study = StudyFiles("s", files, ("PA", "", "lateral"))
    result = run_generation([study], tmp_path / "run", recipe, tmp_path / "out")
    (row,) = result.rows()
    assert row["report"].endswith("(2, 32, 32)")
    assert row["files"] == [str(files[0]), str(files[2])]
    assert row["views"] == ["PA", "lateral"]
    assert row["notes"] == ["1 of 3 images could not be read"]
    assert result.first_skipped == [(str(files[1]), "not an image")]
    limited = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_views": 1})})
    (row,) = run_generation([study], tmp_path / "run", limited, tmp_path / "limited").rows()
    assert row["report"].endswith("(1, 32, 32)")
    assert row["notes"] == []


@pytest.mark.parametrize("workers", [1, 2])
def test_images_read_ahead_keep_their_order(
    workers: int, tmp_path: Path, writer: Writer, recipe: FinetuneRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [_image(tmp_path / f"{index:02}.png", 10 * index) for index in range(20)]
    files[7].write_text("no image")
    expected = run_generation(files, tmp_path / "run", recipe, tmp_path / "one")
    monkeypatch.setattr(folder, "reading_processes", lambda device: workers)
    result = run_generation(files, tmp_path / "run", recipe, tmp_path / "two")
    assert [row["report"] for row in result.rows()] == [row["report"] for row in expected.rows()]
    assert list(result.skipped_rows()) == list(expected.skipped_rows()) != []


def test_reading_ahead_ends_with_the_run(tmp_path: Path) -> None:
    studies = [StudyFiles.single(_image(tmp_path / f"{index}.png")) for index in range(30)]
    before = set(psutil.Process().children())
    ahead = read_studies(studies, 32, None, 2)
    assert next(ahead).study == studies[0]
    readers = set(psutil.Process().children()) - before
    assert len(readers) == 2
    ahead.close()
    _, alive = psutil.wait_procs(readers, timeout=120)
    assert not alive
