"""Places for studies that are decoded together: their keys and values, and one step of the LLM over all of them.

A study has one place. Its prompt is stored once for all beams: for the LLM, the beams of a study are the tokens of one
sequence, and the attention mask defines which written tokens each beam may see. Nothing is copied when beams are
chosen, and hybrid layers keep one set of visual keys and values per study. All sizes are fixed, so that a step can be
captured as a CUDA graph.

`n` places in use, `k` beams, `p` room for prompt tokens, `t` for new tokens, `m` for visual tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from emrrg_cli.decoding.attention import packed_attention
from emrrg_cli.decoding.search import Search, State
from emrrg_cli.models.adapters import plain


@dataclass
class Prompts:
    """Prompts of a few studies, as embeddings.

    Args:
        keys: identifiers of the reports, `copies` for each prompt in sequence; each report is returned with its key.
        seeds: seeds of sampling, one per report.
        embeddings: `[b, p, hidden]`.
        mask: `[b, p]`, 1 on real tokens; the last token is real.
        visual_tokens: `[b, m, hidden]` for hybrid layers; None: there are none.
        visual_mask: `[b, m]`, true on real tokens; None: all are real.
        copies: number of reports for each prompt, which is read only once.
    """

    keys: list[Any]
    seeds: list[int]
    embeddings: Tensor
    mask: Tensor
    visual_tokens: Tensor | None = None
    visual_mask: Tensor | None = None
    copies: int = 1

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, first: int, last: int) -> Prompts:
        """Returns reports `first` to `last` - 1; both are multiples of `copies`."""
        part = slice(first // self.copies, last // self.copies)
        return replace(
            self._mapped(lambda tensor: tensor[part]), keys=self.keys[first:last], seeds=self.seeds[first:last]
        )

    def repeated(self) -> Prompts:
        """Returns one prompt per report, with `copies` equal ones in sequence."""
        return replace(self._mapped(lambda tensor: tensor.repeat_interleave(self.copies, dim=0)), copies=1)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Prompts:
        tokens, mask = (None if t is None else function(t) for t in (self.visual_tokens, self.visual_mask))
        return replace(
            self,
            embeddings=function(self.embeddings),
            mask=function(self.mask),
            visual_tokens=tokens,
            visual_mask=mask,
        )


class SlotCache(Cache):  # type: ignore[misc]
    """Keys and values of all places, `[places, p + t * k, kv_heads, head_dim]` per layer.

    `update` writes at the positions that `begin` set and returns all keys and values up to the length set there.
    """

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.visual: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: [places, m, kv_heads, head_dim]
        self.visual_keys_and_values: dict[int, tuple[Tensor, Tensor]] = {}  # used by hybrid layers in a step

    def begin(self, positions: Tensor, count: int, length: int) -> None:
        """Prepares a step of the first `count` places: `positions` `[n * k]` in the flattened store."""
        self._positions, self._count, self._length = positions, count, length
        self.visual_keys_and_values = {
            layer: (key[:count].transpose(1, 2), value[:count].transpose(1, 2))
            for layer, (key, value) in self.visual.items()
        }

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores keys and values `[n, kv_heads, k, head_dim]`; returns `[n, kv_heads, length, head_dim]`."""
        found = []
        for store, states in ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states)):
            new = states.transpose(1, 2).flatten(0, 1).to(store.dtype)
            store.flatten(0, 1).index_copy_(0, self._positions, new)
            found.append(store[: self._count, : self._length].transpose(1, 2))
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns a placeholder: the host does not know the length, and given positions make it unnecessary."""
        return 0

    def stores(self) -> list[Tensor]:
        """Returns all tensors with one row per place."""
        return [*self.keys, *self.values, *(tensor for pair in self.visual.values() for tensor in pair)]


class Slots:
    """The studies that are being decoded.

    Args:
        llm: causal LM, with or without hybrid layers and adapters, in evaluation mode.
        search: the search that chooses tokens.
        places: number of studies decoded at a time.
        step_buckets: the number of new tokens that a step attends to is rounded up to a multiple of this.
    """

    def __init__(self, llm: Any, search: Search, places: int, step_buckets: int = 32) -> None:
        self.llm = llm
        self.search = search
        self.places = places
        self.step_buckets = step_buckets
        self.prompt_room = 0  # p
        self.state: State = {}
        self.cache = SlotCache()
        self._base = plain(llm)
        names = inspect.signature(self._base.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"  # renamed in transformers 5.24

    # -- entering and leaving -----------------------------------------------------------------------------------

    def fits(self, prompts: Prompts) -> bool:
        """Whether the prompts fit into the room that was allocated for the first prompts."""
        visual = 0 if prompts.visual_tokens is None else prompts.visual_tokens.shape[1]
        return prompts.embeddings.shape[1] <= self.prompt_room and visual <= self._visual_mask.shape[1]

    def enter(self, prompts: Prompts, places: list[int]) -> None:
        """Reads prompts, puts the studies into free places and chooses their first token."""
        cache = DynamicCache()
        visual = {} if prompts.visual_tokens is None else {
            "visual_tokens": prompts.visual_tokens, "visual_mask": prompts.visual_mask,
        }  # fmt: skip
        positions = (prompts.mask.long().cumsum(1) - 1).clamp(min=0)
        logits = self.llm(
            inputs_embeds=prompts.embeddings,
            attention_mask=prompts.mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_name: cache},
            **visual,
        ).logits[:, -1:]
        if not self.state:
            self._make_room(prompts, cache)
        copies = prompts.copies
        index = torch.tensor(places).to(logits.device)
        state = self.search.start(prompts.seeds)
        self.search.advance(state, logits.repeat_interleave(copies, dim=0).expand(-1, self.search.beams, -1))
        for name, value in state.items():
            self.state[name].index_copy_(0, index, value)
        width = prompts.mask.shape[1]
        self._prompt_mask[index] = False
        mask = prompts.mask.repeat_interleave(copies, dim=0)
        self._prompt_mask[index, :width] = mask.bool()
        self._prompt_length[index] = mask.long().sum(1)
        for layer, (keys, values) in enumerate(_keys_and_values(cache)):
            for store, states in ((self.cache.keys[layer], keys), (self.cache.values[layer], values)):
                store[index, :width] = states.transpose(1, 2).to(store.dtype).repeat_interleave(copies, dim=0)
        if prompts.visual_tokens is not None:
            many = prompts.visual_tokens.shape[1]
            self._visual_mask[index] = False
            real = prompts.visual_mask
            self._visual_mask[index, :many] = True if real is None else real.bool().repeat_interleave(copies, dim=0)
            for name, pair in cache.__dict__["visual_keys_and_values"].items():
                for store, states in zip(self.cache.visual[name], pair, strict=True):
                    store[index, :many] = states.transpose(1, 2).to(store.dtype).repeat_interleave(copies, dim=0)

    def empty(self) -> None:
        """Drops all studies, so that the next prompts allocate room of their size."""
        self.state, self.cache = {}, SlotCache()

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Moves studies to other places."""
        device = self._prompt_mask.device
        origin, target = torch.tensor(sources).to(device), torch.tensor(targets).to(device)
        for tensor in self._rows():
            tensor[target] = tensor[origin]

    def _rows(self) -> list[Tensor]:
        own = [self._prompt_mask, self._prompt_length, self._visual_mask]
        return [*self.state.values(), *own, *self.cache.stores()]

    def _make_room(self, prompts: Prompts, cache: DynamicCache) -> None:
        device = prompts.embeddings.device
        width = prompts.embeddings.shape[1]
        self.prompt_room = -(-width // 16) * 16
        length = self.prompt_room + self.search.room * self.search.beams
        blank = self.search.start([0])
        self.state = {name: value.repeat(self.places, *[1] * (value.dim() - 1)) for name, value in blank.items()}
        self.state["done"].fill_(True)
        self.state["length"].fill_(1)
        self._prompt_mask = torch.zeros(self.places, self.prompt_room, dtype=torch.bool, device=device)
        self._prompt_mask[:, 0] = True  # an empty place attends to one token, so that its attention is not NaN
        self._prompt_length = torch.ones(self.places, dtype=torch.long, device=device)

        def store(states: Tensor, room: int) -> Tensor:
            # In the dtype of attention: under autocast, the rotary embedding returns keys in fp32.
            kind = device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
            return states.new_zeros(self.places, room, states.shape[1], states.shape[3], dtype=dtype)

        for keys, values in _keys_and_values(cache):
            self.cache.keys.append(store(keys, length))
            self.cache.values.append(store(values, length))
        many = 0 if prompts.visual_tokens is None else prompts.visual_tokens.shape[1]
        self._visual_mask = torch.ones(self.places, many, dtype=torch.bool, device=device)
        self._masks_visual = prompts.visual_mask is not None
        self._has_visual = prompts.visual_tokens is not None
        for name, (keys, values) in cache.__dict__.get("visual_keys_and_values", {}).items():
            self.cache.visual[name] = (store(keys, many), store(values, many))

    # -- a step -------------------------------------------------------------------------------------------------

    def bucket(self, longest: int) -> int:
        """Returns the number of new tokens that a step attends to if the longest report has `longest`."""
        return min(self.search.room, -(-longest // self.step_buckets) * self.step_buckets)

    def step(self, count: int, steps: int) -> None:
        """Writes the next token of the first `count` places; none of them has more than `steps` tokens."""
        state = {name: value[:count] for name, value in self.state.items()}
        k = self.search.beams
        last = (state["length"] - 1)[:, None]  # [n, 1]
        tokens = state["tokens"].gather(-1, last[..., None].expand(-1, k, 1))[..., 0]  # [n, k]
        room = self.prompt_room + self.search.room * k
        own = torch.arange(k, device=last.device)
        places = torch.arange(count, device=last.device)[:, None] * room
        self.cache.begin((places + self.prompt_room + last * k + own).flatten(), count, self.prompt_room + steps * k)
        visual = {}
        if self._has_visual:  # hybrid layers take their keys and values from the cache
            visual = {
                "visual_tokens": self._prompt_mask.new_zeros(count, 0, 0),
                "visual_mask": self._visual_mask[:count] if self._masks_visual else None,
            }
        with _attention(self._base):
            logits = self.llm(
                input_ids=tokens,
                attention_mask=self._mask(state, count, steps),
                position_ids=(self._prompt_length[:count, None] + last).expand(-1, k),
                use_cache=True,
                **{self._cache_name: self.cache},
                **visual,
            ).logits
        self.search.advance(state, logits)

    def _mask(self, state: State, count: int, steps: int) -> Tensor:
        # -> [n, 1, k, p + steps * k], true for tokens that a beam may see: the prompt and its own tokens
        k = self.search.beams
        beams = torch.arange(k, device=state["length"].device)
        written = torch.arange(steps, device=beams.device) < state["length"][:, None, None]
        own = state["ancestry"][..., :steps, None] == beams  # [n, k, steps, k]
        seen = (own & written[..., None]).flatten(2)
        prompt = self._prompt_mask[:count, None].expand(-1, k, -1)
        return torch.cat([prompt, seen], dim=-1)[:, None]


def _keys_and_values(cache: DynamicCache) -> Iterator[tuple[Tensor, Tensor]]:
    for layer in cache.layers:
        yield layer.keys, layer.values


@contextmanager
def _attention(llm: Any) -> Iterator[None]:
    before = llm.config._attn_implementation
    llm.config._attn_implementation = packed_attention()
    try:
        yield
    finally:
        llm.config._attn_implementation = before
