"""Phantoms as a source: pure functions of seed and index, and a dataset directory like any other."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from emrrg_cli.datasets.directory import FEATURES, open_dataset
from emrrg_cli.errors import UsageError
from emrrg_cli.imaging.read import read_image
from emrrg_cli.ingest.preprocess import preprocess
from emrrg_cli.ingest.sources.phantom import PhantomSource, split_of, synthetic_study
from emrrg_cli.ingest.study import ImportLog
from emrrg_cli.phantom.parameters import Distractors
from emrrg_cli.phantom.render import render
from emrrg_cli.recipe.preprocessing import PreprocessRecipe


def _make(out: Path, count: int, seed: int = 3, **settings: Any) -> dict[str, Any]:
    recipe = PreprocessRecipe(stage="preprocess", **({"size": 48, "workers": 1} | settings))
    return preprocess(PhantomSource(count, seed=seed), out, recipe)


def _rows(root: Path) -> dict[str, dict[str, Any]]:
    return {row["study_id"]: row for split in open_dataset(root).values() for row in split}


def test_a_study_depends_only_on_seed_and_index() -> None:
    assert synthetic_study(1, 7) == synthetic_study(1, 7)
    assert synthetic_study(1, 7) != synthetic_study(1, 8)
    assert synthetic_study(1, 7) != synthetic_study(2, 7)


def test_plain_films_are_frontal_and_differ_less() -> None:
    assert synthetic_study(1, 7, plain=True) == synthetic_study(1, 7, plain=True) != synthetic_study(1, 7)
    plain = [synthetic_study(3, index, plain=True)[0] for index in range(200)]
    varied = [synthetic_study(3, index)[0] for index in range(200)]
    assert all(case.lateral is None and case.distractors == Distractors() for case in plain)
    assert [case.findings.labels() for case in plain] != [set()] * 200
    for value in (lambda case: case.film.field, lambda case: case.anatomy.tilt, lambda case: case.film.shift_x):
        assert np.std([value(case) for case in plain]) < 0.6 * np.std([value(case) for case in varied])


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    one, two = _make(tmp_path / "one", 70), _make(tmp_path / "two", 70, workers=2)
    assert one["fingerprint"] == two["fingerprint"]
    for file in (tmp_path / "one" / "data").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / "data" / file.name).read_bytes()


def test_more_studies_do_not_change_the_first(tmp_path: Path) -> None:
    _make(tmp_path / "few", 12)
    _make(tmp_path / "more", 30)
    few, more = _rows(tmp_path / "few"), _rows(tmp_path / "more")
    assert len(few) == 12
    assert all(more[study_id] == row for study_id, row in few.items())


def test_the_directory(tmp_path: Path) -> None:
    manifest = _make(tmp_path / "out", 20, size=64, format="png")
    assert {split: entry["studies"] for split, entry in manifest["splits"].items()} == {
        "train": 16,
        "validation": 2,
        "test": 2,
    }
    assert (manifest["source"], manifest["root"], manifest["studies_skipped"]) == ("phantom", None, 0)
    opened = open_dataset(tmp_path / "out")
    assert set(opened["train"].column_names) == {*FEATURES, "labels", "parameters"}
    for split, rows in opened.items():
        for row in rows:
            index = int(row["study_id"].rsplit("-", 1)[1])
            case, report = synthetic_study(3, index)
            assert split == split_of(index)
            assert (row["findings"], row["impression"]) == (report.findings, report.impression)
            assert (row["report"], row["views"]) == (report.text, [film.view for film in case.films])
            assert (row["labels"], row["source"]) == (sorted(case.findings.labels()), "phantom")
            assert json.loads(row["parameters"]) == json.loads(json.dumps(case.as_dict()))
            for image, film in zip(row["images"], case.films, strict=True):
                assert np.array_equal(np.asarray(read_image(image["bytes"])), render(case, 64, film=film))


def test_load_dataset_opens_the_directory(tmp_path: Path) -> None:
    _make(tmp_path / "out", 10)
    loaded = datasets.load_dataset(str(tmp_path / "out"))
    assert loaded["train"][0]["images"][0].size == (48, 48)
    assert isinstance(loaded["test"][0]["labels"], list)


def test_the_card_says_synthetic(tmp_path: Path) -> None:
    _make(tmp_path / "out", 10)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Synthetic.**" in card
    assert "no patient" in card
    assert "| `labels` |" in card
    assert "terms of the source" not in card


def test_splits_follow_the_index() -> None:
    for start in (0, 10, 500, 12340):
        assert Counter(split_of(i) for i in range(start, start + 10)) == {"train": 8, "validation": 1, "test": 1}
    halves = Counter(split_of(i, (0.55, 0.4, 0.05)) for i in range(1000))
    assert halves == {"train": 550, "validation": 400, "test": 50}
    assert {split_of(i, (1.0, 0.0, 0.0)) for i in range(100)} == {"train"}


def test_the_length_of_the_source_is_its_number_of_studies() -> None:
    log, source = ImportLog(), PhantomSource(5, seed=1)
    studies = list(source.studies(log))
    assert (len(source), log.read, len({study.study_id for study in studies})) == (5, 5, 5)
    with pytest.raises(UsageError, match="1 or more"):
        PhantomSource(0)
