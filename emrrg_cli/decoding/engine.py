"""Our decoding engine: studies enter and leave a running batch, and on a GPU each step is one CUDA graph."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from emrrg_cli.decoding.search import Report, make_search
from emrrg_cli.decoding.slots import Prompts, Slots
from emrrg_cli.recipe.finetuning import GenerationSettings

_CHECK_EVERY = 8  # steps on a GPU between two checks for finished studies
_log = logging.getLogger(__name__)


class Engine:
    """Writes reports from prompts.

    Args:
        llm: causal LM in evaluation mode, with or without hybrid layers and adapters.
        settings: decoding options; `batch_size` studies are decoded at a time.
        end: tokens that end a report.
        device: device of the LLM.
        autocast: makes a new precision context for each step.
        graphs: whether to capture steps as CUDA graphs; only on a GPU.
    """

    def __init__(
        self,
        llm: Any,
        settings: GenerationSettings,
        end: list[int],
        device: torch.device,
        autocast: Any = nullcontext,
        *,
        graphs: bool = True,
    ) -> None:
        self.slots = Slots(llm, make_search(settings, end, device), settings.batch_size)
        self.autocast = autocast
        self.on_gpu = device.type == "cuda"
        # Prompts are read without CUDA graphs: on a GPU this is efficient only for several studies at once.
        self.least = max(1, settings.batch_size // 4) if self.on_gpu else 1
        self.graphs = _Graphs(self.slots, device) if graphs and self.on_gpu else None

    @torch.no_grad()
    def write(self, prompts: Iterable[Prompts]) -> Iterator[list[tuple[Any, Report]]]:
        """Yields keys and reports as soon as studies are finished.

        Args:
            prompts: prompts of a few studies at a time; they are requested when places become free.
        """
        waiting: deque[Prompts] = deque()
        source = iter(prompts)
        active: list[Any] = []  # the keys in places 0, 1, ...; None: finished
        written: list[int] = []  # number of tokens of each
        more = True
        while True:
            while more and sum(map(len, waiting)) < self.slots.places - len(active):
                following = next(source, None)
                more = following is not None
                if following is not None:
                    waiting.append(following)
            self._admit(waiting, active, written)
            if not active:
                return
            finished = self._run(active, written)
            if finished:
                reports = self.slots.search.reports(self.slots.state, finished)
                yield [(active[place], report) for place, report in zip(finished, reports, strict=True)]
                self._leave(finished, active, written)

    def _admit(self, waiting: deque[Prompts], active: list[Any], written: list[int]) -> None:
        free = self.slots.places - len(active)
        if active and free < min(self.least, sum(map(len, waiting))):
            return
        while waiting and len(active) < self.slots.places:
            if self.slots.state and not self.slots.fits(waiting[0]):
                if active:
                    return  # too long for the current room: the others finish first
                self.slots.empty()
                if self.graphs is not None:
                    self.graphs = _Graphs(self.slots, self.graphs.device)
            free = self.slots.places - len(active)
            free -= free % waiting[0].copies  # the reports of a prompt enter together
            if not free:
                return
            entering = waiting.popleft()
            if len(entering) > free:
                waiting.appendleft(entering.rows(free, len(entering)))
                entering = entering.rows(0, free)
            with self.autocast():
                self.slots.enter(entering, list(range(len(active), len(active) + len(entering))))
            active += entering.keys
            written += [1] * len(entering)

    def _run(self, active: list[Any], written: list[int]) -> list[int]:
        # Runs a few steps without reading values on the host. -> the finished places.
        most = self.slots.search.most
        count = self._count(len(active))
        steps = 0
        for _ in range(_CHECK_EVERY if self.on_gpu else 1):
            longest = min(max(written) + steps, most)
            if min(written) + steps >= most:
                break
            with self.autocast():
                self._step(count, self.slots.bucket(longest))
            steps += 1
        for place in range(len(written)):
            written[place] = min(written[place] + steps, most)
        done = self.slots.state["done"][: len(active)].tolist()
        return [place for place, is_done in enumerate(done) if is_done]

    def _count(self, active: int) -> int:
        if self.graphs is None:
            return active
        return min(self.slots.places, 1 << (active - 1).bit_length())

    def _step(self, count: int, steps: int) -> None:
        if self.graphs is not None and not self.graphs.failed:
            self.graphs.step(count, steps)
        else:
            self.slots.step(count, steps)

    def _leave(self, finished: list[int], active: list[Any], written: list[int]) -> None:
        # The last studies move into the free places.
        remaining = [place for place in range(len(active)) if place not in set(finished)]
        targets = [place for place in finished if place < len(remaining)]
        sources = [place for place in remaining if place >= len(remaining)]
        if sources:
            self.slots.move(sources, targets)
            for source, target in zip(sources, targets, strict=True):
                active[target], written[target] = active[source], written[source]
        if (idle := list(range(len(remaining), len(active)))) and self.graphs is not None:
            self.slots.state["done"][idle[0] : idle[-1] + 1] = True
        del active[len(remaining) :], written[len(remaining) :]


class _Graphs:
    """Captured steps, one for each number of places and bucket of lengths."""

    def __init__(self, slots: Slots, device: torch.device) -> None:
        self.slots, self.device = slots, device
        self.failed = False
        self._captured: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def step(self, count: int, steps: int) -> None:
        """Replays the step; captures it first if it is new."""
        key = (count, steps)
        if key not in self._captured:
            try:
                with torch.cuda.device(self.device):  # streams belong to the current GPU, which may be another one
                    self._captured[key] = self._capture(count, steps)
            except Exception as error:  # any operation that cannot be captured
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                _log.warning("this LLM cannot be captured as a CUDA graph, so decoding is slower: %s", reason)
                self.failed = True
                self.slots.step(count, steps)
                return
        self._captured[key].replay()

    def _capture(self, count: int, steps: int) -> torch.cuda.CUDAGraph:
        before = {name: value.clone() for name, value in self.slots.state.items()}
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):  # kernels are chosen and work space is allocated outside the graph
                self.slots.step(count, steps)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self.slots.step(count, steps)
        finally:
            for name, value in before.items():
                self.slots.state[name].copy_(value)
        self._pool = self._pool or graph.pool()
        return graph
