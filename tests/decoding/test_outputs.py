"""What `generate` leaves: the fingerprint in every record, where records are, and tables written one row at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from emrrg_cli.decoding import outputs
from emrrg_cli.decoding.fingerprint import fingerprint_of
from emrrg_cli.decoding.outputs import RecordIndex, write_reports
from emrrg_cli.errors import RunError
from emrrg_cli.files.records import append_jsonl
from emrrg_cli.recipe.load import load_run_recipe


def _fingerprint(run: Path, *changes: str) -> str:
    return fingerprint_of(run, load_run_recipe(run, None, changes, "generate"))


@pytest.mark.skipif(os.name != "posix", reason="special files")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "is not a regular file"),
        (lambda file: file.symlink_to("/dev/zero"), "is not a regular file"),
        (Path.mkdir, "is not a regular file"),
        (lambda file: file.symlink_to(file.with_name("gone")), "cannot be read: No such file"),
    ],
    ids=["pipe", "device", "folder", "broken link"],
)
def test_weights_that_are_not_a_file_are_refused(
    tiny_run: Path, tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    file = run / "model" / "bridge.safetensors"
    file.unlink()
    make(file)
    with pytest.raises(RunError, match=reason):
        _fingerprint(run)


def test_other_weights_have_another_fingerprint(tiny_run: Path, varied_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "copy")
    assert _fingerprint(tmp_path / "copy") == _fingerprint(tiny_run)
    assert _fingerprint(varied_run) != _fingerprint(tiny_run)


def test_options_that_change_reports_change_the_fingerprint(tiny_run: Path) -> None:
    plain = _fingerprint(tiny_run)
    assert _fingerprint(tiny_run, "generation.batch_size=2", "generation.engine=transformers") == plain
    assert _fingerprint(tiny_run, "generation.length_penalty=1.5") != plain
    assert _fingerprint(tiny_run, "data.max_views=1") != _fingerprint(tiny_run, "data.max_views=null")
    sampled = ["generation.do_sample=true", "generation.num_beams=1", "generation.engine=transformers"]
    assert _fingerprint(tiny_run, *sampled) != _fingerprint(tiny_run, *sampled[:2])
    recipe = load_run_recipe(tiny_run, None, [], "generate")
    told = recipe.model_copy(update={"model": recipe.model.model_copy(update={"findings_threshold": 0.2})})
    assert fingerprint_of(tiny_run, told) != plain


def test_the_newest_record_of_a_study_counts(tmp_path: Path) -> None:
    index = RecordIndex()
    for name, rows in (("1", [("a", 1), ("b", 1)]), ("2", [("a", 2), ("c", 2)])):
        for study, number in rows:
            index.add(study, tmp_path / name, append_jsonl(tmp_path / name, {"study": study, "number": number}))
    assert ("a" in index, "d" in index, len(index)) == (True, False, 3)
    found = [(row["study"], row["number"]) for row in index.rows(["c", "d", "a"])]
    assert found == [("b", 1), ("c", 2), ("a", 2)]  # what the order does not name comes first


def test_records_of_many_files_need_few_open_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_MOST_OPEN", 2)
    index = RecordIndex()
    for number in range(5):
        file = tmp_path / str(number)
        index.add(str(number), file, append_jsonl(file, {"study": str(number)}))
    assert [row["study"] for row in index.rows(())] == list("01234")


def test_tables_that_fail_leave_the_old_ones(tmp_path: Path) -> None:
    row = {"study": "a", "path": "a.png", "files": ["a.png", "b.png"], "report": "clear , ü", "notes": [], "seconds": 1}
    assert write_reports(tmp_path / "reports.jsonl", [row], with_table=True) == 1
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert 'a.png,"clear , ü",1,,a,a.png; b.png' in before["reports.csv"].decode()

    def broken() -> Iterator[dict[str, Any]]:
        yield row
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_reports(tmp_path / "reports.jsonl", broken(), with_table=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
