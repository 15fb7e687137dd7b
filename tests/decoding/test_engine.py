"""Our decoding engine against transformers' `generate`, token by token in fp32."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from emrrg_cli.decoding.choice import choose_engine
from emrrg_cli.decoding.engine import Engine, _Graphs
from emrrg_cli.decoding.logits import exponential_noise
from emrrg_cli.decoding.reference import generate_reports
from emrrg_cli.decoding.slots import Prompts
from emrrg_cli.errors import UsageError
from emrrg_cli.models.hybrid_decoder import add_hybrid_layers, hybrid_parameters
from emrrg_cli.recipe.finetuning import GenerationSettings

END = 2
MakeLLM = Callable[..., Any]


def make_model(make_llm: MakeLLM, kind: str = "llama", *, hybrid: bool = True, **options: Any) -> Any:
    """A tiny LLM that writes something else for each image, and that ends reports at different lengths."""
    llm = make_llm(kind, **({"sliding_window": None} if kind == "mistral" else {}), **options)
    if hybrid:
        add_hybrid_layers(llm, 2)
        torch.manual_seed(5)
        with torch.no_grad():
            for name, parameter in hybrid_parameters(llm):
                if name.endswith("warmup"):
                    parameter.fill_(2.0)
                elif name.endswith("gate.bias"):
                    parameter.fill_(0.5)
                elif "kv_proj" in name:
                    parameter.normal_(std=0.5)
    with torch.no_grad():
        llm.get_output_embeddings().weight[END] *= 3
    return llm


def make_prompts(studies: int = 8, *, hybrid: bool = True, width: int = 11, holes: bool = False) -> Prompts:
    """Random prompts; with `holes` every third study lacks a view in the middle."""
    generator = torch.Generator().manual_seed(7)
    embeddings = torch.randn(studies, width, 32, generator=generator)
    mask = torch.ones(studies, width, dtype=torch.long)
    visual = torch.randn(studies, 5, 32, generator=generator) if hybrid else None
    visual_mask = None
    if holes:
        mask[::3, 3:6] = 0
        if hybrid:
            visual_mask = torch.ones(studies, 5, dtype=torch.bool)
            visual_mask[::3, 3:] = False
    return Prompts(list(range(studies)), list(range(studies)), embeddings, mask, visual, visual_mask)


def reference(llm: Any, prompts: Prompts, settings: GenerationSettings) -> list[list[int]]:
    """What transformers writes, each report up to its end."""
    return [report.tokens for report in generate_reports(llm, prompts, settings, [END], 0)]


def ours(llm: Any, prompts: Prompts, settings: GenerationSettings, at_a_time: int = 3) -> list[list[int]]:
    engine = Engine(llm, settings, [END], torch.device("cpu"))
    parts = (prompts.rows(i, min(i + at_a_time, len(prompts))) for i in range(0, len(prompts), at_a_time))
    found = {key: report.tokens for finished in engine.write(parts) for key, report in finished}
    assert sorted(found) == prompts.keys
    return [found[key] for key in prompts.keys]


OPTIONS = [
    pytest.param({"num_beams": 1}, id="greedy"),
    pytest.param({"num_beams": 1, "repetition_penalty": 2.0, "min_new_tokens": 5}, id="greedy-penalised"),
    pytest.param({"num_beams": 1, "no_repeat_ngram_size": 1, "min_new_tokens": 14}, id="greedy-1-grams"),
    pytest.param({"num_beams": 3}, id="beams"),
    pytest.param({"num_beams": 5, "min_new_tokens": 4, "max_new_tokens": 10, "repetition_penalty": 2.0,
                  "length_penalty": 2.0}, id="beams-published"),
    pytest.param({"num_beams": 4, "length_penalty": -1.0}, id="beams-short"),
    pytest.param({"num_beams": 3, "length_penalty": 0.0, "no_repeat_ngram_size": 2}, id="beams-2-grams"),
    pytest.param({"num_beams": 2, "no_repeat_ngram_size": 3, "min_new_tokens": 14}, id="beams-3-grams"),
    pytest.param({"num_beams": 3, "max_new_tokens": 1}, id="beams-one-token"),
]  # fmt: skip
KINDS = ["llama", "qwen2", "qwen3", "mistral"]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("hybrid", [True, False], ids=["hybrid", "plain"])
def test_tokens_are_those_of_transformers(options: dict[str, Any], hybrid: bool, make_llm: MakeLLM) -> None:
    llm, prompts = make_model(make_llm, hybrid=hybrid), make_prompts(hybrid=hybrid)
    settings = GenerationSettings(**({"max_new_tokens": 14, "batch_size": 4} | options))
    expected = reference(llm, prompts, settings)
    assert ours(llm, prompts, settings) == expected
    if settings.max_new_tokens > 1:
        assert len({tuple(row) for row in expected}) > 4
        forced = settings.min_new_tokens > 10 or settings.length_penalty == 2.0
        assert forced or len(set(map(len, expected))) > 2  # they end at different lengths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_families_and_prompts_with_holes(kind: str, beams: int, make_llm: MakeLLM) -> None:
    llm, prompts = make_model(make_llm, kind), make_prompts(holes=True)
    settings = GenerationSettings(num_beams=beams, max_new_tokens=12, batch_size=8)
    assert ours(llm, prompts, settings) == reference(llm, prompts, settings)


def test_steps_are_captured_on_the_gpu_of_the_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []

    class OnDevice:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *_: object) -> None:
            current.pop()

    class Captured(_Graphs):
        def _capture(self, count: int, steps: int) -> Any:
            assert current == [torch.device("cuda:1")]
            return SimpleNamespace(replay=lambda: replayed.append((count, steps)))

    replayed: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "device", OnDevice)
    graphs = Captured(SimpleNamespace(step=pytest.fail), torch.device("cuda:1"))  # type: ignore[arg-type]
    graphs.step(2, 8)
    graphs.step(2, 8)
    assert replayed == [(2, 8), (2, 8)]
    assert not graphs.failed
    assert not current


@pytest.mark.gpu
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 1, "do_sample": True}])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_captured_steps_write_the_same_tokens(
    index: int, options: dict[str, Any], precision: torch.dtype, make_llm: MakeLLM
) -> None:
    if index >= torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    device = torch.device("cuda", index)
    llm, prompts = make_model(make_llm).to(device), make_prompts(holes=True)
    on_gpu = replace(
        prompts,
        **{
            name: value.to(device)
            for name in ("embeddings", "mask", "visual_tokens", "visual_mask")
            if (value := getattr(prompts, name)) is not None
        },
    )
    settings = GenerationSettings(max_new_tokens=40, batch_size=3, **options)

    def autocast() -> torch.autocast:
        return torch.autocast("cuda", precision, enabled=precision != torch.float32, cache_enabled=False)

    found = []
    for graphs in (False, True):
        engine = Engine(llm, settings, [END], device, autocast, graphs=graphs)
        reports = dict(pair for finished in engine.write([on_gpu]) for pair in finished)
        assert engine.graphs is None if not graphs else engine.graphs is not None and not engine.graphs.failed
        found.append([reports[key].tokens for key in prompts.keys])
    assert found[0] == found[1]


# -- the stop test of transformers 4.44 -----------------------------------------------------------------------------


def literal_beams(llm: Any, prompts: Prompts, settings: GenerationSettings, study: int) -> list[int]:
    """Beam search as the scorer of transformers 4.44 does it, for one study, without a cache."""
    one, k = prompts.rows(study, study + 1), settings.num_beams
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    done = False
    for length in range(1, settings.max_new_tokens + 1):
        written = llm.get_input_embeddings()(torch.tensor([tokens for _, tokens in beams], dtype=torch.long))
        logits = llm(
            inputs_embeds=torch.cat([one.embeddings.expand(len(beams), -1, -1), written], 1),
            visual_tokens=one.visual_tokens.expand(len(beams), -1, -1),
            use_cache=False,
        ).logits[:, -1]
        candidates = []
        for (score, tokens), row in zip(beams, logits.log_softmax(-1), strict=True):
            candidates += [(value, [*tokens, token]) for token, value in enumerate((score + row).tolist())]
        candidates = sorted(candidates, reverse=True)[: 2 * k]
        beams = []
        for rank, (score, tokens) in enumerate(candidates):
            if tokens[-1] == END:
                if rank < k:
                    ended = sorted([*ended, (score / length**settings.length_penalty, tokens)], reverse=True)[:k]
            elif len(beams) < k:
                beams.append((score, tokens))
        if len(ended) == k and ended[-1][0] >= candidates[0][0] / length**settings.length_penalty:
            done = True
            break
    if not done:
        length = settings.max_new_tokens
        ended += [(score / length**settings.length_penalty, tokens) for score, tokens in beams]
    return max(ended)[1]


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [0.8, 1.2, 2.0])
def test_beams_stop_as_in_transformers_444(penalty: float, make_llm: MakeLLM) -> None:
    llm, prompts = make_model(make_llm), make_prompts(24)
    settings: dict[str, Any] = {"num_beams": 2, "max_new_tokens": 12, "length_penalty": penalty, "batch_size": 24}
    published = GenerationSettings(**settings, beam_stop="candidates")
    with torch.no_grad():
        expected = [literal_beams(llm, prompts, published, study) for study in range(24)]
    assert ours(llm, prompts, published) == expected
    assert reference(llm, prompts, published) == expected
    assert reference(llm, prompts, GenerationSettings(**settings)) != expected
    assert "_check_early_stop_heuristic" not in vars(llm)


# -- sampling -------------------------------------------------------------------------------------------------------

SAMPLING = [
    pytest.param({"num_beams": 1}, id="plain"),
    pytest.param({"num_beams": 1, "temperature": 1.7, "top_k": 20}, id="top-k"),
    pytest.param({"num_beams": 1, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.5}, id="top-p"),
    pytest.param({"num_beams": 3, "temperature": 1.3, "top_k": 9, "top_p": 0.9}, id="beams"),
]


@pytest.mark.parametrize("options", SAMPLING)
def test_sampling_has_the_distribution_of_transformers(
    options: dict[str, Any], make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers gets our noise in the place of its own: it then draws the same tokens."""
    llm, prompts = make_model(make_llm), make_prompts()
    if options["num_beams"] > 1 and "sort" not in inspect.getsource(llm._get_top_k_continuations):
        pytest.skip("this version of transformers does not sort the candidates that it draws")
    settings = GenerationSettings(**({"max_new_tokens": 12, "batch_size": 8, "do_sample": True} | options))
    steps = iter(range(99))

    def multinomial(probabilities: Tensor, num_samples: int) -> Tensor:
        step = torch.full((len(probabilities),), next(steps))
        noise = exponential_noise(torch.tensor(prompts.seeds), step, probabilities.shape[-1])
        return (probabilities / noise).topk(num_samples).indices

    monkeypatch.setattr(torch, "multinomial", multinomial)
    expected = reference(llm, prompts, settings)
    assert ours(llm, prompts, settings) == expected
    assert len({tuple(row) for row in expected}) == 8


