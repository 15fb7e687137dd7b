"""Checks that hybrid layers work in an LLM: the logits depend on the image, and every new parameter gets a gradient.

Some families of LLMs do not pass keyword arguments to their attention. Their hybrid layers would ignore the image
without an error. One forward pass through the hybrid layers alone detects this before training starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from emrrg_cli.errors import UsageError

_TEXT, _VISUAL = 4, 3  # tokens of the probe


def check_hybrid_layers(llm: Any, layers: nn.ModuleList, chosen: list[int]) -> None:
    """Runs the hybrid layers of a causal LM once, with open gates, and checks that the output depends on the image.

    This changes neither the LLM nor the state of the random numbers. On the meta device, which planning uses, tensors
    have no values, so nothing is checked.

    Args:
        layers: The decoder layers of `llm`.
        chosen: Indices of the hybrid layers; only these layers are run.

    Raises:
        UsageError: The image changes nothing, a hybrid parameter gets no gradient, or the forward pass fails.
    """
    if llm.get_input_embeddings().weight.is_meta:
        return
    crosses: dict[int, Any] = {i: layers.get_submodule(f"{i}.self_attn.cross") for i in chosen}
    added = {f"{i}.{name}": p for i, cross in crosses.items() for name, p in cross.named_parameters()}
    gates = [cross.warmup for cross in crosses.values()]
    with _only(llm, layers, chosen), _open(gates), torch.enable_grad():
        visual = _wave(llm, _VISUAL, 1.0).requires_grad_()
        try:
            logits = _logits(llm, visual)
            gradients = torch.autograd.grad(logits.float().square().sum(), [visual, *added.values()], allow_unused=True)
            with torch.no_grad():
                other = _logits(llm, _wave(llm, _VISUAL, 2.0))
        except Exception as error:  # each family of LLMs raises its own errors
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise _refusal(llm, f"a forward pass with visual tokens fails: {reason}") from error
    if gradients[0] is None or torch.equal(logits, other):
        raise _refusal(llm, "its output does not depend on the image, since its layers drop the visual tokens")
    for name, gradient in zip(added, gradients[1:], strict=True):
        if gradient is None or not gradient.any():
            raise _refusal(llm, f"layer {name} gets no gradient, so it cannot be trained")


def _refusal(llm: Any, reason: str) -> UsageError:
    return UsageError(
        f"hybrid layers do not work in {type(llm).__name__}: {reason}",
        hint="Llama, Mistral, Qwen2 and Qwen3 work. Or set model.hybrid.every=null for a plain LLM.",
    )


def _wave(llm: Any, tokens: int, phase: float) -> Tensor:
    # No random numbers, because this check must not change the random numbers of the training.
    weight = llm.get_input_embeddings().weight
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    steps = torch.arange(tokens * llm.config.hidden_size, device=weight.device, dtype=torch.float32)
    return torch.sin(steps * 0.7 + phase).view(1, tokens, -1).to(dtype)


def _logits(llm: Any, visual: Tensor) -> Tensor:
    logits: Tensor = llm(inputs_embeds=_wave(llm, _TEXT, 0.0), visual_tokens=visual, use_cache=False).logits
    return logits


@contextmanager
def _only(llm: Any, layers: nn.ModuleList, chosen: list[int]) -> Iterator[None]:
    # A 7B model would take a minute on a CPU; four of its layers take a second.
    all_layers = dict(layers._modules)
    modes = {module: module.training for module in llm.modules()}
    count = llm.config.num_hidden_layers
    llm.eval()
    try:
        layers._modules = {str(place): all_layers[str(index)] for place, index in enumerate(chosen)}
        llm.config.num_hidden_layers = len(chosen)
        yield
    finally:
        layers._modules = all_layers
        llm.config.num_hidden_layers = count
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _open(gates: list[nn.Parameter]) -> Iterator[None]:
    before = [gate.detach().clone() for gate in gates]
    try:
        with torch.no_grad():
            for gate in gates:
                gate.fill_(1.0)
        yield
    finally:
        with torch.no_grad():
            for gate, value in zip(gates, before, strict=True):
                gate.copy_(value)
