"""Training with a context in the prompt: off, on, resumed, evaluated, and used for new films."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from emrrg_cli.app import main
from emrrg_cli.decoding.contexts import read_context
from emrrg_cli.recipe.common import DataSettings

READ = "data.context=[indication, age]"


@pytest.fixture(scope="module")
def context_run(
    context_dataset: Path, tiny_overrides: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that reads indication and age, with weights so large that its reports depend on them. Not to be changed."""
    from tests.varied import varied_copy

    folder = tmp_path_factory.mktemp("context")
    options = [*tiny_overrides[1:], f"data.root={context_dataset}", READ, "train.trackers=[]", "train.select=loss"]
    assert main(["finetune", "tiny/finetune", *options, "--output", str(folder / "run")]) == 0
    varied_copy(folder / "run", folder / "varied")
    return folder / "varied"


@pytest.mark.slow
def test_the_context_is_learned_from_and_dropped_at_random(finetune: Any, context_dataset: Path) -> None:
    options = ("train.epochs=1", f"data.root={context_dataset}")
    off = finetune("off", *options)
    on = finetune("on", *options, READ)
    assert on.series("train/loss")[0] != off.series("train/loss")[0]
    # The tokens come from the contexts too, so only runs with one tokenizer can be compared number by number.
    all_dropped = finetune("dropped", *options, READ, "data.context_dropout=1")
    none_dropped = finetune("kept", *options, READ, "data.context_dropout=0")
    assert all_dropped.series("train/loss") != none_dropped.series("train/loss")
    assert all_dropped.series("train/loss")[0] != on.series("train/loss")[0]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_drops_the_same_fields(workers: int, finetune: Any, context_dataset: Path) -> None:
    options = (f"data.root={context_dataset}", READ, "data.context_dropout=0.5", f"data.workers={workers}")
    options += ("train.epochs=3", "train.batch_size=4", "train.checkpoint_every_steps=1")
    whole = finetune("whole", *options)
    finetune("part", *options, "train.stop_after_steps=5")
    part = finetune("part", *options, resume=True)
    assert part.history == whole.history
    for name, tensor in whole.weights.items():
        assert torch.equal(part.weights[name], tensor), name


@pytest.mark.slow
def test_evaluate_states_the_context_that_was_read(
    context_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_java: None
) -> None:
    def evaluate(name: str, *options: str) -> tuple[dict[str, Any], list[str]]:
        arguments = ["evaluate", "-m", str(context_run), "-o", str(tmp_path / name), "--json", *options]
        assert main(arguments) == 0
        rows = (tmp_path / name / "predictions.jsonl").read_text().splitlines()
        return json.loads(capsys.readouterr().out), [json.loads(row)["hypothesis"] for row in rows]

    read, reports = evaluate("with", "--image-controls")
    assert ", context indication, age; " not in read["protocol_line"]
    assert "tokenizer whitespace, context indication, age, backbone" in read["protocol_line"]
    assert read["settings"]["data"]["context"] == ["indication", "age"]
    assert "Shuffled reports lose their context (indication, age) as well as their films" in read["image"]
    without, bare = evaluate("without", "data.context=[]")
    assert "context" not in without["protocol_line"]
    assert without["settings"]["data"]["context"] == []
    assert reports != bare


@pytest.mark.slow
def test_generate_reads_options_tables_and_headers(
    context_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make_dicom: Callable[..., bytes], chest: Any
) -> None:
    films = tmp_path / "films"
    films.mkdir()
    header = {"PatientAge": "058Y", "PatientSex": "F", "ReasonForStudy": "Fever, 3 days"}
    (films / "a.dcm").write_bytes(make_dicom(chest, **header))
    Image.fromarray(chest).save(films / "b.png")
    number = 0

    def generate(*arguments: str) -> dict[str, Any]:
        nonlocal number
        number += 1
        out = tmp_path / str(number)
        assert main(["generate", *arguments, "-m", str(context_run), "-o", str(out)]) == 0
        rows = [json.loads(line) for line in (out / "reports.jsonl").read_text().splitlines()]
        return {Path(row["path"]).name: row for row in rows}

    found = generate(str(films))
    assert found["a.dcm"]["context"] == {"indication": "fever 3 days", "age": "58 years"}
    assert "context" not in found["b.png"]
    given = generate(str(films), "--context", "indication=Chest pain, XXXX", "--context", "age=7")
    assert {row["report"] for row in given.values()} != {row["report"] for row in found.values()}
    for row in given.values():
        assert row["context"] == {"indication": "chest pain", "age": "7 years"}
    table = tmp_path / "films" / "table.csv"
    table.write_text("image,study,indication,age,sex\na.dcm,s,Cough,,M\nb.png,s,,61,M\nb.png,t,,,\n")
    listed = generate("--table", str(table), "--study-column", "study")
    assert [row.get("context") for row in listed.values()] == [{"indication": "cough", "age": "61 years"}, None]
    assert listed["a.dcm"]["views"] == ["PA", None]

    # The same command continues; another context is another report.
    again = ["generate", str(films / "b.png"), "-m", str(context_run), "-o", str(tmp_path / "1")]
    assert main(again) == 0
    assert main([*again, "--context", "age=4"]) == 2
    assert "b.png that was written with another context" in capsys.readouterr().err
    assert main([*again, "--context", "age=4", "--overwrite"]) == 0
    assert main([*again, "--context", "age=old"]) == 2
    assert "the context age=old is not understood\nWrite 45, 45Y" in capsys.readouterr().err
    # An empty cell of a data frame is no text.
    data = DataSettings(context=["indication", "age"])
    assert read_context({"indication": float("nan"), "age": None}, data) == {}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--context", "sex=F"], "does not read sex: it was trained without any context"),
        (["--context", "cough"], "--context 'cough' is not FIELD=TEXT"),
        (["--context", "=45"], "--context '=45' is not FIELD=TEXT"),
        (["--context", "age= "], "--context 'age= ' is not FIELD=TEXT"),
        (["--context", "age=1", "--context", "age=2"], "--context age is given twice"),
    ],
)
def test_a_context_that_cannot_be_read(
    options: list[str], told: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], chest: Any
) -> None:
    Image.fromarray(chest).save(tmp_path / "b.png")
    command = ["generate", str(tmp_path / "b.png"), "-m", str(tiny_run), "-o", str(tmp_path / "out"), *options]
    assert main(command) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_generate_and_evaluate_read_a_data_set_alike(
    context_run: Path, context_dataset: Path, tmp_path: Path, no_java: None
) -> None:
    model = ["-m", str(context_run)]
    assert main(["evaluate", *model, "--split", "validation", "-o", str(tmp_path / "scores")]) == 0
    assert main(["generate", str(context_dataset), *model, "--split", "validation", "-o", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "reports.jsonl").read_text().splitlines()]
    scored = [json.loads(line) for line in (tmp_path / "scores" / "predictions.jsonl").read_text().splitlines()]
    assert {row["study"]: row["report"] for row in rows} == {row["study_id"]: row["hypothesis"] for row in scored}
    assert [row["context"].get("indication") for row in rows] == [
        "dyspnoea", "cough and fever for three days", "fall", None,
    ]  # fmt: skip
