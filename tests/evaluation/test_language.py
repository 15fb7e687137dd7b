"""Scores against values computed by hand or by a small independent implementation, and Java that misbehaves."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.evaluation import language as nlg
from emrrg_cli.scoring import meteor as java
from emrrg_cli.scoring.scores import NAMES

needs_java = pytest.mark.skipif(java.java_path() is None, reason="needs Java")

REFERENCES = [
    "the heart is normal in size . the lungs are clear .",
    "there is a small left pleural effusion .",
    "no acute cardiopulmonary abnormality .",
]
HYPOTHESES = [
    "the heart is normal . the lungs are clear .",
    "there is a large right pleural effusion .",
    "no acute disease .",
]


def _ngrams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _bleu(references: list[str], hypotheses: list[str], order: int) -> float:
    """Corpus BLEU with one reference an item: geometric mean of clipped precisions times the brevity penalty."""
    log_precision = 0.0
    for n in range(1, order + 1):
        matched = total = 0
        for reference, hypothesis in zip(references, hypotheses, strict=True):
            wanted, got = _ngrams(reference.split(), n), _ngrams(hypothesis.split(), n)
            matched += (wanted & got).total()
            total += got.total()
        log_precision += math.log(matched / total) / order
    r, h = (sum(len(text.split()) for text in texts) for texts in (references, hypotheses))
    return math.exp(log_precision) * min(1.0, math.exp(1 - r / h))


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(nlg, "_warned", set())


@pytest.fixture
def fake_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A `java` that is a shell script, found through JAVA_HOME."""
    launcher = tmp_path / "bin" / "java"
    launcher.parent.mkdir()
    launcher.write_text(f"#!/bin/sh\n{request.param}\n")
    launcher.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setattr(nlg, "_warned", set())


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bleu_equals_an_independent_computation(order: int) -> None:
    got = nlg.score(REFERENCES, HYPOTHESES, meteor=False)[f"BLEU_{order}"]
    assert got == pytest.approx(_bleu(REFERENCES, HYPOTHESES, order), abs=1e-6)


def test_bleu_by_hand() -> None:
    # 3 of 4 words and 1 of 3 pairs are right; 5 words against 4 cost exp(1 - 5/4).
    got = nlg.score(["a b c d e"], ["a b x c"], meteor=False)
    assert got["BLEU_1"] == pytest.approx(0.75 * math.exp(-0.25), abs=1e-6)
    assert got["BLEU_2"] == pytest.approx(math.sqrt(0.75 / 3) * math.exp(-0.25), abs=1e-6)


def test_rouge_l_by_hand() -> None:
    # The longest common subsequence "a b c" has 3 words: precision 3/4, recall 3/5, beta 1.2.
    p, r, b2 = 3 / 4, 3 / 5, 1.2**2
    got = nlg.score(["a b c d e"], ["a b x c"], meteor=False)["ROUGE_L"]
    assert got == pytest.approx((1 + b2) * p * r / (r + b2 * p))


def test_identical_reports_have_the_highest_scores() -> None:
    got = nlg.score(REFERENCES, REFERENCES, meteor=False)
    assert got["BLEU_4"] == pytest.approx(1.0, abs=1e-6)
    assert got["ROUGE_L"] == pytest.approx(1.0)
    assert got["CIDEr"] == pytest.approx(10.0)


def test_cider_by_hand() -> None:
    # One-word reports leave only the unigrams: cosine 1 for the first item, 0 for the second, 1/4 of it for n = 1..4.
    assert nlg.score(["a", "b"], ["a", "c"], meteor=False)["CIDEr"] == pytest.approx(10 * (1 / 4 + 0) / 2)


def test_the_best_of_several_references_counts() -> None:
    got = nlg.score([["no effusion .", "lungs are clear ."]], ["lungs are clear ."], meteor=False)
    assert got["ROUGE_L"] == pytest.approx(1.0)
    assert got["BLEU_4"] == pytest.approx(1.0, abs=1e-6)


def test_rouge_l_of_several_references_is_pycocoevalcaps() -> None:
    from pycocoevalcap.rouge.rouge import Rouge

    truth = [[*REFERENCES[:place], "a  b", f"{text} again"] for place, text in enumerate(REFERENCES)]
    wanted, _ = Rouge().compute_score(dict(enumerate(truth)), {n: [text] for n, text in enumerate(HYPOTHESES)})
    assert nlg.score(truth, HYPOTHESES, meteor=False)["ROUGE_L"] == pytest.approx(wanted, abs=1e-12)


def test_a_very_long_report_needs_no_table_of_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from pycocoevalcap.rouge import rouge

    def table(*texts: list[str]) -> int:
        raise AssertionError("a table of all pairs of words needs a terabyte for a million characters")

    monkeypatch.setattr(rouge, "my_lcs", table)
    long = "the lungs are clear . " * 4_000
    assert nlg.score([long, "a"], [long, "b"], meteor=False)["ROUGE_L"] == pytest.approx(0.5)


def test_only_white_space_is_normalised() -> None:
    plain = nlg.score(REFERENCES, HYPOTHESES, meteor=False)
    assert nlg.score([f" {t.replace(' ', chr(10) * 2)}" for t in REFERENCES], HYPOTHESES, meteor=False) == plain
    assert nlg.score([t.upper() for t in REFERENCES], HYPOTHESES, meteor=False)["BLEU_1"] < 0.5


