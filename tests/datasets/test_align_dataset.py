"""Pairs of X-ray and report: text tokens, and the rule by which data sets are mixed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from emrrg_cli.datasets.align_dataset import PairDataset, collate_pairs, encode_texts
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.epochs import EpochOrder
from emrrg_cli.datasets.report_dataset import ReportDataset
from emrrg_cli.errors import UsageError
from emrrg_cli.models.text_encoder import train_text_tokenizer
from emrrg_cli.recipe.common import DataSettings


@pytest.fixture(scope="module")
def parts(tiny_dataset: Path) -> list[ReportDataset]:
    """Three sets of 16, 4 and 4 studies."""
    splits = open_dataset(tiny_dataset)
    return [ReportDataset(splits[name], DataSettings(), 32) for name in ("train", "validation", "test")]


def drawn(data: PairDataset, seed: int) -> list[int]:
    order: list[int] = data.draw_epoch(torch.Generator().manual_seed(seed)).tolist()
    return order


# -- mixing ------------------------------------------------------------------------------------------------------


def test_data_sets_are_concatenated(parts: list[ReportDataset]) -> None:
    data = PairDataset(parts)
    assert len(data) == len(data.reports) == 24
    expected = [study for part in parts for study in part.study_ids]
    examples = [data[i] for i in range(24)]
    assert [example.study_id for example in examples] == expected
    assert [example.index for example in examples] == list(range(24))
    assert [example.report for example in examples] == data.reports
    assert torch.equal(examples[17].pixels, parts[1][1].pixels)


def test_weight_one_takes_each_study_once_in_seeded_order(parts: list[ReportDataset]) -> None:
    data = PairDataset(parts)
    assert sorted(drawn(data, 0)) == list(range(24))
    assert drawn(data, 0) == drawn(PairDataset(parts, [1, 1, 1]), 0) != drawn(data, 1)
    head = Counter("train" if i < 16 else "other" for i in drawn(data, 0)[:12])
    assert set(head) == {"train", "other"}  # the sets are shuffled together


def test_weights_say_how_often_an_epoch_takes_a_study(parts: list[ReportDataset]) -> None:
    data = PairDataset(parts, [0.25, 2.0, 2.5])
    assert data.epoch_length == 4 + 8 + 10
    quarters, halves = set(), set()
    for seed in range(8):
        times = Counter(drawn(data, seed))
        assert sum(times.values()) == 22
        quarter = {i for i in times if i < 16}
        assert len(quarter) == 4  # none of them twice
        assert {times[i] for i in quarter} == {1}
        assert [times[i] for i in range(16, 20)] == [2] * 4
        assert sorted(times[i] for i in range(20, 24)) == [2, 2, 3, 3]
        quarters.add(frozenset(quarter))
        halves.add(frozenset(i for i in range(20, 24) if times[i] == 3))
    assert len(quarters) > 6  # another quarter in every epoch
    assert len(halves) > 2


def test_an_epoch_of_a_mixture_is_cut_into_batches(parts: list[ReportDataset]) -> None:
    data = PairDataset(parts, [0.25, 2.0, 2.5])
    order = EpochOrder(data.epoch_length, 5, None, 0, 1, seed=3, draw=data.draw_epoch)
    assert order.steps_per_epoch == 4
    first, again, second = list(order.epoch(0)), list(order.epoch(0)), list(order.epoch(1))
    assert first == again != second
    shared = [list(EpochOrder(22, 4, None, rank, 2, seed=3, draw=data.draw_epoch).epoch(0)) for rank in range(2)]
    alone = EpochOrder(22, 4, None, 0, 1, seed=3, draw=data.draw_epoch).epoch(0)
    for one, other, both in zip(*shared, alone, strict=True):
        assert sorted(one + other) == sorted(both)


def test_a_weight_that_leaves_no_study_is_refused(parts: list[ReportDataset]) -> None:
    with pytest.raises(UsageError, match=r"data\.sets\[1\]\.weight=0\.1 leaves none of its 4 training studies"):
        PairDataset(parts, [1.0, 0.1, 1.0])


# -- text --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(parts: list[ReportDataset]) -> Any:
    return train_text_tokenizer(parts[0].reports, 320)


def test_texts_end_with_one_token_and_are_padded_on_the_right(tokenizer: Any) -> None:
    long = "there is a left pleural effusion . " * 5
    for side in ("right", "left"):
        tokenizer.padding_side = side
        ids, mask = encode_texts(tokenizer, ["clear .", long, "no pneumothorax ."], 12)
        assert ids.shape == mask.shape == (3, 12)
        lengths = mask.sum(dim=1).tolist()
        assert lengths[1] == 12
        assert lengths[0] != lengths[2]
        assert max(lengths[0], lengths[2]) < 12
        for row, length in enumerate(lengths):
            assert mask[row].tolist() == [1] * length + [0] * (12 - length)
            assert ids[row, 0] == tokenizer.bos_token_id
            assert ids[row, length - 1] == tokenizer.eos_token_id
            assert (ids[row, length:] == tokenizer.pad_token_id).all()
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "clear ."


def test_a_tokenizer_may_have_no_padding_token(qwen_like: Any) -> None:
    ids, mask = encode_texts(qwen_like, ["clear .", "there is a left pleural effusion ."], 64)
    assert mask.sum(dim=1).tolist() == [len(qwen_like.encode("clear .")), ids.shape[1]]


@pytest.fixture
def qwen_like(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")


def test_pairs_are_joined_view_by_view(parts: list[ReportDataset], tokenizer: Any) -> None:
    examples = [parts[0][i] for i in range(3)]
    batch = collate_pairs(examples, tokenizer, 64)
    assert len(batch) == 3
    assert batch.views.tolist() == [1, 2, 1]
    assert batch.pixels.shape == (4, 32, 32)
    assert batch.indices == [0, 1, 2]
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in batch.input_ids] == parts[0].reports[:3]
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.input_ids, batch.input_ids)
    assert moved.indices == batch.indices
