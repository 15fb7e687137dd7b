"""Measures reports per second of our decoding engine and of a plain loop over `transformers.generate`.

    python -m tests.benchmarks.decoding                    # GPU: 135M and 1.8B shapes, batch 8 and 64, bf16
    python -m tests.benchmarks.decoding --shapes phantom small --tokens 60     # CPU: LLMs of small recipes

Both get the same random weights, the same prompts and the same options, and write exactly `--tokens` tokens. The plain
loop is only the LLM with a prompt of the same length; ours has hybrid layers and 197 visual tokens unless `--plain`.
Prints one JSON object per measurement.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
    },
    "phantom": {
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 800,
    },
    "small": {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 2000,
    },
    "135M": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "1.8B": {
        "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936,
    },
}  # fmt: skip
END = 2


def build(shape: str, dtype: torch.dtype, device: str, *, hybrid: bool) -> Any:
    """Makes an LLM of a shape with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from emrrg_cli.models.hybrid_decoder import add_hybrid_layers
    from emrrg_cli.models.llm import with_plain_decoding

    config = AutoConfig.for_model(**SHAPES[shape], pad_token_id=0, bos_token_id=1, eos_token_id=END)
    torch.manual_seed(0)
    with torch.device(device):
        llm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        if hybrid:
            add_hybrid_layers(llm, 8)
            llm.to(dtype)
    return with_plain_decoding(llm).eval().requires_grad_(False)


def prompts(llm: Any, studies: int, length: int, *, hybrid: bool) -> Any:
    """Makes random prompts of one length."""
    from emrrg_cli.decoding.slots import Prompts

    weight = llm.get_input_embeddings().weight
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    embeddings = torch.randn(studies, length, weight.shape[1], **options) * weight.std()
    visual = torch.randn(studies, 197, weight.shape[1], **options) if hybrid else None
    mask = torch.ones(studies, length, dtype=torch.long, device=weight.device)
    return Prompts(list(range(studies)), list(range(studies)), embeddings, mask, visual)


def measure(engine: str, llm: Any, given: Any, settings: Any, device: torch.device) -> dict[str, Any]:
    """Measures the seconds of a second run over the prompts; the first run warms up and captures."""
    from emrrg_cli.decoding.engine import Engine
    from emrrg_cli.decoding.reference import generate_reports

    size = settings.batch_size
    parts = [given.rows(i, min(i + size, len(given))) for i in range(0, len(given), size)]
    own = Engine(llm, settings, [END], device, graphs=engine != "own, no graphs") if engine != "transformers" else None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    tokens, seconds = [], 0.0
    for turn in range(2):
        _wait(device)
        began = time.perf_counter()
        if own is not None:
            found = {key: report.tokens for done in own.write(iter(parts)) for key, report in done}
            tokens = [found[key] for key in given.keys]
        else:
            with torch.no_grad():
                tokens = [r.tokens for part in parts for r in generate_reports(llm, part, settings, [END], 0)]
        _wait(device)
        seconds = time.perf_counter() - began
        if turn == 0 and own is not None and own.graphs is not None and own.graphs.failed:
            break
    result: dict[str, Any] = {"reports_per_second": round(len(given) / seconds, 2), "seconds": round(seconds, 2)}
    result["ms_a_step"] = round(1000 * seconds / len(parts) / settings.max_new_tokens, 2)
    if device.type == "cuda":
        result["GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if own is not None and own.graphs is not None:
        result["captured"] = not own.graphs.failed
    return result | {"tokens": tokens}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> None:
    """Runs every shape, batch size and engine."""
    from emrrg_cli.recipe.finetuning import GenerationSettings

    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", default=["135M", "1.8B"], choices=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--engines", nargs="+", default=["transformers", "own"])
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--prompt", type=int, default=230)
    parser.add_argument("--rounds", type=int, default=1, help="batches a measurement")
    parser.add_argument("--plain", action="store_true", help="no hybrid layers in ours either")
    parser.add_argument("--fp32", action="store_true")
    chosen = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if chosen.fp32 or device.type == "cpu" else torch.bfloat16
    for shape in chosen.shapes:
        llms = {hybrid: build(shape, dtype, str(device), hybrid=hybrid) for hybrid in {False, not chosen.plain}}
        for batch in chosen.batches:
            settings = GenerationSettings(
                batch_size=batch, num_beams=chosen.beams, min_new_tokens=chosen.tokens, max_new_tokens=chosen.tokens
            )
            rates: dict[str, float] = {}
            for engine in chosen.engines:
                hybrid = engine != "transformers" and not chosen.plain
                llm = llms[hybrid]
                torch.manual_seed(1)
                given = prompts(llm, batch * chosen.rounds, chosen.prompt, hybrid=hybrid)
                result = measure(engine, llm, given, settings, device)
                result.pop("tokens")
                rates[engine] = result["reports_per_second"]
                if "transformers" in rates:
                    result["times_the_plain_loop"] = round(rates[engine] / rates["transformers"], 2)
                print(json.dumps({"shape": shape, "batch": batch, "engine": engine} | result), flush=True)
        del llms


if __name__ == "__main__":
    main()