def test_noise_is_exponential_and_independent() -> None:
    noise = exponential_noise(torch.arange(-20, 20), torch.arange(40) % 7, 5000)
    assert noise.min() > 0
    assert noise.mean() == pytest.approx(1, abs=0.01)
    assert noise.var() == pytest.approx(1, abs=0.03)
    below = [(noise < limit).float().mean().item() for limit in (0.1054, 0.6931, 2.3026)]
    assert below == pytest.approx([0.1, 0.5, 0.9], abs=0.01)
    assert (torch.corrcoef(noise) - torch.eye(40)).abs().max() < 0.08
    assert torch.equal(noise[3:4, :100], exponential_noise(torch.tensor([-17]), torch.tensor([3]), 100))


# -- studies beside each other --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 1.5}, {"num_beams": 1, "do_sample": True}])
def test_a_report_does_not_depend_on_its_batch(options: dict[str, Any], make_llm: MakeLLM) -> None:
    llm, prompts = make_model(make_llm), make_prompts(9)
    texts = [
        ours(llm, prompts, GenerationSettings(max_new_tokens=12, batch_size=size, **options), at_a_time)
        for size, at_a_time in ((1, 1), (4, 3), (4, 9), (16, 2))
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert len(set(map(len, texts[0]))) > 1  # they leave the batch at different times


def test_longer_prompts_wait_for_room(make_llm: MakeLLM) -> None:
    llm = make_model(make_llm)
    short, long = make_prompts(5), make_prompts(5, width=40)
    settings = GenerationSettings(max_new_tokens=8, batch_size=3)
    expected = reference(llm, short, settings) + reference(llm, long, settings)
    long.keys = [10 + key for key in long.keys]
    engine = Engine(llm, settings, [END], torch.device("cpu"))
    parts = [short.rows(0, 2), long.rows(0, 2), short.rows(2, 5), long.rows(2, 5)]
    found = {key: report.tokens for finished in engine.write(iter(parts)) for key, report in finished}
    assert [found[key] for key in [*range(5), *range(10, 15)]] == expected


def test_prompts_are_requested_when_places_are_free(make_llm: MakeLLM) -> None:
    llm, prompts = make_model(make_llm), make_prompts(12)
    asked: list[int] = []

    def source() -> Any:
        for place in range(12):
            asked.append(place)
            yield prompts.rows(place, place + 1)

    engine = Engine(llm, GenerationSettings(max_new_tokens=12, batch_size=4), [END], torch.device("cpu"))
    done = 0
    for finished in engine.write(source()):
        assert len(asked) <= done + 4
        done += len(finished)
    assert done == 12


@pytest.mark.parametrize("beams", [1, 3])
def test_the_log_probability_of_a_report(beams: int, make_llm: MakeLLM) -> None:
    llm, prompts = make_model(make_llm), make_prompts(4)
    settings = GenerationSettings(num_beams=beams, max_new_tokens=10, length_penalty=0.5 + beams)
    engine = Engine(llm, settings, [END], torch.device("cpu"))
    for finished in engine.write(iter([prompts])):
        for key, report in finished:
            one = prompts.rows(key, key + 1)
            written = llm.get_input_embeddings()(torch.tensor([report.tokens]))
            whole = torch.cat([one.embeddings, written], 1)
            logits = llm(inputs_embeds=whole, visual_tokens=one.visual_tokens).logits[0, 10:-1].log_softmax(-1)
            mean = logits.gather(1, torch.tensor(report.tokens)[:, None]).mean().item()
            assert report.log_probability == pytest.approx(mean, abs=1e-4)


def test_an_engine_without_studies(make_llm: MakeLLM) -> None:
    engine = Engine(make_model(make_llm), GenerationSettings(), [END], torch.device("cpu"))
    assert list(engine.write(iter([]))) == []


# -- which LLMs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_trial_passes(kind: str, make_llm: MakeLLM) -> None:
    assert choose_engine(make_model(make_llm, kind), GenerationSettings(engine="own"), 50) == "own"
    assert choose_engine(make_model(make_llm, kind), GenerationSettings(engine="transformers"), 50) == "transformers"


def test_a_short_window_is_left_to_transformers(make_llm: MakeLLM) -> None:
    llm = make_llm("mistral", sliding_window=32)
    assert choose_engine(llm, GenerationSettings(), 33) == "transformers"
    assert choose_engine(llm, GenerationSettings(), 32) == "own"
    with pytest.raises(UsageError, match="attends only to the last 32 tokens"):
        choose_engine(llm, GenerationSettings(engine="own"), 33)


def test_an_llm_with_other_results_is_left_to_transformers(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm()
    forward = llm.forward

    def shifted(*args: Any, position_ids: Tensor, **kwargs: Any) -> Any:  # as where an LLM counts positions itself
        return forward(*args, position_ids=position_ids * (2 if kwargs.get("use_cache") else 1), **kwargs)

    shifted.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(llm, "forward", shifted)
    assert choose_engine(llm, GenerationSettings(), 50) == "transformers"
    with pytest.raises(UsageError, match="its logits with our cache differ"):
        choose_engine(llm, GenerationSettings(engine="own"), 50)


def test_adapters_that_are_not_merged(make_llm: MakeLLM) -> None:
    """As in a validation during training."""
    from peft import get_peft_model

    from emrrg_cli.models import adapters

    plain, prompts = make_model(make_llm), make_prompts()
    settings = GenerationSettings(max_new_tokens=10, engine="own")
    before = ours(plain, prompts, settings)
    llm: Any = get_peft_model(plain, adapters.llm_lora(["llm"], 4, 8.0))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    assert choose_engine(llm, settings, 50) == "own"
    expected = reference(llm, prompts, settings)
    assert ours(llm, prompts, settings) == expected
    assert expected != before


@pytest.mark.parametrize("beams", [1, 3])
def test_bf16_autocast_agrees_mostly(beams: int, make_llm: MakeLLM) -> None:
    llm, prompts = make_model(make_llm), make_prompts(24)
    settings = GenerationSettings(num_beams=beams, max_new_tokens=8, batch_size=16)

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)

    engine = Engine(llm, settings, [END], torch.device("cpu"), autocast)
    found = {key: report.tokens for finished in engine.write(iter([prompts])) for key, report in finished}
    assert engine.slots.cache.keys[0].dtype == torch.bfloat16
    with autocast():
        assert choose_engine(llm, GenerationSettings(engine="own"), 50) == "own"
        expected = reference(llm, prompts, settings)
    assert sum(found[key] == tokens for key, tokens in enumerate(expected)) > 12


@pytest.mark.parametrize("least", [1, 3])
def test_several_studies_enter_together_if_requested(
    least: int, make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, prompts = make_model(make_llm), make_prompts(20)
    settings = GenerationSettings(max_new_tokens=12, batch_size=6)
    engine = Engine(llm, settings, [END], torch.device("cpu"))
    engine.least = least
    entered: list[int] = []
    enter = engine.slots.enter

    def counted(some: Prompts, places: list[int]) -> None:
        entered.append(len(some))
        enter(some, places)

    monkeypatch.setattr(engine.slots, "enter", counted)
    found = {key: report.tokens for finished in engine.write(iter([prompts])) for key, report in finished}
    assert [found[key] for key in range(20)] == reference(llm, prompts, settings)
    assert sum(entered) == 20
    assert min(entered[:-1]) >= least
    assert (len(entered) > 6) == (least == 1)
