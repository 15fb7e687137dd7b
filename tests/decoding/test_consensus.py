"""Consensus decoding: the sample that agrees best with the others, in both engines."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from emrrg_cli.decoding.consensus import several_samples
from emrrg_cli.decoding.reports import load_generator
from emrrg_cli.decoding.slots import Prompts
from emrrg_cli.decoding.writer import Studies, Writer
from emrrg_cli.evaluation.language import score
from emrrg_cli.labeling import positive_labels
from emrrg_cli.recipe.finetuning import GenerationSettings
from emrrg_cli.scoring.agreement import most_agreed
from emrrg_cli.scoring.reward import Reward
from tests.decoding.test_reports import images, run_dir

__all__ = ["images", "run_dir"]

SAMPLES = [
    "the lungs are clear . the heart is normal in size .",
    "the heart is normal in size . the lungs are clear . no effusion .",
    "there is a large left pleural effusion .",
    "the heart is normal in size . the lungs are clear .",
    "the heart is normal in size . the lungs are clear .",
]
OPTIONS = ["generation.num_beams=1", "generation.do_sample=true", "generation.temperature=3.0"]


@pytest.mark.parametrize(
    "weights",
    [
        {"BLEU_4": 1.0},
        {"BLEU_1": 1.0, "ROUGE_1": 0.5, "F1_rules": 0.3, "findings": 0.8},
        {"BLEU_2": 0.3, "BLEU_3": 1.0},
        {"F1_rules": 1.0, "ROUGE_1": 0.1},
        {"word_recall": 1.0, "BLEU_1": 0.2},
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_kept_sample_has_the_best_mean_score(weights: dict[str, float], seed: int) -> None:
    rng = random.Random(seed)
    sentences = [f"{part} ." for text in SAMPLES for part in text.split(" . ")]
    texts = [" ".join(rng.choices(sentences, k=rng.randint(1, 4))) for _ in range(12)]
    texts += texts[:3]  # repeated ones count as often as they were sampled
    reward = Reward((), weights)
    agreement = [float(np.mean(reward(texts, [text] * len(texts)))) for text in texts]
    assert most_agreed(texts, weights) == int(np.argmax(agreement))


def test_the_central_sample_is_kept() -> None:
    assert most_agreed(SAMPLES, {"BLEU_4": 1.0}) == 3
    alone = [score([other], [SAMPLES[3]], meteor=False)["BLEU_4"] or 0.0 for other in SAMPLES]
    assert Reward((), {"BLEU_4": 1.0})(SAMPLES, [SAMPLES[3]] * 5) == pytest.approx(alone, abs=1e-6)


def test_labels_can_be_what_the_samples_agree_on() -> None:
    texts = [
        "the lungs are clear . no pleural effusion .",
        "there is a left pleural effusion .",
        "there is a pleural effusion . the heart is enlarged .",
        "small effusion on the left . no pneumothorax .",
    ]
    labels = positive_labels(texts)
    assert labels[1] == labels[3] == {"Pleural Effusion"}
    assert most_agreed(texts, {"F1_rules": 1.0}) == 1  # the first of those with the label that three have
    assert most_agreed(texts, {"findings": 1.0}) == 2  # an enlarged heart in a quarter of the samples is worth telling
    assert most_agreed([*texts, *texts[:1] * 4], {"findings": 1.0}) == 1  # one in eight is not


def test_a_finding_that_the_same_report_denies_does_not_count() -> None:
    texts = ["there is cardiomegaly . the heart size is normal .", "cardiomegaly .", "the heart is enlarged ."]
    for name in ("findings", "F1_rules"):
        assert most_agreed(texts, {name: 1.0}) == 1


def test_one_text_for_all_is_kept() -> None:
    assert most_agreed(["the same ."] * 4, {"BLEU_4": 1.0}) == 0
    assert most_agreed(["", "", "a report ."], {"BLEU_4": 1.0}) == 2  # empty ones agree with nothing


def test_prompts_are_repeated_with_seeds_of_their_own() -> None:
    embeddings = torch.randn(2, 3, 4)
    seeds = [(7 << 32) + 5, (7 << 32) + 6]
    made = several_samples(Prompts(["a", "b"], seeds, embeddings, torch.ones(2, 3), embeddings), 3)
    assert made.keys == [(key, number) for key in "ab" for number in range(3)]
    assert made.embeddings is embeddings  # read once
    repeated = made.repeated()
    assert torch.equal(repeated.embeddings, embeddings[[0, 0, 0, 1, 1, 1]])
    assert repeated.visual_tokens is not None
    assert torch.equal(repeated.visual_tokens, repeated.embeddings)
    assert (repeated.visual_mask, repeated.copies) == (None, 1)
    assert torch.equal(made.rows(3, 6).embeddings, embeddings[1:])
    assert made.rows(3, 6).keys == made.keys[3:]
    assert len(set(made.seeds)) == 6
    assert {seed >> 32 for seed in made.seeds} == {7}


def test_the_report_is_one_of_the_samples(run_dir: Any, images: Any) -> None:
    one = load_generator(run_dir, device="cpu", overrides=OPTIONS)
    several = load_generator(run_dir, device="cpu", overrides=[*OPTIONS, "generation.consensus=4"])
    pixels = torch.randint(0, 256, (3, 48, 48), generator=torch.Generator().manual_seed(0)).byte()

    def studies(numbers: list[int], rows: list[int]) -> Studies:
        return Studies(numbers, numbers, pixels[rows], torch.ones(len(rows), dtype=torch.long))

    made = {done.key: done for some in several.write(iter([studies([0, 1, 2], [0, 1, 2])])) for done in some}
    assert sorted(made) == [0, 1, 2]
    for study in range(3):
        numbers = [4 * study + number for number in range(4)]
        alone = {done.key: done for some in one.write(iter([studies(numbers, [study] * 4)])) for done in some}
        texts = [alone[number].text for number in numbers]
        assert len(set(texts)) > 1
        kept = alone[numbers[most_agreed(texts, several.recipe.generation.consensus_scores)]]
        assert (made[study].text, made[study].tokens) == (kept.text, kept.tokens)
        assert made[study].confidence is not None
    # Whatever the batch size.
    small = load_generator(
        run_dir, device="cpu", overrides=[*OPTIONS, "generation.consensus=4", "generation.batch_size=1"]
    )
    assert small.generate(images) == several.generate(images)


def test_transformers_engine_keeps_one_report_per_study(run_dir: Any, images: Any) -> None:
    options = [*OPTIONS, "generation.consensus=3", "generation.engine=transformers"]
    generator = load_generator(run_dir, device="cpu", overrides=options)
    assert isinstance(generator.writer, Writer)
    reports = generator.generate(images)
    assert len(reports) == len(images)
    assert all(reports)
    assert reports == generator.generate(images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"consensus": 8}, "consensus needs num_beams: 1 and do_sample: true; for other decoding set consensus: null"),
        ({"consensus": 8, "do_sample": True}, "consensus needs num_beams: 1"),
        ({"consensus_scores": {"CIDEr": 1.0}}, r"unknown scores \['CIDEr'\]; known: \['BLEU_1'"),
        ({"consensus_scores": {}}, "consensus_scores needs a score with a weight above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**settings)
