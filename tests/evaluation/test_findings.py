"""Finding scores against counts made by hand."""

import pytest

from emrrg_cli.errors import UsageError
from emrrg_cli.evaluation.findings import finding_scores


def test_counts_by_hand() -> None:
    truth = [{"effusion", "nodule"}, {"effusion"}, set(), {"nodule"}]
    found = [{"effusion"}, {"effusion", "edema"}, {"effusion"}, set()]
    scores = finding_scores(truth, found)
    assert scores["effusion"] == {"precision": 2 / 3, "recall": 1.0, "f1": pytest.approx(0.8), "support": 2.0}
    assert scores["nodule"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 2.0}
    # 2 hits, 2 false (edema, effusion), 2 missed (nodule twice)
    assert scores["micro"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 4.0}
    # edema is in no truth: it counts as false in micro, not as a finding in macro
    assert scores["macro"]["f1"] == pytest.approx(0.4)


def test_perfect_and_empty() -> None:
    assert finding_scores([{"a"}, {"b"}], [{"a"}, {"b"}])["micro"]["f1"] == 1.0
    assert finding_scores([set()], [set()])["micro"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0.0}


@pytest.mark.parametrize(("truth", "found"), [([], []), ([{"a"}], [])])
def test_wrong_lengths(truth: list[set[str]], found: list[set[str]]) -> None:
    with pytest.raises(UsageError, match="studies"):
        finding_scores(truth, found)
