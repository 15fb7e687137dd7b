"""Examples, collation, and the order of the data."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from emrrg_cli.datasets.directory import FEATURES, open_dataset
from emrrg_cli.datasets.epochs import EpochOrder, check_batch, evaluation_batches
from emrrg_cli.datasets.report_dataset import IGNORE, Batch, Example, ReportDataset, collate
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.imaging.raster import encode, resize_square
from emrrg_cli.imaging.read import read_image
from emrrg_cli.recipe.common import DataSettings


def _png(value: int) -> bytes:
    return encode(Image.new("L", (40, 30), value), "png")


def _split(*rows: dict[str, Any]) -> Any:
    """A split as `open_dataset` gives it."""
    from datasets import Image as ImageFeature
    from datasets import List

    defaults = {"patient_id": None, "views": [], "findings": None, "impression": None, "report": None, "source": "mine"}
    full = [
        {"study_id": f"s{i}", "images": [{"bytes": _png(i), "path": None}]} | defaults | row
        for i, row in enumerate(rows)
    ]
    columns = {name: [row[name] for row in full] for name in FEATURES}
    return Dataset.from_dict(columns, FEATURES).cast_column("images", List(ImageFeature(decode=False)))


# -- studies --------------------------------------------------------------------------------------------------------


def test_studies_of_a_dataset_directory(tiny_dataset: Path) -> None:
    split = open_dataset(tiny_dataset)["train"]
    dataset = ReportDataset(split, DataSettings(), 48)
    assert len(dataset) == len(split) == 16
    assert dataset.study_ids == [f"study{i:02d}" for i in range(16)]
    assert dataset.without_text == 0
    example = dataset[1]
    assert (example.index, example.study_id) == (1, "study01")
    assert example.pixels.shape == (2, 48, 48)
    assert example.pixels.dtype == torch.uint8
    assert example.report == "study of the chest . there is a left pleural effusion . no pneumothorax ."
    for view, image in zip(example.pixels, split[1]["images"], strict=True):
        assert torch.equal(view, torch.from_numpy(resize_square(read_image(image["bytes"]), 48)))
    assert dataset[0].pixels.shape == (1, 48, 48)


def test_studies_without_the_text_are_skipped() -> None:
    split = _split({"report": "A."}, {"report": None}, {"report": " \n"}, {"report": ""}, {"report": "B."})
    dataset = ReportDataset(split, DataSettings(), 16)
    assert dataset.study_ids == ["s0", "s4"]
    assert dataset.reports == ["a .", "b ."]
    assert dataset.without_text == 3
    assert (dataset[1].study_id, dataset[1].report) == ("s4", "b .")
    assert int(dataset[1].pixels[0, 0, 0]) == 4  # its own image
    with pytest.raises(RunError, match=r"the data set: no study of the \w+ split has text for data\.section=findings"):
        ReportDataset(split, DataSettings(section="findings"), 16)


@pytest.mark.parametrize(
    ("section", "reports"),
    [
        ("report", ["whole ."]),
        ("findings", ["clear lungs .", "only findings ."]),
        ("impression", ["normal ."]),
        ("both", ["clear lungs . normal .", "only findings ."]),
    ],
)
def test_sections(section: str, reports: list[str]) -> None:
    split = _split(
        {"report": "Whole.", "findings": "Clear lungs.", "impression": "Normal."},
        {"findings": "Only findings.", "impression": ""},
    )
    assert ReportDataset(split, DataSettings.model_validate({"section": section}), 16).reports == reports


def test_cleaning_depends_on_the_source() -> None:
    text = "Size: 3 = normal."
    split = _split({"report": text, "source": "iu_xray"}, {"report": text}, {"report": text, "source": None})
    assert ReportDataset(split, DataSettings(), 16).reports == [
        "size 3  normal .",
        "size : 3 = normal .",
        "size : 3 = normal .",
    ]
    assert ReportDataset(split, DataSettings(cleaning="none"), 16).reports == [text] * 3
    assert ReportDataset(split, DataSettings(cleaning="r2gen-iu"), 16).reports == ["size 3  normal ."] * 3


def test_limit_counts_usable_studies() -> None:
    split = _split({"report": None}, *({"report": f"Number {i}."} for i in range(5)))
    assert ReportDataset(split, DataSettings(limit=2), 16).study_ids == ["s1", "s2"]
    assert len(ReportDataset(split, DataSettings(limit=99), 16)) == 5


@pytest.mark.parametrize(("max_views", "expected"), [(None, [0, 1, 2]), (1, [0]), (2, [0, 1]), (9, [0, 1, 2])])
def test_first_views_are_taken(max_views: int | None, expected: list[int]) -> None:
    images = [{"bytes": _png(10 * i), "path": None} for i in range(3)]
    dataset = ReportDataset(_split({"report": "A.", "images": images}), DataSettings(max_views=max_views), 16)
    assert dataset[0].pixels[:, 0, 0].tolist() == [10 * i for i in expected]


def test_images_that_cannot_be_read_name_their_study(tmp_path: Path) -> None:
    rows = [
        {"report": "A.", "study_id": "broken", "images": [{"bytes": b"no image", "path": "1/2.png"}]},
        {"report": "B.", "study_id": "bare", "images": []},
        {"report": "C.", "study_id": "by path", "images": [{"bytes": None, "path": str(tmp_path / "c.png")}]},
    ]
    dataset = ReportDataset(_split(*rows), DataSettings(), 16)
    with pytest.raises(RunError, match=r"study broken: .*not an image"):
        dataset[0]
    with pytest.raises(RunError, match="study bare has no images"):
        dataset[1]
    with pytest.raises(RunError, match=r"study by path: .*c\.png: missing image"):
        dataset[2]
    (tmp_path / "c.png").write_bytes(_png(7))  # other tools keep paths
    assert int(dataset[2].pixels[0, 0, 0]) == 7


# -- batches --------------------------------------------------------------------------------------------------------


def _example(index: int, views: int, report: str = "") -> Example:
    return Example(index, f"s{index}", torch.full((views, 4, 4), index, dtype=torch.uint8), report)


def test_collation() -> None:
    batch = collate([_example(5, 2, "abc"), _example(3, 1, "z")], lambda text: [ord(c) for c in text] + [1])
    assert batch.indices == [5, 3]
    assert batch.study_ids == ["s5", "s3"]
    assert batch.reports == ["abc", "z"]
    assert batch.views.tolist() == [2, 1]
    assert batch.pixels.shape == (3, 4, 4)
    assert batch.pixels[:, 0, 0].tolist() == [5, 5, 3]
    assert batch.labels is not None
    assert batch.labels.tolist() == [[97, 98, 99, 1], [122, 1, IGNORE, IGNORE]]
    assert batch.labels.dtype == batch.views.dtype == torch.int64
    assert collate([_example(0, 1)]).labels is None


def test_a_batch_moves_with_all_its_tensors() -> None:
    batch = collate([_example(0, 1, "a")], lambda text: [1])
    further = ("projections", "findings", "advantages", "temperatures")
    for name in further:
        setattr(batch, name, torch.ones(1))
    moved = batch.to(torch.device("meta"))
    tensors = {name: value for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    assert set(tensors) == {"pixels", "views", "labels", *further}
    assert all(tensor.device.type == "meta" for tensor in tensors.values())
    assert moved.study_ids == batch.study_ids
    assert batch.pixels.device.type == "cpu"
    assert collate([_example(0, 1)]).to(torch.device("meta")).labels is None


def test_loading_in_another_process(tiny_dataset: Path) -> None:
    dataset = ReportDataset(open_dataset(tiny_dataset)["test"], DataSettings(), 32)
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_sampler=[[2, 0], [3]], collate_fn=partial(collate, encode=_lengths), num_workers=1
    )
    batches: list[Batch] = list(loader)
    assert [batch.indices for batch in batches] == [[2, 0], [3]]
    expected = collate([dataset[2], dataset[0]], _lengths)
    assert torch.equal(batches[0].pixels, expected.pixels)
    assert batches[0].labels is not None
    assert expected.labels is not None
    assert torch.equal(batches[0].labels, expected.labels)


def _lengths(text: str) -> list[int]:
    return [len(word) for word in text.split()]


# -- order ----------------------------------------------------------------------------------------------------------


def _steps(order: EpochOrder, epoch: int, first_step: int = 0) -> list[list[list[int]]]:
    """Micro-batches of each optimizer step."""
    micro, per_step = list(order.epoch(epoch, first_step)), order.micro_batches_per_step
    assert len(micro) == per_step * (order.steps_per_epoch - first_step)
    return [micro[i : i + per_step] for i in range(0, len(micro), per_step)]


@pytest.mark.parametrize(("length", "batch_size"), [(24, 8), (25, 8), (31, 8), (8, 8), (7, 1), (13, 6)])
def test_an_epoch_takes_each_example_once_at_most(length: int, batch_size: int) -> None:
    order = EpochOrder(length, batch_size)
    assert order.steps_per_epoch == length // batch_size
    seen = [index for step in _steps(order, 0) for micro in step for index in micro]
    assert len(seen) == len(set(seen)) == length // batch_size * batch_size
    assert set(seen) <= set(range(length))


def test_every_example_is_used_in_some_epoch() -> None:
    order = EpochOrder(25, 8)
    epochs = [{index for micro in order.epoch(epoch) for index in micro} for epoch in range(20)]
    assert set().union(*epochs) == set(range(25))
    assert len({frozenset(epoch) for epoch in epochs}) > 1  # not always the same one is left out


@pytest.mark.parametrize("micro", [None, 1, 2, 3, 100])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_global_batches_do_not_depend_on_the_processes(world: int, micro: int | None) -> None:
    alone = [sorted(index for m in step for index in m) for step in _steps(EpochOrder(43, 8, seed=3), 2)]
    ranks = [_steps(EpochOrder(43, 8, micro, rank, world, seed=3), 2) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    for number, expected in enumerate(alone):
        shares = [[index for m in rank[number] for index in m] for rank in ranks]
        assert {len(share) for share in shares} == {8 // world}
        assert sorted(index for share in shares for index in share) == expected
    # All processes take part in each micro-step.
    assert len({tuple(len(m) for step in rank for m in step) for rank in ranks}) == 1


@pytest.mark.parametrize(("micro", "sizes"), [(None, [6]), (6, [6]), (4, [4, 2]), (3, [3, 3]), (1, [1] * 6), (9, [6])])
def test_micro_batches_cut_a_batch_in_order(micro: int | None, sizes: list[int]) -> None:
    whole, cut = EpochOrder(20, 6, seed=1), EpochOrder(20, 6, micro, seed=1)
    assert cut.micro_batches_per_step == len(sizes)
    for one, other in zip(_steps(whole, 0), _steps(cut, 0), strict=True):
        assert [len(m) for m in other] == sizes
        assert [index for m in other for index in m] == one[0]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("first", [0, 1, 3, 5])
def test_a_resumed_epoch_is_the_rest_of_it(first: int, world: int) -> None:
    order = EpochOrder(42, 8, 3, world - 1, world, seed=5)
    assert _steps(order, 4, first) == _steps(order, 4)[first:]


def test_epochs_and_seeds_shuffle_anew() -> None:
    def flat(seed: int, epoch: int) -> list[int]:
        return [index for micro in EpochOrder(30, 5, seed=seed).epoch(epoch) for index in micro]

    orders = [flat(seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 16
    assert flat(2, 3) == flat(2, 3) != list(range(30))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    flat(0, 0)
    assert torch.equal(torch.get_rng_state(), before)  # the training's generator is left alone


def test_batches_of_a_wrong_size_are_refused() -> None:
    with pytest.raises(UsageError, match=r"train\.batch_size=6 does not divide among 4 processes"):
        EpochOrder(100, 6, world_size=4)
    with pytest.raises(UsageError, match=r"has 5 usable examples, fewer than train\.batch_size=6"):
        EpochOrder(5, 6)


@pytest.mark.parametrize(
    ("batch_size", "processes", "examples", "remedy"),
    [
        (6, 4, None, "use --num-processes 3, or train.batch_size=4 or 8."),
        (7, 4, 100, "use --num-processes 1, or train.batch_size=4 or 8."),
        (2, 4, None, "use --num-processes 2, or train.batch_size=4."),
        (6, 1, 5, "possible setting is train.batch_size=5."),
        (16, 4, 10, "possible setting is train.batch_size=8."),
        (8, 4, 3, "possible setting is --num-processes 3 and train.batch_size=3."),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(
    batch_size: int, processes: int, examples: int | None, remedy: str
) -> None:
    with pytest.raises(UsageError) as caught:
        check_batch(batch_size, processes, examples)
    assert str(caught.value.hint).endswith(remedy)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("length", "batch_size"), [(0, 4), (1, 4), (7, 3), (12, 4), (13, 4), (5, 100), (9, 1)])
def test_evaluation_covers_each_example_once(length: int, batch_size: int, world: int) -> None:
    ranks = [evaluation_batches(length, batch_size, rank, world) for rank in range(world)]
    assert sorted(index for rank in ranks for batch in rank for index in batch) == list(range(length))
    assert len({len(rank) for rank in ranks}) == 1
    assert all(len(batch) <= batch_size for rank in ranks for batch in rank)
    if world == 1:
        assert [index for batch in ranks[0] for index in batch] == list(range(length))
        assert all(ranks[0])  # none is empty
