"""Self-critical training: reports that the model samples are made likelier the better they score.

Cross-entropy teaches the next word of the reference; the scores judge whole reports. After some epochs of cross-entropy
the model samples several reports a study, each is scored against the reference, and the loss of a sample is its
negative log-probability times how much better than the study's mean it scored.

Source: self-critical sequence training (Rennie et al., arXiv 1612.00563), with the mean of the other samples as the
baseline (Luo, arXiv 2003.09971); for reports, R2GenCMN+RL (Qin and Song, Findings of ACL 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emrrg_cli.datasets.report_dataset import IGNORE, Batch
from emrrg_cli.decoding.reference import generate_reports
from emrrg_cli.decoding.slots import Prompts
from emrrg_cli.evaluation.comparison import Corpus
from emrrg_cli.evaluation.scores import SCORES
from emrrg_cli.models.report_generator import ReportGenerator
from emrrg_cli.recipe.finetuning import GenerationSettings, SelfCriticalSettings
from emrrg_cli.vocabulary import CIDER

_REMEMBERED = 20_000


class Reward:
    """The weighted sum of scores of each report against its reference; CIDEr counts as a part of 10.

    CIDEr's n-grams are weighed by how rare they are among the training reports.

    Args:
        corpus: the training reports.
        weights: by the names of the scores.
    """

    def __init__(self, corpus: Sequence[str], weights: Mapping[str, float]) -> None:
        self._texts, self._weights = list(corpus), dict(weights)
        self._corpus, self._compared = Corpus(self._texts), 0

    def __call__(self, references: Sequence[str], hypotheses: Sequence[str]) -> list[float]:
        """One number a pair."""
        if self._compared > _REMEMBERED:  # it remembers every text that it has seen
            self._corpus, self._compared = Corpus(self._texts), 0
        self._compared += len(hypotheses)
        pairs = self._corpus.compare(references, hypotheses)
        total = np.zeros(len(pairs))
        for score in SCORES:
            if wanted := set(score.names) & set(self._weights):
                values = score.combine(score.statistics(pairs), 1)  # each pair as a corpus of its own
                for name in wanted:
                    scale = self._weights[name] / (10 if name == CIDER else 1)
                    total += scale * values[:, score.names.index(name)]
        return [float(value) for value in total]


def advantages(rewards: Tensor) -> Tensor:
    """How much better each sample is than the mean of the study's other samples.

    Args:
        rewards: `[b, n]`, n samples a study, n of 2 or more.

    Returns:
        `[b, n]`; each row sums to 0.
    """
    n = rewards.shape[1]
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (n - 1)
    return rewards - others


@torch.no_grad()
def sampled_batch(
    model: ReportGenerator, batch: Batch, settings: SelfCriticalSettings, reward: Reward, accelerator: Any
) -> Batch:
    """The batch with sampled reports as its labels, `samples` a study, and their advantages.

    Dropout, augmentation and stochastic depth are off while the reports are sampled. The draws are those of the
    device's generator.
    """
    batch = batch.to(accelerator.device)
    n = settings.samples
    training = model.training
    model.eval()
    decoding = GenerationSettings(
        engine="transformers",
        num_beams=1,
        do_sample=True,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
    )
    with accelerator.autocast():
        embeddings, mask, visual = model.prompt(batch.pixels, batch.views, batch.contexts, batch.projections)
        repeated = {name: None if t is None else t.repeat_interleave(n, dim=0) for name, t in visual.items()}
        keys = list(range(n * len(embeddings)))
        prompts = Prompts(
            keys,
            keys,
            embeddings.repeat_interleave(n, dim=0),
            mask.repeat_interleave(n, dim=0),
            repeated.get("visual_tokens"),
            repeated.get("visual_mask"),
        )
        end = [int(model.tokenizer.eos_token_id)]
        reports = generate_reports(model.llm, prompts, decoding, end, model.pad_token_id)
    model.train(training)
    tokens = [report.tokens for report in reports]
    references = [report for report in batch.reports for _ in range(n)]
    rewards = torch.tensor(reward(references, [model.decode(row) for row in tokens])).view(-1, n)
    labels = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in tokens], batch_first=True, padding_value=IGNORE
    )
    device = accelerator.device
    return replace(batch, labels=labels.to(device), advantages=advantages(rewards).flatten().to(device))
