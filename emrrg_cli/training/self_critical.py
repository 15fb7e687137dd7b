"""Self-critical training raises the probability of sampled reports that score well.

Cross-entropy trains the next word of the reference; the scores compare whole reports. After some epochs of
cross-entropy, the model samples several reports for each study, and each is scored against the reference. The loss of a
sample is its negative log-probability times its advantage: its score minus the mean score of the study's other samples.

Most reports of a data set are similar, so one report can score well for all studies, and training on scores alone can
end with that report for every study. `contrast` subtracts the score against the references of other studies.

With a `temperature` other than 1, samples come from the probabilities at that temperature, and so does the loss: its
gradient is that of the expected score of the sampled reports. Published code often uses temperature 1 in the loss.

Source: self-critical sequence training (Rennie et al., arXiv 1612.00563), with the mean of the other samples as the
baseline (Luo, arXiv 2003.09971); for reports, R2GenCMN+RL (Qin and Song, Findings of ACL 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from emrrg_cli.datasets.report_dataset import IGNORE, Batch
from emrrg_cli.decoding.choice import choose_engine
from emrrg_cli.decoding.engine import Engine
from emrrg_cli.decoding.reference import generate_reports
from emrrg_cli.decoding.slots import Prompts
from emrrg_cli.decoding.writer import autocast_without_cache
from emrrg_cli.models.report_generator import ReportGenerator
from emrrg_cli.recipe.finetuning import GenerationSettings, SelfCriticalSettings
from emrrg_cli.scoring.reward import Reward

_OTHERS = 3  # number of other studies of the batch in the contrast


def advantages(rewards: Tensor) -> Tensor:
    """Returns the reward of each sample minus the mean reward of the study's other samples.

    Args:
        rewards: `[b, n]`, `n` samples for each study; `n` is at least 2.

    Returns:
        `[b, n]`; each row sums to 0.
    """
    n = rewards.shape[1]
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (n - 1)
    return rewards - others


class Sampler:
    """Samples reports from the model in training and weights them by their rewards.

    Args:
        model: The model in training. Each batch is sampled with its current weights.
        reward: Scores reports.
        accelerator: `accelerate.Accelerator` of the training.
    """

    def __init__(
        self, model: ReportGenerator, settings: SelfCriticalSettings, reward: Reward, accelerator: Any
    ) -> None:
        self.model, self.settings, self.reward, self.accelerator = model, settings, reward, accelerator
        self._autocast = autocast_without_cache(accelerator)
        self._engine: Engine | None = None  # kept: its CUDA graphs read the current weights

    def sampled_batches(self, batches: Sequence[Batch]) -> list[Batch]:
        """Returns the micro-batches of a step with sampled reports; see `sampled_batch`."""
        references = [report for batch in batches for report in batch.reports]
        ends = accumulate(len(batch.reports) for batch in batches)
        return [
            self.sampled_batch(batch, [*references[end:], *references[: end - len(batch.reports)]])
            for batch, end in zip(batches, ends, strict=True)
        ]

    @torch.no_grad()
    def sampled_batch(self, batch: Batch, others: Sequence[str] = ()) -> Batch:
        """Returns the batch with sampled reports as its labels, `samples` for each study, and their advantages.

        With `cross_entropy`, the reference follows the samples of its study, with `cross_entropy` as its advantage and
        a temperature of 1.
        With `contrast`, the rewards against other references are subtracted: those of the following studies of the
        batch, then `others`, the references of the other micro-batches of the step.

        Dropout, augmentation and stochastic depth are off while the reports are sampled. The random generator of the
        CPU seeds the sampling.
        """
        batch = batch.to(self.accelerator.device)
        training = self.model.training
        self.model.eval()
        tokens = self._sample(batch)
        self.model.train(training)
        n = self.settings.samples
        rewards = self._rewards(batch.reports, [self.model.decode(row) for row in tokens], others)
        rows, weights = [torch.tensor(row) for row in tokens], advantages(rewards)
        temperatures = torch.full_like(weights, self.settings.temperature)
        if self.settings.cross_entropy:  # the reference follows the samples of its study
            assert batch.labels is not None
            known = [row[row != IGNORE].cpu() for row in batch.labels]
            rows = [row for i, own in enumerate(known) for row in (*rows[n * i : n * (i + 1)], own)]
            weights = torch.nn.functional.pad(weights, (0, 1), value=self.settings.cross_entropy)
            temperatures = torch.nn.functional.pad(temperatures, (0, 1), value=1.0)
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)
        device = self.accelerator.device
        return replace(
            batch,
            labels=labels.to(device),
            advantages=weights.flatten().to(device),
            temperatures=None if self.settings.temperature == 1.0 else temperatures.flatten().to(device),
        )

    def _rewards(self, references: Sequence[str], reports: Sequence[str], others: Sequence[str] = ()) -> Tensor:
        # References of b studies and `samples` reports for each -> [b, samples]
        n = self.settings.samples

        def rewards(truth: Sequence[str], *, contrast: bool = False) -> Tensor:
            repeated = [text for text in truth for _ in range(n)]
            return torch.tensor(self.reward(repeated, reports, contrast=contrast)).view(-1, n)

        found = rewards(references)
        pool = [*references, *others]
        shifts = range(1, min(_OTHERS, len(pool) - 1) + 1)
        if self.settings.contrast and shifts:
            b = len(references)
            against = [rewards([*pool[shift:], *pool[:shift]][:b], contrast=True) for shift in shifts]
            found = found - self.settings.contrast * torch.stack(against).mean(dim=0)
        return found

    def _sample(self, batch: Batch) -> list[list[int]]:
        # Token ids of `samples` reports for each study; the reports of a study are next to each other.
        model, n = self.model, self.settings.samples
        with self._autocast():
            embeddings, mask, visual = model.prompt(batch.pixels, batch.views, batch.contexts, batch.projections)
            count = n * len(embeddings)
            prompts = Prompts(
                list(range(count)),
                torch.randint(2**62, (count,)).tolist(),
                embeddings,
                mask,
                visual.get("visual_tokens"),
                visual.get("visual_mask"),
                copies=n,
            )
            decoding = self._decoding(count)
            end = [int(model.tokenizer.eos_token_id)]
            longest = mask.shape[1] + decoding.max_new_tokens
            if choose_engine(model.llm, decoding, longest) == "transformers":
                reports = generate_reports(model.llm, prompts.repeated(), decoding, end, model.pad_token_id)
                return [report.tokens for report in reports]
        if self._engine is None:
            self._engine = Engine(model.llm, decoding, end, self.accelerator.device, self._autocast)
        written = {key: report.tokens for done in self._engine.write([prompts]) for key, report in done}
        return [written[key] for key in prompts.keys]

    def _decoding(self, count: int) -> GenerationSettings:
        return GenerationSettings(
            batch_size=count,
            num_beams=1,
            do_sample=True,
            temperature=self.settings.temperature,
            max_new_tokens=self.settings.max_new_tokens,
        )
