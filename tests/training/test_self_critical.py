"""Self-critical training: rewards, advantages, the loss and its gradient, and its place in a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from emrrg_cli.errors import UsageError
from emrrg_cli.evaluation.language import score
from emrrg_cli.scoring.reward import FINDING_PRICE, Reward
from emrrg_cli.training.self_critical import advantages

CORPUS = [
    "the heart is enlarged . no pleural effusion .",
    "the lungs are clear . the heart is normal in size .",
    "there is a left pleural effusion .",
]


def test_a_reward_is_the_weighted_sum_of_the_scores_of_a_pair() -> None:
    weights = {"BLEU_1": 0.5, "BLEU_4": 2.0, "ROUGE_L": 1.0}
    written = ["the heart is enlarged . no effusion .", "the lungs are clear .", "there is a left pleural effusion ."]
    for reference, hypothesis, got in zip(CORPUS, written, Reward(CORPUS, weights)(CORPUS, written), strict=True):
        alone = score([reference], [hypothesis], meteor=False)
        assert got == pytest.approx(sum(weight * (alone[name] or 0.0) for name, weight in weights.items()), abs=1e-6)


def test_cider_weighs_words_by_the_training_reports() -> None:
    written = ["the heart is enlarged .", "the lungs are clear .", "no effusion ."]
    rewards = Reward(CORPUS, {"CIDEr": 1.0})(CORPUS, written)
    whole = score(CORPUS, written, meteor=False)["CIDEr"]
    assert sum(rewards) / 3 == pytest.approx((whole or 0.0) / 10)
    assert Reward(CORPUS, {"CIDEr": 1.0})(CORPUS[:1], written[:1]) == pytest.approx(rewards[:1])  # not by the batch


def test_findings_are_rewarded_by_their_positive_labels() -> None:
    written = [
        "the heart is enlarged . there is a left pleural effusion .",
        "no acute disease .",
        "the lungs are clear .",
    ]
    found = Reward(CORPUS, {"F1_rules": 2.0})([CORPUS[0], "normal chest .", CORPUS[2]], written)
    assert found == pytest.approx([2 * 2 / 3, 2.0, 0.0])
    # One of two findings is right; no finding costs nothing, and "No Finding" gains nothing.
    found = Reward(CORPUS, {"findings": 2.0})([CORPUS[0], "normal chest .", CORPUS[2]], written)
    assert found == pytest.approx([2 * (1 - 2 * FINDING_PRICE), 0.0, 0.0])
    both = Reward(CORPUS, {"findings": 2.0, "F1_rules": 1.0})
    assert both(CORPUS[1:2], written[:1], contrast=True) == Reward(CORPUS, {"F1_rules": 1.0})(CORPUS[1:2], written[:1])


def test_a_finding_that_the_report_also_denies_is_not_rewarded() -> None:
    both = ["there is cardiomegaly . there is a pleural effusion . the heart size is normal ."]
    truth = ["the heart is enlarged . there is a pleural effusion ."]
    assert Reward(CORPUS, {"findings": 1.0})(truth, both) == pytest.approx([1 - 2 * FINDING_PRICE])
    assert Reward(CORPUS, {"F1_rules": 1.0})(truth, both) == pytest.approx([2 / 4])
    assert Reward(CORPUS, {"F1_rules": 1.0})(both, truth) == pytest.approx([1.0])  # a reference may tell parts apart


def test_an_advantage_is_over_the_mean_of_the_other_samples() -> None:
    found = advantages(torch.tensor([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]]))
    assert torch.allclose(found, torch.tensor([[1 - 4, 2 - 3.5, 6 - 1.5], [0.0, 0.0, 0.0]]))


@pytest.fixture
def study(finetune: Any, tiny_dataset: Any) -> Any:
    """A trained tiny model and a batch of two studies."""
    from functools import partial

    from emrrg_cli.datasets.directory import open_dataset
    from emrrg_cli.datasets.report_dataset import ReportDataset, collate
    from emrrg_cli.models.build import load_model
    from emrrg_cli.recipe.load import load_recipe
    from emrrg_cli.runtime import make_accelerator

    run = finetune("start", "train.epochs=1")
    recipe = load_recipe(str(run.directory / "recipe.yaml"), [], stage="finetune")
    model = load_model(run.directory, recipe.model, torch.float32).requires_grad_(True)
    data = ReportDataset(open_dataset(tiny_dataset)["train"], recipe.data, recipe.model.encoder.image_size)
    batch = collate([data[0], data[1]], partial(model.encode_report, max_tokens=20))
    return model, batch, data.reports, make_accelerator("fp32", 0)


def _sampled(study: Any, samples: int = 3, cross_entropy: float = 0.0, temperature: float = 1.0) -> Any:
    from emrrg_cli.recipe.finetuning import SelfCriticalSettings
    from emrrg_cli.training.self_critical import Sampler

    model, batch, reports, accelerator = study
    torch.manual_seed(5)
    settings = SelfCriticalSettings(
        samples=samples, temperature=temperature, max_new_tokens=12, cross_entropy=cross_entropy, contrast=0
    )
    return Sampler(model, settings, Reward(reports, settings.rewards), accelerator).sampled_batch(batch)


@pytest.mark.slow
def test_the_gradient_is_that_of_each_sample_times_its_advantage(study: Any) -> None:
    from dataclasses import replace

    from emrrg_cli.datasets.report_dataset import IGNORE

    model = study[0]
    sampled = _sampled(study)
    assert sampled.labels.shape[0] == sampled.advantages.shape[0] == 6
    assert sampled.advantages.view(2, 3).sum(dim=1).abs().max() < 1e-6
    sampled = replace(sampled, advantages=torch.tensor([1.0, -0.5, 2.0, 0.0, 0.25, -1.0]))
    weight: nn.Parameter = model.bridge.proj.weight
    (found,) = torch.autograd.grad(model(sampled).loss_sum, weight)
    expected = torch.zeros_like(found)
    first = int(sampled.views[0])
    for row, advantage in enumerate(sampled.advantages.tolist()):
        pixels = sampled.pixels[:first] if row < 3 else sampled.pixels[first:]
        labels = sampled.labels[row : row + 1]
        alone = replace(
            sampled,
            pixels=pixels,
            views=sampled.views[row // 3][None],
            labels=labels[labels != IGNORE][None],
            advantages=None,
        )
        (gradient,) = torch.autograd.grad(model(alone).loss_sum, weight)
        expected += advantage * gradient
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-3)
    assert expected.abs().max() > 1e-4


@pytest.mark.slow
def test_the_gradient_is_that_of_the_expected_score(study: Any) -> None:
    """For reports of one word, whose expected score at the temperature of the samples has a closed form."""
    from dataclasses import replace

    model, at = study[0], 0.7
    scores = torch.randn(11, dtype=torch.float64)
    words = torch.randn(11, dtype=torch.float64, requires_grad=True)
    drawn = (words / at).softmax(dim=0)
    expected_score = (drawn * scores).sum()
    every = replace(  # each word as often as it is drawn
        study[1],
        labels=torch.arange(11)[:, None],
        advantages=drawn.detach() * scores,
        temperatures=torch.full((11,), at, dtype=torch.float64),
    )
    loss = model._report_loss(words.expand(11, 1, 11), every)
    found, expected = (torch.autograd.grad(value, words)[0] for value in (loss, -expected_score))
    assert torch.allclose(found, expected)


@pytest.mark.slow
def test_samples_have_their_temperature_and_the_reference_1(study: Any) -> None:
    sampled = _sampled(study, cross_entropy=0.25, temperature=0.7)
    assert sampled.temperatures.tolist() == pytest.approx([0.7, 0.7, 0.7, 1.0] * 2)
    assert _sampled(study).temperatures is None


def test_a_report_that_fits_all_studies_gains_nothing() -> None:
    from emrrg_cli.recipe.finetuning import SelfCriticalSettings
    from emrrg_cli.runtime import make_accelerator
    from emrrg_cli.training.self_critical import Sampler

    settings = SelfCriticalSettings(samples=2, contrast=1.0, rewards={"ROUGE_L": 1.0})
    reward = Reward(CORPUS, settings.rewards)
    sampler = Sampler(None, settings, reward, make_accelerator("fp32", 0))  # type: ignore[arg-type]
    reports = [text for own in CORPUS for text in (own, CORPUS[1])]  # the own reference, and one for everybody
    found = sampler._rewards(CORPUS, reports)
    for study, own in enumerate(CORPUS):
        others = [reward([text], [own])[0] for text in CORPUS if text != own]
        assert found[study, 0] == pytest.approx(1 - sum(others) / 2)
    assert (found[:, 0] > 0.3).all()
    assert found[:, 1].sum() == pytest.approx(0.0, abs=1e-6)


def test_micro_batches_are_compared_with_their_whole_step() -> None:
    from emrrg_cli.recipe.finetuning import SelfCriticalSettings
    from emrrg_cli.runtime import make_accelerator
    from emrrg_cli.training.self_critical import Sampler

    settings = SelfCriticalSettings(samples=2, contrast=0.5, rewards={"ROUGE_L": 1.0})
    sampler = Sampler(
        None, settings, Reward(CORPUS, settings.rewards), make_accelerator("fp32", 0)  # type: ignore[arg-type]
    )  # fmt: skip
    references = [*CORPUS, "no pneumothorax ."]
    reports = [text for own in references for text in (own, CORPUS[1])]
    whole = sampler._rewards(references, reports)
    given: dict[str, Any] = {}

    def sampled(batch: Any, others: Any) -> Any:
        place = 2 * references.index(batch.reports[0])
        count = 2 * len(batch.reports)
        given[batch.reports[0]] = sampler._rewards(batch.reports, reports[place : place + count], others)
        return batch

    sampler.sampled_batch = sampled  # type: ignore[method-assign, assignment]
    for cut in ([1, 1, 1, 1], [3, 1], [4]):
        given.clear()
        ends = [sum(cut[: i + 1]) for i in range(len(cut))]
        sampler.sampled_batches(
            [SimpleNamespace(reports=references[end - n : end]) for n, end in zip(cut, ends, strict=True)]  # type: ignore[misc]
        )
        assert torch.allclose(torch.cat(list(given.values())), whole)


def test_contrast_needs_two_studies_in_a_step(finetune: Any) -> None:
    settings = "train.self_critical={after_epochs: 0, samples: 2, max_new_tokens: 6}"
    with pytest.raises(UsageError, match="compares studies of a step, but each process has only one"):
        finetune("one", "train.batch_size=1", settings)


def test_self_critical_training_that_never_begins_is_told(finetune: Any, capfd: pytest.CaptureFixture[str]) -> None:
    settings = "train.self_critical={after_epochs: 2, samples: 2, max_new_tokens: 6}"
    finetune("never", "train.epochs=3", "train.max_steps=3", settings)
    told = " ".join(capfd.readouterr().err.split())
    assert "train.self_critical begins after 2 epochs, and training ends after 1.5" in told


@pytest.mark.slow
def test_the_reference_can_be_learned_beside_the_samples(study: Any) -> None:
    from emrrg_cli.datasets.report_dataset import IGNORE

    alone, beside = _sampled(study), _sampled(study, cross_entropy=0.25)
    assert beside.labels.shape[0] == 8
    for row in range(2):
        samples, reference = beside.labels[4 * row : 4 * row + 3], beside.labels[4 * row + 3]
        for own, same in zip(alone.labels[3 * row : 3 * row + 3], samples, strict=True):
            assert torch.equal(own[own != IGNORE], same[same != IGNORE])
        assert torch.equal(reference[reference != IGNORE], study[1].labels[row][study[1].labels[row] != IGNORE])
        assert beside.advantages.view(2, 4)[row].tolist() == [*alone.advantages.view(2, 3)[row].tolist(), 0.25]


@pytest.mark.slow
def test_sampling_restores_the_mode_of_the_model(study: Any) -> None:
    model = study[0].train()
    _sampled(study)
    assert model.training


@pytest.mark.slow
def test_a_run_begins_self_critical_training_and_resumes_exactly(finetune: Any) -> None:
    settings = "train.self_critical={after_epochs: 1, samples: 2, max_new_tokens: 6, cross_entropy: 0}"
    options = ("train.epochs=2", "train.log_every=1", settings)
    whole = finetune("whole", *options)
    plain = finetune("plain", "train.epochs=2", "train.log_every=1")
    steps = whole.last_step() // 2
    assert whole.series("train/loss")[:steps] == plain.series("train/loss")[:steps]
    assert all(abs(loss) < 1 for loss in whole.series("train/loss")[steps:])  # advantages sum to 0
    assert any(loss != 0 for loss in whole.series("train/loss")[steps:])
    finetune("part", *options, f"train.stop_after_steps={steps + 1}")
    resumed = finetune("part", *options, resume=True)
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in whole.weights.items())


def test_word_recall_pays_nothing_for_repeated_words() -> None:
    truth, once = ["there is an opacity . there is an effusion ."], ["there is an opacity ."]
    twice = ["there is an opacity . there is an opacity ."]
    recall, words = Reward(CORPUS, {"ROUGE_1": 1.0}), Reward(CORPUS, {"word_recall": 1.0})
    assert words(truth, once) == words(truth, twice) == pytest.approx([5 / 6])
    assert recall(truth, once) == pytest.approx([5 / 10])
    assert recall(truth, twice) == pytest.approx([9 / 10])
    assert words([""], once) == [0.0]