def test_references_are_scored_whole() -> None:
    long = " ".join(f"w{i}" for i in range(300))
    assert nlg.score([long], [" ".join(long.split()[:100])], meteor=False)["ROUGE_L"] < 0.6


@pytest.mark.parametrize("hypotheses", [["", "", ""], [" \n", "", "\t"]])
def test_empty_hypotheses_score_zero(hypotheses: list[str]) -> None:
    got = nlg.score(REFERENCES, hypotheses, meteor=False)
    assert all(value == pytest.approx(0.0, abs=1e-9) for key, value in got.items() if key != "METEOR")


def test_an_empty_hypothesis_is_no_match_for_an_empty_reference() -> None:
    assert nlg.score(["", "lungs are clear"], ["", "lungs are clear"], meteor=False)["ROUGE_L"] == 0.5


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    got = nlg.score(REFERENCES, HYPOTHESES, meteor=False)
    assert tuple(got) == NAMES
    assert got["METEOR"] is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("references", "hypotheses", "says"),
    [
        (["a", "b"], ["a"], "2 references and 1"),
        ([], [], "nothing to score"),
        ("one text", ["one text"], "not one text"),
        ([[]], ["a"], "reference 0"),
        (["a", None], ["a", "b"], "reference 1"),
        (["a"], [None], "hypothesis 0"),
        (["", [" "]], ["a", "b"], "every reference is empty"),
    ],
)
def test_wrong_input_is_named(references: list[str], hypotheses: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        nlg.score(references, hypotheses)


@pytest.mark.usefixtures("no_java")
def test_without_java_meteor_is_none_and_warns_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert java.java_path() is None
    assert nlg.score(REFERENCES, HYPOTHESES)["METEOR"] is None
    assert nlg.score(REFERENCES, HYPOTHESES)["METEOR"] is None
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("no Java found") == 1


@pytest.mark.usefixtures("no_java")
def test_without_java_ptb_is_an_error() -> None:
    with pytest.raises(RunError, match="ptb tokenizer needs Java"):
        nlg.score(REFERENCES, HYPOTHESES, tokenizer="ptb")


FILLS_STDERR_AND_DIES = "head -c 300000 /dev/zero | tr '\\0' x >&2; exit 3"
ANSWERS_NONSENSE = "while read -r line; do echo 'Error: out of order'; done"


@pytest.mark.usefixtures("no_java")
def test_java_can_be_checked_before_scoring() -> None:
    nlg.require_java("whitespace")
    with pytest.raises(RunError, match="the ptb tokenizer needs Java: no Java found on PATH") as caught:
        nlg.require_java("ptb", meteor=True)
    assert "evaluation.tokenizer=whitespace" in str(caught.value.hint)
    with pytest.raises(RunError, match="METEOR needs Java: no Java found on PATH") as caught:
        nlg.require_java("whitespace", meteor=True)
    assert "train.score_weights" in str(caught.value.hint)


@pytest.mark.parametrize("fake_java", ["exit 0"], indirect=True)
@pytest.mark.usefixtures("fake_java")
def test_an_existing_java_passes_the_check() -> None:
    nlg.require_java("ptb", meteor=True)


@pytest.mark.parametrize(
    ("fake_java", "says"),
    [
        ("echo 'Picked up JAVA_TOOL_OPTIONS: -X' >&2; echo 'no memory' >&2; exit 1", "status 1: no memory"),
        (FILLS_STDERR_AND_DIES, "status 3: xxx"),
        (ANSWERS_NONSENSE, "'Error:' where a number"),
        ("exec 1>&-; exit 0", "status 0"),
    ],
    indirect=["fake_java"],
)
@pytest.mark.usefixtures("fake_java")
def test_a_java_that_fails_gives_none_and_a_reason(says: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert nlg.score(REFERENCES, HYPOTHESES)["METEOR"] is None
    assert says in capfd.readouterr().err


@pytest.mark.parametrize("fake_java", ["exec sleep 60"], indirect=True)
@pytest.mark.usefixtures("fake_java")
def test_a_java_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(java, "_START_LIMIT_S", 0.2)
    monkeypatch.setattr(java, "_LIMIT_PER_TEXT_S", 0.0)
    # More text than a pipe holds, to a process that reads none of it.
    assert nlg.score(["a " * 100_000 + "b"], ["a b"])["METEOR"] is None
    assert "no answer within 0 s" in capfd.readouterr().err
    with pytest.raises(RunError, match="no answer"):
        nlg.score(["a " * 100_000 + "b"], ["a b"], tokenizer="ptb")


@needs_java
def test_ptb_lower_cases_and_drops_punctuation() -> None:
    texts = ["The heart (left) is normal, in size.", "", "caf\u00e9\nau lait"]
    assert java.ptb_tokenize(texts) == ["the heart -lrb- left -rrb- is normal in size", "", "caf\u00e9 au lait"]
    got = nlg.score(["Lungs are clear."], ["lungs are clear"], tokenizer="ptb", meteor=False)
    assert got["ROUGE_L"] == pytest.approx(1.0)
