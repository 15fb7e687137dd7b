"""What the prompt tells of a study: cleaning, leaks of the report, and what training leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from emrrg_cli.app import main
from emrrg_cli.datasets.balance import BalancedStudies
from emrrg_cli.datasets.context import (
    NO_TOKEN,
    context_sentence,
    context_text,
    drop_fields,
    encode_contexts,
    prompt_parts,
    select_context,
)
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.epochs import Epochs
from emrrg_cli.datasets.report_dataset import ReportDataset, collate
from emrrg_cli.errors import UsageError
from emrrg_cli.evaluation.split_reports import OtherFilms
from emrrg_cli.recipe.common import DataSettings


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("Chest pain.", "chest pain"),
        ("XXXX-year-old female, chest pain.", "female chest pain"),
        ("Cough. Rule out pneumonia/XXXX.", "cough . rule out pneumonia"),
        ("___F with cough // ? pneumonia", "f with cough pneumonia"),
        ("[**2101-1-1**] Fever", "fever"),
        ("XXXX, XXXX.", ""),
        ("XXXX", ""),
        (" . ", ""),
        (None, ""),
        ("PA and lateral chest x-XXXX, dated XXXX.", "pa and lateral chest dated"),
        ("one two three four five six", "one two three four five"),
    ],
)
def test_texts_lose_marks_of_deidentification(raw: str | None, text: str) -> None:
    assert context_text("indication", raw, "auto", 5) == text


def test_cleaning_none_leaves_the_text_as_it_is() -> None:
    assert context_text("indication", "Chest pain, XXXX;  Cough", "none", 9) == "Chest pain, ; Cough"


@pytest.mark.parametrize(
    ("raw", "text"),
    [("045Y", "45 years"), ("45", "45 years"), ("61.0", "61 years"), ("006M", "6 months"), ("3 weeks", "3 weeks"),
     ("2 days old", "2 days"), (57, "57 years"), ("58-year-old", "58 years"), ("XXXX", ""), ("999", ""), ("", ""),
     ("-4", "")],
)  # fmt: skip
def test_ages_are_read_in_all_forms(raw: Any, text: str) -> None:
    assert context_text("age", raw, "auto", 9) == text


@pytest.mark.parametrize(("raw", "text"), [("F", "female"), ("Male", "male"), ("O", ""), ("unknown", "")])
def test_sexes_are_male_female_or_missing(raw: str, text: str) -> None:
    assert context_text("sex", raw, "auto", 9) == text


def test_sentences_of_the_report_are_removed() -> None:
    row = {
        "indication": "Cough. The lungs are clear, no effusion! Fever.",
        "comparison": "There is a small left pleural effusion.",
        "findings": "THE LUNGS ARE CLEAR; no effusion.",
        "impression": "There is a small left pleural effusion.",
        "report": None,
    }
    assert select_context(row, ["indication", "comparison"], "auto", 40) == {"indication": "cough . fever"}
    # Three words that happen to stand in both tell nothing.
    assert select_context(
        {"indication": "Left pleural effusion?", "report": row["impression"]}, ["indication"], "auto", 9
    )


def test_fields_are_dropped_by_seed_epoch_and_study() -> None:
    context = {"indication": "cough", "age": "45 years", "sex": "male"}
    draws = [drop_fields(context, 0.5, 1, epoch, "a") for epoch in range(200)]  # type: ignore[arg-type]
    assert draws == [drop_fields(context, 0.5, 1, epoch, "a") for epoch in range(200)]  # type: ignore[arg-type]
    assert draws != [drop_fields(context, 0.5, 2, epoch, "a") for epoch in range(200)]  # type: ignore[arg-type]
    assert draws != [drop_fields(context, 0.5, 1, epoch, "b") for epoch in range(200)]  # type: ignore[arg-type]
    for name in context:
        assert 70 < sum(name in draw for draw in draws) < 130
    assert len({tuple(draw) for draw in draws}) == 8  # each on its own
    assert all(drop_fields(context, 0.0, 1, e, "a") == context for e in range(9))  # type: ignore[arg-type]
    assert not any(drop_fields(context, 1.0, 1, e, "a") for e in range(9))  # type: ignore[arg-type]


def test_sentences_and_tokens(tokenizer_of_bytes: Any) -> None:
    context: Any = {"indication": "cough", "age": "45 years"}
    assert context_sentence(context) == " Indication: cough. Age: 45 years."
    assert context_sentence({}) == ""
    tokens = encode_contexts(tokenizer_of_bytes, [{}, {"sex": "male"}, context])
    assert tokens is not None
    assert [bytes(row[row != NO_TOKEN].tolist()).decode() for row in tokens] == [
        "", " Sex: male.", " Indication: cough. Age: 45 years.",
    ]  # fmt: skip
    assert encode_contexts(tokenizer_of_bytes, [{}, {}]) is encode_contexts(tokenizer_of_bytes, []) is None


@pytest.fixture
def tokenizer_of_bytes() -> Any:
    class Bytes:
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return list(text.encode())

    return Bytes()


def test_the_place_of_the_context_in_the_prompt() -> None:
    assert prompt_parts("a<ImageHere>b") == ("a", "", "b")
    assert prompt_parts("a<ImageHere>b<ContextHere>c") == ("a", "b", "c")


# -- a dataset directory --------------------------------------------------------------------------------------------


def test_studies_have_their_context(context_dataset: Path) -> None:
    settings = DataSettings(context=["age", "indication", "sex"])
    dataset = ReportDataset(open_dataset(context_dataset)["train"], settings, 16)
    assert dataset.contexts[0] == {"age": "40 years", "indication": "dyspnoea", "sex": "female"}
    assert list(dataset.contexts[0]) == ["age", "indication", "sex"]
    assert dataset.contexts[3] == {"age": "43 years", "sex": "male"}  # its indication is XXXX
    assert dataset[0].context == dataset.contexts[0]
    assert collate([dataset[0], dataset[3]]).contexts == [dataset.contexts[0], dataset.contexts[3]]
    assert ReportDataset(open_dataset(context_dataset)["train"], DataSettings(), 16)[0].context == {}
    assert collate([ReportDataset(open_dataset(context_dataset)["train"], DataSettings(), 16)[0]]).contexts == []


def test_only_a_training_drops_fields(context_dataset: Path) -> None:
    settings = DataSettings(context=["indication", "age"], context_dropout=1.0)
    dataset = ReportDataset(open_dataset(context_dataset)["train"], settings, 16)
    assert dataset[0].context == dataset.contexts[0] != {}
    for shown in (dataset, BalancedStudies(dataset, 2.0)):
        assert Epochs(shown)[3, 0].context == {}
    half = ReportDataset(
        open_dataset(context_dataset)["train"], settings.model_copy(update={"context_dropout": 0.5}), 16, seed=4
    )
    of_epochs = [Epochs(half)[epoch, 0].context for epoch in range(12)]
    assert of_epochs == [drop_fields(half.contexts[0], 0.5, 4, epoch, half.study_ids[0]) for epoch in range(12)]
    assert len({tuple(context) for context in of_epochs}) > 2


def test_films_of_other_studies_keep_the_own_context(context_dataset: Path) -> None:
    dataset = ReportDataset(open_dataset(context_dataset)["train"], DataSettings(context=["age"]), 16)
    other = OtherFilms(dataset, [1, 2, 0])[0]
    assert other.context == {"age": "40 years"}
    assert other.pixels.equal(dataset[1].pixels)


def test_a_directory_without_the_columns(
    tiny_dataset: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = DataSettings(root=str(tiny_dataset), context=["indication", "sex"])
    with pytest.raises(UsageError, match=r"data\.context names indication, sex, but .*tiny.* has no such column"):
        ReportDataset(open_dataset(tiny_dataset)["train"], settings, 16)
    told = ["finetune", "tiny/finetune", f"data.root={tiny_dataset}", "data.context=[technique]"]
    assert main([*told, "--output", str(tmp_path / "run")]) == 2
    assert "--indication-column" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*told[:3], "data.context=[age, age]", "--output", str(tmp_path / "run")]) == 2
    assert "data.context: names a field twice" in capsys.readouterr().err
