"""METEOR from its jar, which takes seconds to start: the tests share one Java, in a locale that is not English."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from emrrg_cli.evaluation import language
from emrrg_cli.scoring import meteor

pytestmark = [pytest.mark.slow, pytest.mark.skipif(meteor.java_path() is None, reason="needs Java")]

REFERENCES = [
    "the heart is normal in size . the lungs are clear .",
    "there is a small left pleural effusion .",
    "no acute cardiopulmonary abnormality .",
]


@pytest.fixture(scope="module", autouse=True)
def one_java() -> Iterator[None]:
    """One process of METEOR for all tests, with settings that a machine may have and that must not matter."""
    with pytest.MonkeyPatch.context() as patch:
        # A decimal comma would end the conversation, and ASCII would make two accents one letter.
        patch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE -Dfile.encoding=US-ASCII")
        patch.setenv("LC_ALL", "C")
        with meteor._meteor_process(100) as ask:
            patch.setattr(meteor, "_meteor_process", lambda pairs: nullcontext(ask))
            yield


def test_meteor_of_identical_and_hostile_texts_is_one() -> None:
    hostile = ["", "a\nb\r\nc\u2028d", "x ||| y |||| z", "caf\u00e9 \u5fc3\u81d3 \U0001fac1", "\ud800 lone", "|||", "."]
    texts = [*REFERENCES, *hostile]
    got = language.score([[text, "lungs are clear"] for text in texts], texts)
    assert got["METEOR"] == pytest.approx(1.0, abs=0.02)


def test_meteor_without_a_match_is_zero_in_any_locale() -> None:
    assert meteor.meteor([["lungs are clear"], [""], ["caf\u00e9"]], ["", "", "caf\u00e8"]) == 0.0


def test_meteor_of_sums_equals_that_of_the_jar() -> None:
    references = [
        "the heart is normal in size . the lungs are clear .",
        "there is a small left pleural effusion .",
        "big hearts are enlarged in the chest",
        "lungs are clear",
        "no acute disease",
    ]
    hypotheses = [
        "the heart is normal . lungs clear .",
        "there is a large right pleural effusions .",
        "a large heart is seen within the thorax in size enlarge",
        "lungs are clear",
        "",
    ]
    counted = meteor.statistics([[text] for text in references], hypotheses)
    for count in range(1, 6):
        wanted = meteor.meteor([[text] for text in references[:count]], hypotheses[:count])
        assert meteor.combine(counted[:count].sum(axis=0)) == pytest.approx(wanted, abs=1e-9)
