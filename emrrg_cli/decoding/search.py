"""Greedy search, sampling and beam search over a batch of studies with different lengths.

The state of a search is a dictionary of tensors with one row per study. A step changes it in place and reads no value
on the host, so it can be part of a CUDA graph. `b` studies, `k` beams, `t` room for new tokens, `v` vocabulary.

The beams of a study share one store of keys and values: the token at step `s` of beam `i` is written there once, and
`ancestry[i, s]` is the beam in whose place it is stored. When beams are chosen, only these tables are rearranged.

Source: the search of transformers; the tests compare the two token by token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emrrg_cli.decoding.logits import (
    block_repeated_ngrams,
    exponential_noise,
    forbid_early_end,
    keep_likely,
    penalize_repetition,
)
from emrrg_cli.recipe.finetuning import GenerationSettings

State = dict[str, Tensor]
_NEVER = -1.0e9  # as transformers; a sum of log-probabilities never comes near it


@dataclass(frozen=True)
class Report:
    """A report as tokens.

    Args:
        tokens: the tokens, including the end token.
        log_probability: mean over the tokens, after the decoding options.
        token_log_probabilities: log-probability of each token before penalties, temperature and other options.
    """

    tokens: list[int]
    log_probability: float
    token_log_probabilities: list[float]


class Search:
    """The common part of beam search and token-by-token search.

    Args:
        settings: decoding options.
        end: tokens that end a report.
        device: device of the state.
    """

    def __init__(self, settings: GenerationSettings, end: list[int], device: torch.device) -> None:
        self.settings = settings
        self.beams = settings.num_beams
        self.most = settings.max_new_tokens
        self.room = -(-self.most // 8) * 8  # attention kernels need lengths that are multiples of 8
        self.end = torch.tensor(end, dtype=torch.long, device=device)
        self.device = device

    def start(self, seeds: list[int]) -> State:
        """Returns the state of new studies without tokens."""
        b, k, t = len(seeds), self.beams, self.room
        scores = torch.zeros(b, k, device=self.device)
        scores[:, 1:] = _NEVER  # the beams are equal at first: only one continues
        return {
            "tokens": torch.zeros(b, k, t, dtype=torch.long, device=self.device),
            "ancestry": torch.zeros(b, k, t, dtype=torch.long, device=self.device),
            "given": torch.zeros(b, k, t, device=self.device),  # log-probability of each token before decoding options
            "scores": scores,
            "length": torch.zeros(b, dtype=torch.long, device=self.device),
            "done": torch.zeros(b, dtype=torch.bool, device=self.device),
            "seed": torch.tensor(seeds, dtype=torch.long).to(self.device),
        }

    def advance(self, state: State, logits: Tensor) -> None:
        """Chooses the next token of every study, in place. Finished studies do not change.

        Args:
            logits: `[b, k, v]`, logits of the next token of each beam.
        """
        new = self._next(state, logits.float())
        for name, value in new.items():
            done = state["done"].view(-1, *[1] * (value.dim() - 1))
            new[name] = torch.where(done, state[name], value)
        for name, value in new.items():
            state[name].copy_(value)

    def reports(self, state: State, rows: list[int]) -> list[Report]:
        """Returns the reports of finished studies."""
        raise NotImplementedError

    def _next(self, state: State, logits: Tensor) -> State:
        raise NotImplementedError

    def _constrained(self, state: State, scores: Tensor) -> Tensor:
        settings, tokens, length = self.settings, state["tokens"], state["length"]
        if settings.repetition_penalty != 1.0:
            scores = penalize_repetition(scores, tokens, length, settings.repetition_penalty)
        if settings.no_repeat_ngram_size:
            scores = block_repeated_ngrams(scores, tokens, length, settings.no_repeat_ngram_size)
        if settings.min_new_tokens:
            scores = forbid_early_end(scores, length, settings.min_new_tokens, self.end)
        if settings.do_sample:
            keep = 1 if self.beams == 1 else 1 + len(self.end)
            scores = keep_likely(scores, settings.temperature, settings.top_k, settings.top_p, keep)
        return scores

    def _drawn(self, state: State, scores: Tensor, count: int) -> Tensor:
        # Without replacement, as torch.multinomial does it: [b, n] -> [b, count]
        noise = exponential_noise(state["seed"], state["length"], scores.shape[-1])
        return (scores.softmax(-1) / noise).topk(count).indices

    def _put(self, table: Tensor, length: Tensor, value: Tensor) -> Tensor:
        # table [b, k, t] with value [b, k] at position length [b]
        at = length.clamp(max=self.room - 1)[:, None, None].expand(-1, table.shape[1], 1)
        return table.scatter(-1, at, value[..., None])


class TokenSearch(Search):
    """Greedy search or sampling, one token after another."""

    def _next(self, state: State, logits: Tensor) -> State:
        constrained = self._constrained(state, logits)
        scores = constrained[:, 0]  # [b, v]
        token = self._drawn(state, scores, 1) if self.settings.do_sample else scores.argmax(-1, keepdim=True)
        length = state["length"] + 1
        log_probability = scores.gather(-1, token) - scores.logsumexp(-1, keepdim=True)
        given = log_probability
        if constrained is not logits:
            given = logits[:, 0].gather(-1, token) - logits[:, 0].logsumexp(-1, keepdim=True)
        return {
            "tokens": self._put(state["tokens"], state["length"], token),
            "given": self._put(state["given"], state["length"], given),
            "scores": state["scores"] + log_probability,
            "length": length,
            "done": torch.isin(token[:, 0], self.end) | (length >= self.most),
        }

    def reports(self, state: State, rows: list[int]) -> list[Report]:
        index = torch.tensor(rows).to(self.device)
        names = ("tokens", "length", "scores", "given")
        tokens, lengths, scores, given = (state[name][index].tolist() for name in names)
        return [
            Report(row[0][:length], score[0] / length, each[0][:length])
            for row, length, score, each in zip(tokens, lengths, scores, given, strict=True)
        ]


class BeamSearch(Search):
    """Beam search; with `do_sample` the candidates are drawn.

    The best `k` finished reports are kept separately, by the sum of their log-probabilities divided by their length to
    the power of `length_penalty`. A study is finished when no running beam can beat the worst of them.
    """

    def start(self, seeds: list[int]) -> State:
        state = super().start(seeds)
        ended = {
            "ended_tokens": torch.zeros_like(state["tokens"]),
            "ended_given": torch.zeros_like(state["given"]),
            "ended_scores": torch.full_like(state["scores"], _NEVER),
            "ended_length": torch.zeros(len(seeds), self.beams, dtype=torch.long, device=self.device),
            "has_ended": torch.zeros(len(seeds), self.beams, dtype=torch.bool, device=self.device),
        }
        return state | ended

    def _next(self, state: State, logits: Tensor) -> State:
        b, k, v = logits.shape
        log_probabilities = logits.log_softmax(-1)
        total = self._constrained(state, log_probabilities) + state["scores"][..., None]
        top, parent, token = self._candidates(state, total.view(b, k * v), v)  # [b, c]
        length = state["length"] + 1
        tokens = self._put(_gather(state["tokens"], parent), state["length"], token)  # [b, c, t]
        given = log_probabilities.flatten(1).gather(1, parent * v + token)
        given = self._put(_gather(state["given"], parent), state["length"], given)
        ended = torch.isin(token, self.end) | (length >= self.most)[:, None]

        running = top + ended * _NEVER
        chosen = running.topk(k).indices
        ancestry = _gather(_gather(state["ancestry"], parent), chosen)
        own = torch.arange(k, device=logits.device).expand(b, k)
        running = running.gather(1, chosen)
        new = {
            "tokens": _gather(tokens, chosen),
            "given": _gather(given, chosen),
            "ancestry": self._put(ancestry, state["length"], own),
            "scores": running,
            "length": length,
        }
        new |= self._merge(state, tokens, given, top, ended)
        best = top if self.settings.beam_stop == "candidates" else running
        possible = best[:, :1] / self._norm(length)
        worst = torch.where(new["has_ended"], new["ended_scores"].min(1, keepdim=True).values, _NEVER)
        new["done"] = ~(possible > worst).any(1) | (length >= self.most)
        return new

    def _candidates(self, state: State, total: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
        # Enough candidates that `k` continue even if all others end: scores, beam and token, each [b, c], best first.
        count = max(2, 1 + len(self.end)) * self.beams
        if self.settings.do_sample:
            index = self._drawn(state, total, count)
            top, order = total.gather(1, index).sort(dim=-1, descending=True)
            index = index.gather(1, order)
        else:
            top, index = total.topk(count)
        return top, index // vocabulary, index % vocabulary

    def _merge(self, state: State, tokens: Tensor, given: Tensor, top: Tensor, ended: Tensor) -> State:
        # Among candidates that end, only the first `k` count; the others only ensure that enough beams continue.
        ending = ended & (torch.arange(top.shape[1], device=top.device) < self.beams)
        length = state["length"] + 1
        scores = top / self._norm(length) + ~ending * _NEVER
        merged = torch.cat([state["ended_scores"], scores], dim=1)
        best = merged.topk(self.beams).indices
        lengths = torch.cat([state["ended_length"], length[:, None].expand_as(top)], dim=1)
        return {
            "ended_tokens": _gather(torch.cat([state["ended_tokens"], tokens], dim=1), best),
            "ended_given": _gather(torch.cat([state["ended_given"], given], dim=1), best),
            "ended_scores": merged.gather(1, best),
            "ended_length": lengths.gather(1, best),
            "has_ended": torch.cat([state["has_ended"], ending], dim=1).gather(1, best),
        }

    def _norm(self, length: Tensor) -> Tensor:
        return (length.double() ** self.settings.length_penalty).float()[:, None]

    def reports(self, state: State, rows: list[int]) -> list[Report]:
        index = torch.tensor(rows).to(self.device)
        names = ("ended_tokens", "ended_length", "ended_scores", "ended_given")
        tokens, lengths, scores, given = (state[name][index, 0].tolist() for name in names)
        penalty = self.settings.length_penalty
        return [
            Report(row[:length], score * length**penalty / length, each[:length])
            for row, length, score, each in zip(tokens, lengths, scores, given, strict=True)
        ]


def make_search(settings: GenerationSettings, end: list[int], device: torch.device) -> Search:
    """Makes the search for these decoding options."""
    return (TokenSearch if settings.num_beams == 1 else BeamSearch)(settings, end, device)


def _gather(table: Tensor, rows: Tensor) -> Tensor:
    # [b, k, t], [b, c] -> [b, c, t]
    return table.gather(1, rows[..., None].expand(-1, -1, table.shape[-1]))
