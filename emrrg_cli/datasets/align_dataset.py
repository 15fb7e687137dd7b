"""Pairs of X-ray and report for stage 2: batches with text tokens, and a mix of several data sets by weight."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from emrrg_cli.datasets.finding_targets import finding_targets
from emrrg_cli.datasets.labelled_films import LabelledFilms
from emrrg_cli.datasets.report_dataset import Example, ReportDataset
from emrrg_cli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PairBatch:
    """Several studies, each with its report.

    `pixels`: uint8 `[n, size, size]`, all views one after the other; `views`: int64 `[b]`, views of each study, summing
    to `n`; `input_ids`, `attention_mask`: int64 `[b, t]`, report tokens, padded on the right; `findings`:
    `[b, 23]` from `finding_targets` (None if no head learns them); `paired`: bool `[b]`, false for films with labels
    but without a report (None: all have reports).
    """

    indices: list[int]
    pixels: Tensor
    views: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    findings: Tensor | None = None
    paired: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device) -> PairBatch:
        """Returns the same batch with its tensors on `device`."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PairBatch:
        """Returns page-locked tensors, so that copies to a GPU overlap with computation; the DataLoader calls it."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> PairBatch:
        return replace(
            self,
            pixels=function(self.pixels),
            views=function(self.views),
            input_ids=function(self.input_ids),
            attention_mask=function(self.attention_mask),
            findings=None if self.findings is None else function(self.findings),
            paired=None if self.paired is None else function(self.paired),
        )


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Returns token ids and attention mask, int64 `[b, t]`, of texts cut to `max_tokens` including special tokens.

    Padding is always on the right, also if the tokenizer's default differs, so the first token of a text is always at
    position 0.
    """
    tokens = [torch.tensor(ids) for ids in tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]]
    padding = tokenizer.pad_token_id or 0  # masked, so any token is possible
    input_ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(ids) for ids in tokens])
    return input_ids, (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()


def collate_pairs(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    *,
    findings: bool = False,
    labelled: bool = False,
) -> PairBatch:
    """Joins examples into a batch of pairs; reports are cut to `max_tokens` tokens.

    `findings` computes targets of the findings head from the reports. With `labelled`, some examples may have labels
    instead of reports.
    """
    input_ids, attention_mask = encode_texts(tokenizer, [example.report for example in examples], max_tokens)
    return PairBatch(
        indices=[example.index for example in examples],
        pixels=torch.cat([example.pixels for example in examples]),
        views=torch.tensor([len(example.pixels) for example in examples]),
        input_ids=input_ids,
        attention_mask=attention_mask,
        findings=_targets(examples) if findings else None,
        paired=torch.tensor([example.findings is None for example in examples]) if labelled else None,
    )


def _targets(examples: Sequence[Example]) -> Tensor:
    read = finding_targets([example.report for example in examples])
    given = [
        targets if example.findings is None else example.findings
        for example, targets in zip(examples, read, strict=True)
    ]
    return torch.stack(given)


class PairDataset(Dataset[Example]):
    """Studies of one split of several data sets, one data set after the other, with a weight for each data set.

    A data set of `n` studies and weight `w` adds `round(w * n)` studies to every epoch: each study `floor(w)` times,
    and a random part of the studies, drawn anew for each epoch, once more. Weight 1 takes each study once, 2 twice, and
    0.25 another random quarter in every epoch. The studies of all sets are then shuffled together, so a batch may
    contain a study twice. The draw depends only on the seed and the epoch.

    Args:
        parts: the split of each data set; `LabelledFilms` for films with labels but without reports.
        weights: one weight above 0 for each part; None: 1 for all.

    Raises:
        UsageError: if a weight is so small that no study is left.
    """

    def __init__(self, parts: Sequence[ReportDataset | LabelledFilms], weights: Sequence[float] | None = None) -> None:
        self.parts = list(parts)
        self.counts: list[int] = []
        for index, (part, weight) in enumerate(zip(self.parts, weights or [1.0] * len(parts), strict=True)):
            self.counts.append(round(weight * len(part)))
            if not self.counts[-1]:
                raise UsageError(
                    f"data.sets[{index}].weight={weight:g} leaves none of its {len(part)} training studies",
                    hint="Raise the weight, or take the data set out.",
                )
        self._ends = list(accumulate(len(part) for part in self.parts))
        self.reports = [report for part in self.parts for report in part.reports]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        number = bisect_right(self._ends, index)
        first = self._ends[number - 1] if number else 0
        return replace(self.parts[number][index - first], index=index)

    def finding_targets(self) -> Tensor:
        """Returns the targets of all studies, `[studies, 23]`, from labels or reports."""
        parts = [
            part.targets if isinstance(part, LabelledFilms) else finding_targets(part.reports) for part in self.parts
        ]
        return torch.cat(parts)

    @property
    def epoch_length(self) -> int:
        """Number of studies in an epoch, including repeated ones."""
        return sum(self.counts)

    def draw_epoch(self, generator: torch.Generator) -> Tensor:
        """Draws the studies of an epoch in order: int64 `[epoch_length]`, indices into this data set."""
        drawn = []
        for part, end, count in zip(self.parts, self._ends, self.counts, strict=True):
            whole, rest = divmod(count, len(part))
            again = torch.randperm(len(part), generator=generator)[:rest]
            drawn.append(torch.cat([torch.arange(len(part)).repeat(whole), again]) + end - len(part))
        studies = torch.cat(drawn)
        return studies[torch.randperm(len(studies), generator=generator)]
