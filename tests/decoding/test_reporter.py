"""`Reporter`: reports as a function of batches, here, in other processes, and under Dask and Ray."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import emrrg_cli
from emrrg_cli import Reporter
from emrrg_cli.app import main
from emrrg_cli.decoding import reporter as module
from emrrg_cli.decoding.contexts import with_contexts
from emrrg_cli.decoding.studies import find_studies
from emrrg_cli.decoding.study_records import StudyResult
from emrrg_cli.errors import UsageError
from emrrg_cli.recipe.load import load_recipe


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six different films and a file that is none."""
    folder = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8) // (index + 1)).save(folder / f"{index}.png")
    (folder / "x.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def written(varied_run: Path, films: Path) -> dict[str, dict[str, Any]]:
    """What `emrrg generate` writes for them: records by path."""
    out = films.parent / "out"
    assert main(["generate", str(films), "--model", str(varied_run), "--output", str(out), "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in (out / "reports.jsonl").read_text().splitlines()]
    assert len({row["report"] for row in rows}) > 3
    return {row["path"]: row for row in rows}


def _paths(films: Path) -> np.ndarray[Any, Any]:
    return np.array([str(film) for film in sorted(films.iterdir())], dtype=object)


def _check(found: dict[str, Any], written: dict[str, dict[str, Any]]) -> None:
    for path, text, labels, sure, notes in zip(
        *(found[name] for name in ("image", "report", "findings", "mean_token_logprob", "notes")), strict=True
    ):
        row = written.get(path)
        if row is None:
            assert (text, labels, notes) == ("", "{}", "no report: not an image")
            assert np.isnan(sure)
        else:
            assert (text, json.loads(labels), notes) == (row["report"], row["findings"], "")
            assert sure == pytest.approx(row["mean_token_logprob"], abs=1e-3)


def test_a_batch_gets_the_reports_of_generate(varied_run: Path, films: Path, written: Any) -> None:
    reporter = pickle.loads(pickle.dumps(Reporter(varied_run, device="cpu")))
    found = reporter({"image": _paths(films), "year": np.arange(7)})
    _check(found, written)
    assert (found["year"] == np.arange(7)).all()
    assert len(pickle.dumps(reporter)) < 1000  # after the model was loaded, too


def test_contexts_are_those_of_their_rows() -> None:
    image = np.zeros((4, 8), np.uint8)
    frame = pd.DataFrame({"image": [image, image.reshape(8, 4)], "indication": ["cough", "pain"]}, index=[1, 0])
    first, second = module._studies(frame)  # type: ignore[arg-type]
    assert (first.context["indication"], second.context["indication"]) == ("cough", "pain")
    assert first.name != second.name  # the same bytes in another shape
    with pytest.raises(UsageError, match="2 images and 1 values of age"):
        module._studies({"image": [image, image], "age": ["3"]})


@pytest.mark.parametrize("kind", ["paths", "bytes"])
def test_facts_of_dicom_headers_are_those_of_generate(
    kind: str, tmp_path: Path, make_dicom: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"PatientAge": "045Y", "ReasonForStudy": "Cough", "StudyInstanceUID": "1.2"}
    for name, view in (("1.dcm", "LL"), ("2.dcm", "PA")):
        (tmp_path / name).write_bytes(make_dicom(np.zeros((8, 8), np.uint8), ViewPosition=view, **facts))
    paths = sorted(tmp_path.glob("*.dcm"))
    recipe = load_recipe("tiny/finetune", ["data.context=[indication,age]"], stage="finetune")
    seen: list[list[Any]] = []
    monkeypatch.setattr(module, "_load", lambda *arguments: SimpleNamespace(recipe=recipe))
    monkeypatch.setattr(module, "StudyWriter", lambda *arguments: _Writer(seen))
    images = [path.read_bytes() if kind == "bytes" else str(path) for path in paths]
    Reporter("run")(
        {"image": [images, images], "study": ["a", "b"], "indication": [np.nan, "Pain"], "age": ["", pd.NA]}
    )
    (theirs,) = with_contexts(find_studies([str(tmp_path)]), {}, recipe.data)
    first, second = [study for studies in seen for study in studies]
    assert (first.views, first.context) == (theirs.views, theirs.context)
    assert theirs.context == {"indication": "cough", "age": "45 years"}
    assert theirs.views == ("LATERAL", "PA")
    assert second.context == {"indication": "pain", "age": "45 years"}


def test_one_image_with_two_contexts_has_two_reports(
    varied_run: Path, films: Path, written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(sorted(films.iterdir())[0])
    seen: list[list[Any]] = []
    monkeypatch.setattr(module, "with_contexts", lambda studies, given, data: studies)
    monkeypatch.setattr(module, "StudyWriter", lambda *arguments: _Writer(seen))
    found = Reporter(varied_run, device="cpu")({"image": [path] * 4, "indication": ["a", "b", None, "b"]})
    assert list(found["report"]) == ["a", "b", "", "b"]
    assert [len(studies) for studies in seen] == [1, 1, 1]


class _Writer:
    """A writer whose report is the indication."""

    def __init__(self, seen: list[list[Any]]) -> None:
        self.seen = seen

    def write(self, studies: list[Any]) -> Any:
        self.seen.append(studies)
        rows = [{"report": one.context.get("indication", ""), "findings": {}, "notes": []} for one in studies]
        yield [StudyResult(one.name, row) for one, row in zip(studies, rows, strict=True)]


@pytest.mark.parametrize("kind", ["bytes", "arrays", "one array", "pictures"])
def test_images_may_be_bytes_arrays_or_pictures(varied_run: Path, films: Path, written: Any, kind: str) -> None:
    paths = list(_paths(films)[:6])
    arrays = [np.asarray(Image.open(path)) for path in paths]
    images: Any = {
        "bytes": [Path(path).read_bytes() for path in paths],
        "arrays": arrays,
        "one array": np.stack(arrays),
        "pictures": [Image.open(path) for path in paths],
    }[kind]
    found = Reporter(varied_run, device="cpu")({"image": images, "study": [f"s{index}" for index in range(6)]})
    assert list(found["report"]) == [written[path]["report"] for path in paths]
    assert list(Reporter(varied_run, device="cpu")({"image": images})["report"]) == list(found["report"])


def test_views_of_a_study_are_a_list(varied_run: Path, films: Path) -> None:
    from emrrg_cli import load_generator

    paths = list(_paths(films))
    batch = {"image": [paths[:2], [paths[2], paths[6]], []]}
    found = Reporter(varied_run, device="cpu")(batch)
    assert list(found["report"][:2]) == load_generator(varied_run, device="cpu").generate([paths[:2], paths[2]])
    assert list(found["notes"]) == ["", "1 of 2 images could not be read", "no report: no images"]
    assert len(Reporter(varied_run)({"image": []})["report"]) == 0
    same = Reporter(varied_run, device="cpu")({"image": [paths[0], paths[0]]})["report"]
    assert same[0] == same[1]


def test_the_model_is_loaded_once(varied_run: Path, films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = module.load_generator

    def counted(run: str, **options: Any) -> Any:
        loaded.append(run)
        return load(run, **options)

    monkeypatch.setattr(module, "load_generator", counted)
    module._load.cache_clear()
    for _ in range(2):
        Reporter(varied_run, device="cpu")({"image": _paths(films)[:1]})
    assert loaded == [str(varied_run)]


def test_empty_cells_are_missing_names_and_images(varied_run: Path, films: Path) -> None:
    image = str(films / "0.png")
    for empty in (None, float("nan")):
        batch = {"image": [image, image, empty], "study": [empty, empty, "s"]}
        found = Reporter(varied_run, device="cpu")(batch)
        assert found["report"].tolist() == [found["report"][0]] * 2 + [""]
        assert found["notes"].tolist()[2] == "no report: no images"


def test_without_a_path_the_default_model_writes(default_model: Path, films: Path) -> None:
    batch = {"image": [str(films / "0.png")]}
    assert Reporter(device="cpu")(batch)["report"] == Reporter(default_model, device="cpu")(batch)["report"]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"path": ["a.png"]}, "no column image; it has path"),
        ({"image": [np.zeros((8, 8))]}, r"an array \[8, 8\] of float64, not"),
        ({"image": [np.zeros((2, 8, 8), np.uint8)]}, r"an array \[2, 8, 8\] of uint8, not"),
        ({"image": [7]}, "an image is int, not a path"),
        (["a.png"], "a batch is a dictionary of columns, not list"),
        ({"image": "a.png"}, "the column image must be a list or an array, not str"),
        ({"image": np.array("a.png")}, "the column image must be a list or an array, not ndarray"),
        ({"image": ["a.png"], "age": 45}, "the column age must be a list or an array, not int"),
        ({5: ["a.png"]}, "no column image; it has 5"),
        ({"image": ["a", "b"], "study": ["s"]}, "2 images and 1 studies"),
        ({"image": ["a", "b"], "study": ["s", "s"]}, "study s occurs twice in the batch"),
    ],
)
def test_a_wrong_batch_is_refused(batch: Any, message: str, tiny_run: Path) -> None:
    with pytest.raises(UsageError, match=message):
        Reporter(tiny_run)(batch)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: Reporter(5), "the run directory must be a path, not int"),
        (lambda run: emrrg_cli.load_generator(run, device=None), "unknown device None"),
        (lambda run: emrrg_cli.load_generator(run, device="cpu").generate(["a"], [{5: 1, "age": 2}]), "read 5, age"),
        (lambda run: Reporter(run, overrides="generation.num_beams=1"), "overrides must be a list of texts, not 'gen"),
        (lambda run: emrrg_cli.load_generator(run, overrides=[5]), r"overrides must be a list of texts, not \[5\]"),
        (lambda run: emrrg_cli.load_generator(5), "the run directory must be a path, not int"),
        (lambda run: emrrg_cli.load_generator(run, device="cpu").generate([None]), "must be a path, not NoneType"),
        (lambda run: emrrg_cli.load_generator(run, device="cpu").generate(["a"], {"age": 5}), "a list of dictionaries"),
        (lambda run: emrrg_cli.load_encoder(None), "the source of the encoder must be a path, not NoneType"),
        (lambda run: emrrg_cli.load_pretrainer(None), "the model must be a path, not NoneType"),
        (lambda run: emrrg_cli.clean_report(None, "none"), "a report must be a text, not NoneType"),
        (lambda run: emrrg_cli.clean_report("x", ["none"]), "unknown cleaning style"),
    ],
)
def test_wrong_types_are_told_in_words(call: Any, message: str, tiny_run: Path) -> None:
    with pytest.raises(UsageError, match=message):
        call(tiny_run)


@pytest.mark.slow
def test_other_processes_of_dask_write_the_same(varied_run: Path, films: Path, written: Any) -> None:
    from distributed import Client, LocalCluster

    reporter, paths = Reporter(varied_run, device="cpu"), _paths(films)
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster,  # threads share the model
        Client(cluster) as client,
    ):
        batches = [{"image": paths[start : start + 2]} for start in range(0, 7, 2)]
        for found in client.gather(client.map(reporter, batches)):
            _check(found, written)


@pytest.mark.slow
def test_ray_writes_the_same(varied_run: Path, films: Path, written: Any) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False)
    try:
        images = ray.data.from_items([{"image": path} for path in _paths(films)]).repartition(3)
        options: dict[str, Any] = {"fn_constructor_args": (varied_run,), "fn_constructor_kwargs": {"device": "cpu"}}
        rows = images.map_batches(Reporter, **options, batch_size=2, concurrency=1).take_all()
    finally:
        ray.shutdown()
    assert len(rows) == 7
    _check({name: [row[name] for row in rows] for name in rows[0]}, written)
