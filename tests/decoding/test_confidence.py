"""Probabilities of tokens by both engines, and of the words and sentences that the tokens make."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch

from emrrg_cli.datasets.report_text import sentence_spans
from emrrg_cli.decoding.confidence import read_confidence, token_places
from emrrg_cli.decoding.engine import Engine
from emrrg_cli.decoding.reference import generate_reports, generation_config
from emrrg_cli.decoding.slots import Prompts
from emrrg_cli.decoding.teacher_forcing import token_log_probabilities
from emrrg_cli.recipe.finetuning import GenerationSettings
from tests.decoding.test_engine import END, OPTIONS, SAMPLING, make_model, make_prompts

MakeLLM = Callable[..., Any]
Found = dict[int, tuple[list[int], list[float]]]


def ours(llm: Any, prompts: Prompts, settings: GenerationSettings) -> Found:
    engine = Engine(llm, settings, [END], torch.device("cpu"))
    done = (pair for finished in engine.write(iter([prompts])) for pair in finished)
    return {key: (report.tokens, report.token_log_probabilities) for key, report in done}


def step_by_step(llm: Any, prompts: Prompts, settings: GenerationSettings) -> Found:
    """The logits that transformers saw at each step, before it changed them, of the beams that it chose."""
    config = generation_config(settings)()
    config.pad_token_id, config.eos_token_id = 0, [END]
    config.output_logits = config.output_scores = config.return_dict_in_generate = True
    visual = {"visual_tokens": prompts.visual_tokens, "visual_mask": prompts.visual_mask}
    out = llm.generate(
        inputs_embeds=prompts.embeddings,
        attention_mask=prompts.mask,
        generation_config=config,
        **(visual if prompts.visual_tokens is not None else {}),
    )
    found: Found = {}
    for study, row in enumerate(out.sequences.tolist()):
        length = row.index(END) + 1 if END in row else len(row)
        beams = [study] * length if settings.num_beams == 1 else out.beam_indices[study][:length].tolist()
        steps = enumerate(zip(row[:length], beams, strict=True))
        given = [out.logits[step][beam].log_softmax(-1)[token].item() for step, (token, beam) in steps]
        found[study] = (row[:length], given)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("hybrid", [True, False], ids=["hybrid", "plain"])
def test_token_probabilities_are_those_of_transformers(
    options: dict[str, Any], hybrid: bool, make_llm: MakeLLM
) -> None:
    llm, prompts = make_model(make_llm, hybrid=hybrid), make_prompts(hybrid=hybrid)
    settings = GenerationSettings(**({"max_new_tokens": 14, "batch_size": 4} | options))
    expected, own = step_by_step(llm, prompts, settings), ours(llm, prompts, settings)
    theirs = generate_reports(llm, prompts, settings, [END], 0)
    for study, (tokens, given) in expected.items():
        assert own[study][0] == theirs[study].tokens == tokens
        assert own[study][1] == pytest.approx(given, abs=2e-5)
        assert theirs[study].token_log_probabilities == pytest.approx(given, abs=2e-5)


@pytest.mark.parametrize("options", SAMPLING)
def test_sampling_does_not_change_token_probabilities(options: dict[str, Any], make_llm: MakeLLM) -> None:
    llm, prompts = make_model(make_llm), make_prompts(holes=True)
    own = ours(llm, prompts, GenerationSettings(max_new_tokens=12, batch_size=8, do_sample=True, **options))
    reports = [own[study][0] for study in range(8)]
    assert len(set(map(len, reports))) > 1  # shorter ones are padded
    forced = token_log_probabilities(llm, prompts, reports, 0)
    for study, given in enumerate(forced):
        assert own[study][1] == pytest.approx(given, abs=2e-5)


def test_large_batches_are_read_in_parts(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, prompts = make_model(make_llm), make_prompts(5, holes=True)
    reports = [[7, 8, 9], [7], [3] * 6, [5, END], [9, 9]]
    whole = token_log_probabilities(llm, prompts, reports, 0)
    monkeypatch.setattr("emrrg_cli.decoding.teacher_forcing._LARGEST", 320 * 7 * 2)
    parts = token_log_probabilities(llm, prompts, reports, 0)
    assert [len(given) for given in parts] == [3, 1, 6, 2, 2]
    assert [*chain(*parts)] == pytest.approx([*chain(*whole)], abs=1e-5)


# -- words and sentences --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("the heart is enlarged . no pneumothorax .", ["the heart is enlarged .", "no pneumothorax ."]),
        ("Nodule of 1.5 cm; stable? Edema vs. none.", ["Nodule of 1.5 cm;", "stable?", "Edema vs. none."]),
        ("1. Heart normal. 2. Seen at T12. Next 3.", ["1. Heart normal.", "2. Seen at T12.", "Next 3."]),
        (" . . no . ", [". .", "no ."]),
        ("no end", ["no end"]),
        ("clear . .", ["clear . ."]),
        ("12.", ["12."]),
        ("", []),
    ],
)
def test_sentences_of_a_report(text: str, sentences: list[str]) -> None:
    spans = sentence_spans(text)
    assert [text[start:end] for start, end in spans] == sentences
    inside = {place for start, end in spans for place in range(start, end)}
    assert all(letter == " " for place, letter in enumerate(text) if place not in inside)


def test_words_and_sentences_by_hand() -> None:
    pieces = ["the", " he", "art", " .", " no", " air", " .", "</s>"]
    probabilities = [0.5, 0.8, 0.5, 1.0, 0.2, 0.4, 0.5, 0.9]

    def decode(tokens: Any) -> str:
        return "".join(pieces[token] for token in tokens if token < 7)

    text = "the heart . no air ."
    given = [math.log(value) for value in probabilities]
    found = read_confidence(text, range(8), given, decode)
    assert found.words == pytest.approx([0.5, 0.4, 1.0, 0.2, 0.4, 0.5])
    assert [text[one.start : one.end] for one in found.sentences] == ["the heart .", "no air ."]
    means = [(0.5 * 0.8 * 0.5) ** (1 / 4), (0.2 * 0.4 * 0.5) ** (1 / 3)]
    assert [one.confidence for one in found.sentences] == pytest.approx(means)
    assert found.sentence_of_token == [0, 0, 0, 0, 1, 1, 1, -1]
    assert found.mean_token_logprob == pytest.approx(sum(given) / 8)
    empty = read_confidence("", [7], [-0.5], decode)
    assert (empty.words, empty.sentences, empty.mean_token_logprob) == ([], [], -0.5)


def test_letters_of_several_tokens_and_lost_spaces(tokenizer: Any) -> None:
    """Byte-level tokens that are a part of a letter, runs of spaces that the report does not keep, and the end."""
    raw = "naïve  heart 😀 ."
    tokens = [*tokenizer.encode(raw, add_special_tokens=False), tokenizer.eos_token_id]

    def decode(some: Any) -> str:
        return " ".join(tokenizer.decode(some, skip_special_tokens=True).split())

    text = decode(tokens)
    places = token_places(text, tokens, decode)
    assert places == sorted(places)
    assert places[-1] == len(text)
    words = {text[: place + 1].count(" ") for place in places[:-1]}
    assert words == {0, 1, 2, 3}  # every word has tokens
    found = read_confidence(text, tokens, [math.log(0.5)] * len(tokens), decode)
    assert math.prod(found.words) == pytest.approx(0.5 ** (len(tokens) - 1))


def test_a_text_that_ends_a_report_counts_for_no_sentence() -> None:
    pieces = ["clear", " .", " </", "s>"]
    found = read_confidence(
        "clear .", range(4), [0.0] * 4, lambda some: "".join(pieces[i] for i in some).split("</s>")[0].strip()
    )
    assert found.sentence_of_token == [0, 0, -1, -1]
