"""Lists which causal LM families of transformers support hybrid layers.

    python -m tests.benchmarks.llm_families [--family NAME ...]

Builds a tiny model with random weights of every causal LM family of the installed transformers, adds hybrid layers and
prints one line per family: `fits` with the engine that decodes it, `refused` with the reason, or `not built` if no tiny
model could be made.
"""

from __future__ import annotations

import argparse
import signal
import warnings
from typing import Any

import torch

from emrrg_cli.decoding.choice import choose_engine
from emrrg_cli.errors import UsageError
from emrrg_cli.models.hybrid_decoder import add_hybrid_layers
from emrrg_cli.recipe.finetuning import GenerationSettings

SECONDS = 60  # per family
# Small values for the possible names of sizes in a configuration; names that it does not have are omitted.
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "sdpa",
}


class _TooSlow(Exception):
    pass


def families() -> list[str]:
    """Returns the model types that `AutoModelForCausalLM` knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_llm(family: str) -> Any:
    """Makes a model of a family with four narrow layers and random weights; this fails if fixed sizes do not match."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def shrink(config: Any) -> Any:
        own = config.to_dict()
        sizes = {key: value for key, value in SIZES.items() if key in own or key == "attn_implementation"}
        for key in ("layer_types", "no_rope_layers", "mlp_layer_types"):  # one entry per layer
            if isinstance(own.get(key), list):
                sizes[key] = own[key][:4]
        inner = {key: shrink(value) for key, value in vars(config).items() if hasattr(value, "to_dict")}
        return type(config)(**(sizes | inner))

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shrink(AutoConfig.for_model(family)), attn_implementation="sdpa").eval()


def verdict(family: str) -> tuple[str, str]:
    """Returns `fits`, `refused` or `not built`, and the reason."""
    try:
        llm = tiny_llm(family)
        llm(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)
    except Exception as error:
        return "not built", f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:120]
    try:
        add_hybrid_layers(llm, 2)
        engine = choose_engine(llm, GenerationSettings(), longest=40)
    except UsageError as error:
        return "refused", str(error).splitlines()[0]
    except Exception as error:
        return "UNEXPECTED", f"{type(error).__name__}: {error}"[:160]
    return "fits", f"{type(llm).__name__}, decoded by {engine}"


def main(arguments: list[str] | None = None) -> None:
    """Prints the table and the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", nargs="*", default=None)
    chosen = parser.parse_args(arguments).family or families()
    warnings.simplefilter("ignore")

    def too_slow(*_: Any) -> None:
        raise _TooSlow(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_slow)
    counts: dict[str, int] = {}
    for family in chosen:
        signal.alarm(SECONDS)
        try:
            outcome, reason = verdict(family)
        except _TooSlow as error:
            outcome, reason = "not built", str(error)
        finally:
            signal.alarm(0)
        counts[outcome] = counts.get(outcome, 0) + 1
        print(f"{family:32} {outcome:10} {reason}", flush=True)
    print(", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())))


if __name__ == "__main__":
    main()
