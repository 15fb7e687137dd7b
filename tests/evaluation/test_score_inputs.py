"""Everything that people pass to `score`: the field's dictionaries, columns, arrays, generators, and mistakes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

import emrrg_cli
from emrrg_cli.errors import UsageError

REFERENCES = ["the heart is normal .", "no effusion .", "lungs are clear ."]
HYPOTHESES = ["the heart is large .", "no effusion .", "clear lungs ."]


def _score(references: Any, hypotheses: Any) -> dict[str, float | None]:
    return emrrg_cli.score(references, hypotheses, meteor=False)


WANTED = _score(REFERENCES, HYPOTHESES)


@pytest.mark.parametrize(
    ("references", "hypotheses"),
    [
        (dict(enumerate(REFERENCES)), dict(enumerate(HYPOTHESES))),
        (
            {"a": [REFERENCES[0]], "b": [REFERENCES[1]], "c": REFERENCES[2:]},
            {"c": HYPOTHESES[2:], "a": HYPOTHESES[0], "b": [HYPOTHESES[1]]},
        ),
        (np.array(REFERENCES), np.array(HYPOTHESES, dtype=object)),
        (pd.Series(REFERENCES, index=[7, 3, 1]), pd.Series(HYPOTHESES)),
        ((text for text in REFERENCES), (text for text in HYPOTHESES)),
        ([(text,) for text in REFERENCES], tuple(HYPOTHESES)),
        (np.array([[text] for text in REFERENCES]), HYPOTHESES),
    ],
    ids=["ids", "lists-by-id", "numpy", "pandas", "generators", "tuples", "matrix"],
)
def test_every_usual_kind_gives_the_same_scores(references: Any, hypotheses: Any) -> None:
    assert _score(references, hypotheses) == WANTED


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        ({"a": "x", "b": "y"}, {"a": "x"}, r"1 reference without a hypothesis \(b\); 1 match"),
        ({"a": "x"}, {"a": "x", "s1": "y"}, r"1 hypothesis without a reference \(s1\); 1 match"),
        ({"50": ["x"]}, {"s50": ["x"]}, "0 match"),
        ({"a": "x"}, ["x"], "one of references and hypotheses is a dictionary, the other is not"),
        ({"a": "x"}, {"a": ["x", "y"]}, "hypothesis a has 2 texts, but must have one"),
        ({"a": []}, {"a": "x"}, "reference a must be a text or a list of texts"),
        (["x"], [float("nan")], r"hypothesis 0 is not a text but float \(NaN, an empty cell\)"),
        (
            ["x", None],
            ["x", "y"],
            "reference 1 must be a text or a list of .* not NoneType",
        ),
        ([float("nan")], ["x"], r"reference 0 must be .* not float \(NaN"),
        (pd.DataFrame({"report": ["x"]}), ["x"], "references are a table"),
        ({"x"}, {"x"}, "references are a set, which has no order"),
        ([b"x"], ["x"], "reference 0 must be a text"),
        (["x"], [b"x"], "hypothesis 0 is not a text but bytes"),
        ("x", ["x"], "must be lists of texts, not one text"),
        ([], [], "there is nothing to score"),
        ({}, {}, "there is nothing to score"),
        (7, ["x"], "references must be a list of texts, not int"),
        (np.array("x"), ["x"], "references must be a list of texts, not ndarray"),
        (["x"], pd.Series([pd.NA], dtype="string"), r"hypothesis 0 is not a text but NAType \(an empty cell\)"),
        (["", " "], ["x", "y"], "every reference is empty"),
        (["x", "y"], ["x"], "there are 2 references and 1 hypothesis; "),
    ],
)
def test_a_mistake_gets_one_message(references: Any, hypotheses: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _score(references, hypotheses)


def test_empty_reports_count_as_wrong() -> None:
    got = _score(REFERENCES, ["", "no effusion .", ""])
    assert 0 < got["ROUGE_L"] == pytest.approx(1 / 3)  # type: ignore[operator]


def test_one_study_is_scored() -> None:
    got = _score({"a": ["no effusion ."]}, {"a": ["no effusion ."]})
    assert (got["ROUGE_L"], got["CIDEr"]) == (1.0, 0.0)
