"""Writes reports from images with the engine that the decoding options choose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from emrrg_cli.datasets.finding_targets import FINDINGS
from emrrg_cli.decoding.choice import choose_engine
from emrrg_cli.decoding.confidence import Confidence, read_confidence
from emrrg_cli.decoding.consensus import several_samples
from emrrg_cli.decoding.engine import Engine
from emrrg_cli.decoding.reference import generate_reports
from emrrg_cli.decoding.search import Report
from emrrg_cli.decoding.slots import Prompts
from emrrg_cli.models.film_distance import FilmDistance, MeasuredDistance, describe
from emrrg_cli.models.report_generator import ReportGenerator
from emrrg_cli.recipe.finetuning import GenerationSettings
from emrrg_cli.scoring.agreement import most_agreed
from emrrg_cli.vocabulary import ContextField

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass
class Studies:
    """A few studies, on the CPU.

    Args:
        keys: identifiers of the studies; each report is returned with its key.
        numbers: indices among all studies, which seed sampling.
        pixels: uint8 `[n, size, size]`, the views of all studies in sequence.
        views: `[b]`, number of views of each study.
        contexts: context of each study (`emrrg_cli.datasets.context`); empty: no study has any.
        projections: int64 `[n]`, indices into `VIEW_TOKENS`; None: all unknown.
    """

    keys: Sequence[Any]
    numbers: Sequence[int]
    pixels: Tensor
    views: Tensor
    contexts: Sequence[Mapping[ContextField, str]] = ()
    projections: Tensor | None = None


@dataclass(frozen=True)
class WrittenReport:
    """A report.

    Args:
        key: key of its study.
        text: text without special tokens.
        log_probability: mean over its tokens after the decoding options; 0 with transformers' engine, which does not
            return it.
        tokens: tokens, including the end token.
        confidence: confidence of the model; None if not requested.
        film_distance: distance of its films from the training films; None: unknown.
        findings: probability of each finding by the findings head; empty: no head, or not requested.
        samples: how often each text was sampled, if it was chosen among samples.
    """

    key: Any
    text: str
    log_probability: float
    tokens: list[int] = field(default_factory=list)
    confidence: Confidence | None = None
    film_distance: MeasuredDistance | None = None
    findings: Mapping[str, float] = field(default_factory=dict)
    samples: Mapping[str, int] = field(default_factory=dict)


class Writer:
    """Writes reports with a model.

    Args:
        settings: decoding options; `engine` chooses our engine or that of transformers.
        device: device of the model.
        autocast: makes precision contexts without a cache of casts.
        confident: whether reports have confidence and probabilities of findings.
        film_distance: compares films with the training films; None: no comparison.
    """

    def __init__(
        self,
        model: ReportGenerator,
        settings: GenerationSettings,
        device: torch.device,
        autocast: Autocast,
        *,
        confident: bool = False,
        film_distance: FilmDistance | None = None,
    ) -> None:
        self.model = model
        self.film_distance = film_distance
        self._distances: dict[Any, MeasuredDistance] = {}  # of studies in decoding
        self._findings: dict[Any, Mapping[str, float]] = {}
        self._samples: dict[Any, Mapping[str, int]] = {}
        self.confident = confident
        self.settings = settings
        self.device = device
        self.autocast = autocast
        self._engine: Engine | None = None

    def write(self, studies: Iterable[Studies]) -> Iterator[list[WrittenReport]]:
        """Yields reports as soon as they are finished, not always in the order of the studies.

        Args:
            studies: requested when there is room, at most `batch_size` at a time.
        """
        samples = self.settings.consensus
        for done in self._reports(studies) if samples is None else self._chosen(self._reports(studies), samples):
            yield [self._written(key, report) for key, report in done]

    def _reports(self, studies: Iterable[Studies]) -> Iterator[list[tuple[Any, Report]]]:
        samples = self.settings.consensus or 1
        prompts = (self._prompts(some) for some in studies)
        if samples > 1:
            prompts = (several_samples(some, samples) for some in prompts)
        first = next(prompts, None)
        if first is None:
            return
        following = _chain(first, prompts)
        if self._is_own(first):
            if self._engine is None:
                settings = self.settings.model_copy(update={"batch_size": self.settings.batch_size * samples})
                self._engine = Engine(self.model.llm, settings, self._end, self.device, self.autocast)
            yield from self._engine.write(following)
        else:
            for some in following:
                with torch.no_grad(), self.autocast(), _sampling(self.settings, some.seeds[0], self.device):
                    reports = generate_reports(
                        self.model.llm, some.repeated(), self.settings, self._end, self.model.pad_token_id
                    )
                yield list(zip(some.keys, reports, strict=True))

    def _chosen(self, sampled: Iterable[list[tuple[Any, Report]]], samples: int) -> Iterator[list[tuple[Any, Report]]]:
        # Samples with keys (study, number), in any order -> one report for each study that has all of its samples.
        waiting: dict[Any, dict[int, Report]] = {}
        for done in sampled:
            complete = []
            for (key, number), report in done:
                found = waiting.setdefault(key, {})
                found[number] = report
                if len(found) == samples:
                    complete.append((key, self._most_agreed(key, waiting.pop(key))))
            if complete:
                yield complete

    def _most_agreed(self, key: Any, found: Mapping[int, Report]) -> Report:
        reports = [found[number] for number in sorted(found)]
        texts = [self.model.decode(report.tokens) for report in reports]
        self._samples[key] = Counter(texts)
        return reports[most_agreed(texts, self.settings.consensus_scores)]

    @property
    def _end(self) -> list[int]:
        return [self.model.tokenizer.eos_token_id]

    def _is_own(self, first: Prompts) -> bool:
        # Studies with more views may have longer prompts.
        longest = first.mask.shape[1] * (1 if self.model.views == "average" else 4) + self.settings.max_new_tokens
        with self.autocast():
            return choose_engine(self.model.llm, self.settings, longest) == "own"

    @torch.no_grad()
    def _prompts(self, studies: Studies) -> Prompts:
        pixels, views = (tensor.to(self.device, non_blocking=True) for tensor in (studies.pixels, studies.views))
        with self.autocast():
            films = self.model.encode_films(pixels)
            tokens = self.model.with_view_embedding(films, studies.projections)
            embeddings, mask, visual = self.model.prompt_of(tokens, views, studies.contexts)
            if self.confident and self.model.findings is not None:
                for key, row in zip(studies.keys, self.model.findings(tokens, views).sigmoid().tolist(), strict=True):
                    self._findings[key] = dict(zip(FINDINGS, row, strict=False))  # the first ones
        if self.film_distance is not None:
            found = self.film_distance.of_studies(describe(films, pixels), studies.views)
            self._distances |= dict(zip(studies.keys, found, strict=True))
        seeds = [(self.settings.seed << 32) + number for number in studies.numbers]
        return Prompts(
            list(studies.keys), seeds, embeddings, mask, visual.get("visual_tokens"), visual.get("visual_mask")
        )

    def _written(self, key: Any, report: Report) -> WrittenReport:
        text, tokens, confidence = self.model.decode(report.tokens), report.tokens, None
        if self.confident:
            confidence = read_confidence(text, tokens, report.token_log_probabilities, self.model.decode)
        distance, findings = self._distances.pop(key, None), self._findings.pop(key, {})
        samples = self._samples.pop(key, {})
        return WrittenReport(key, text, report.log_probability, tokens, confidence, distance, findings, samples)


def _chain(first: Prompts, following: Iterator[Prompts]) -> Iterator[Prompts]:
    yield first
    yield from following


@contextmanager
def _sampling(settings: GenerationSettings, seed: int, device: torch.device) -> Iterator[None]:
    # Samples with `seed` and restores the caller's random generators.
    if not settings.do_sample:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def autocast_of(device: torch.device, precision: str) -> Autocast:
    """Returns autocast contexts of `fp32`, `bf16` or `fp16` without a cache of casts, which CUDA graphs do not see."""
    from emrrg_cli.runtime import DTYPES

    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, DTYPES[precision], cache_enabled=False)


def autocast_without_cache(accelerator: Any) -> Autocast:
    """Returns autocast contexts of an accelerator's precision, without a cache of casts."""
    from accelerate.utils import AutocastKwargs

    return lambda: accelerator.autocast(AutocastKwargs(cache_enabled=False))
