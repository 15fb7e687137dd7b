"""Images for stage 1: crops, what they depend on, both kinds of source, and files that are no images."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from emrrg_cli.datasets import image_dataset
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.image_dataset import (
    Augmentation,
    FolderImages,
    ImageBatch,
    ImageDataset,
    SplitImages,
    collate_images,
    random_box,
    split_folder,
)
from emrrg_cli.datasets.manifest import is_dataset_dir
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.imaging.raster import resize_square
from emrrg_cli.imaging.read import read_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of random blots below a folder, of two kinds and several sizes."""
    root = tmp_path / "films"
    rng = np.random.default_rng(0)
    for i in range(12):
        small = Image.fromarray(rng.integers(0, 256, (5 + i % 3, 6), dtype=np.uint8))
        path = root / ("a" if i < 6 else "b/c") / f"{i:02d}.{'png' if i % 2 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((60 + 10 * i, 80 + 5 * i), Image.Resampling.BICUBIC).save(path)
    return root


def _all(root: Path) -> FolderImages:
    return FolderImages(root, split_folder(root, 0.0).train)


# -- crops -------------------------------------------------------------------------------------------------------


def test_boxes_are_inside_the_image_with_uniform_areas() -> None:
    rng = np.random.default_rng(0)
    parts, ratios, centres = [], [], []
    for _ in range(4000):
        left, top, right, bottom = random_box(rng, 400, 400, (0.2, 0.6))
        assert 0 <= left < right <= 400 + 1e-9
        assert 0 <= top < bottom <= 400 + 1e-9
        w, h = right - left, bottom - top
        parts.append(w * h / 160_000)
        ratios.append(math.log(w / h))
        centres.append(left / (400 - w))
    assert min(parts) >= 0.2 - 1e-9
    assert max(parts) <= 0.6 + 1e-9
    assert np.quantile(parts, [0.25, 0.5, 0.75]) == pytest.approx([0.3, 0.4, 0.5], abs=0.02)
    high = math.log(4 / 3)
    assert max(map(abs, ratios)) <= high + 1e-9
    assert np.quantile(ratios, [0.25, 0.5, 0.75]) == pytest.approx([-high / 2, 0, high / 2], abs=0.02)
    assert np.quantile(centres, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.04)


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (1, 1)])
def test_an_image_that_fits_no_crop_gives_its_centre(width: int, height: int) -> None:
    boxes = {random_box(np.random.default_rng(i), width, height, (1.0, 1.0)) for i in range(20)}
    (left, top, right, bottom) = max(boxes, key=lambda box: box[2] - box[0])
    assert left == pytest.approx(width - right)
    assert top == pytest.approx(height - bottom)
    w, h = right - left, bottom - top
    assert 3 / 4 - 1e-9 <= w / h <= 4 / 3 + 1e-9
    assert max(w / width, h / height) == pytest.approx(1.0)


def test_a_crop_is_the_box_resized_and_may_be_mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = np.broadcast_to(np.arange(0, 200, dtype=np.uint8), (100, 200))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    monkeypatch.setattr(image_dataset, "random_box", lambda *arguments: (40.0, 10.0, 104.0, 74.0))
    dataset = ImageDataset(FolderImages(tmp_path, ["ramp.png"]), 32, Augmentation(), seed=1)
    expected = 40 + (np.arange(32) + 0.5) * 2 - 0.5  # the middles of the cells, in pixels
    seen = set()
    for epoch in range(12):
        dataset.set_epoch(epoch)
        row = dataset[0].numpy()[16].astype(float)
        mirrored = row[0] > row[-1]
        seen.add(bool(mirrored))
        np.testing.assert_allclose(row[::-1] if mirrored else row, expected, atol=1.01)
    assert seen == {True, False}


def test_without_mirroring_none_is_mirrored(tmp_path: Path) -> None:
    Image.fromarray(np.broadcast_to(np.arange(0, 200, dtype=np.uint8), (100, 200))).save(tmp_path / "ramp.png")
    dataset = ImageDataset(FolderImages(tmp_path, ["ramp.png"]), 16, Augmentation(flip=False))
    for epoch in range(12):
        dataset.set_epoch(epoch)
        assert int(dataset[0][8, 0]) < int(dataset[0][8, -1])


def test_crops_depend_only_on_seed_epoch_and_index(folder: Path) -> None:
    def crops(seed: int, epoch: int) -> list[torch.Tensor]:
        dataset = ImageDataset(_all(folder), 32, Augmentation(), seed)
        dataset.set_epoch(epoch)
        torch.manual_seed(epoch)
        return [dataset[i] for i in range(12)]

    once = crops(3, 5)
    dataset = ImageDataset(_all(folder), 32, Augmentation(), 3)
    dataset.set_epoch(5)
    for i in reversed(range(12)):  # in another order, and twice
        assert torch.equal(dataset[i], once[i])
        assert torch.equal(dataset[i], once[i])
    assert once[0].shape == (32, 32)
    assert once[0].dtype == torch.uint8
    for other in (crops(4, 5), crops(3, 6)):
        assert sum(torch.equal(a, b) for a, b in zip(once, other, strict=True)) == 0


def test_without_augmentation_it_is_the_whole_image(folder: Path) -> None:
    source = _all(folder)
    dataset = ImageDataset(source, 32)
    for i in range(12):
        assert torch.equal(dataset[i], torch.from_numpy(resize_square(read_image(source.read(i)), 32)))
        dataset.set_epoch(i)


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    large = Image.fromarray(rng.integers(0, 256, (12, 12), dtype=np.uint8)).resize(
        (1600, 1200), Image.Resampling.BICUBIC
    )
    large.save(tmp_path / "large.jpg", quality=95)
    large.save(tmp_path / "large.png")
    decoded: list[tuple[int, int]] = []
    grey = image_dataset.to_grey

    def noted(image: Image.Image) -> Image.Image:
        decoded.append(image.size)
        return grey(image)

    monkeypatch.setattr(image_dataset, "to_grey", noted)
    monkeypatch.setattr(image_dataset.np.random, "default_rng", lambda seed: np.random.Generator(np.random.PCG64(7)))
    dataset = ImageDataset(FolderImages(tmp_path, ["large.jpg", "large.png"]), 64, Augmentation())
    small, whole = dataset[0].float(), dataset[1].float()
    assert decoded == [(400, 300), (1600, 1200)]
    assert float((small - whole).abs().mean()) < 1.0


def test_batches(folder: Path) -> None:
    dataset = ImageDataset(_all(folder), 32)
    batch = collate_images([dataset[0], dataset[3]])
    assert len(batch) == 2
    assert torch.equal(batch.pixels[1], dataset[3])
    assert isinstance(batch.to(torch.device("cpu")), ImageBatch)


# -- a dataset directory -----------------------------------------------------------------------------------------


def test_every_view_of_every_study_is_an_image(tiny_dataset: Path) -> None:
    split = open_dataset(tiny_dataset)["train"]
    views = [image for images in split["images"] for image in images]
    assert len(views) > len(split)
    source = SplitImages(split)
    assert len(source) == len(views)
    for i, view in enumerate(views):
        assert source.read(i) == view["bytes"]
    assert "of the train split" in source.name(0)
    again = pickle.loads(pickle.dumps(source))  # as it goes to a loading process
    assert again.read(len(views) - 1) == views[-1]["bytes"]
    assert len(pickle.dumps(source)) < 100_000
    few = SplitImages(split, limit=5)
    assert len(few) == 5
    assert few.read(4) == views[4]["bytes"]
    assert is_dataset_dir(tiny_dataset)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "film.png").write_bytes(b"no image")
    with pytest.raises(RunError, match=r"film\.png: not an image"):
        ImageDataset(FolderImages(tmp_path, ["film.png"]), 32)[0]


# -- a folder ----------------------------------------------------------------------------------------------------


def test_a_folder_is_searched_and_other_files_are_skipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes((folder / "a" / "01.png").read_bytes())
    whole = (folder / "b" / "c" / "08.jpg").read_bytes()
    (folder / "b" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    split = split_folder(folder, 0.25)
    assert len(split.train) == 9
    assert len(split.validation) == 3
    names = sorted([*split.train, *split.validation])
    assert names == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("[01]*.*") if p.is_file())
    assert split.left_out == {"not an image": 1, "truncated image": 1}
    said = capsys.readouterr().err
    assert f"{folder}: 2 of 14 files are skipped: 1 truncated image, 1 not an image; first: b/cut.jpg" in said or (
        f"{folder}: 2 of 14 files are skipped: 1 not an image, 1 truncated image; first:" in said
    )
    assert not is_dataset_dir(folder)


def test_which_images_are_for_validation_depends_on_their_paths(folder: Path) -> None:
    first = split_folder(folder, 0.25)
    assert split_folder(folder, 0.25) == first
    assert split_folder(folder, 0.0).validation == []
    assert len(split_folder(folder, 0.01).validation) == 1
    (folder / "a" / first.train[0].rpartition("/")[2]).touch()
    assert split_folder(folder, 0.25).validation == first.validation


def test_dicom_files_are_images(folder: Path, make_dicom: Any) -> None:
    (folder / "film.dcm").write_bytes(make_dicom(np.arange(100, dtype=np.uint8).reshape(10, 10)))
    assert "film.dcm" in split_folder(folder, 0.0).train


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        split_folder(tmp_path / "gone", 0.1)
    with pytest.raises(UsageError, match="no files in"):
        split_folder(tmp_path, 0.1)
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "x.json").write_text(json.dumps({}))
    with pytest.raises(RunError, match=r"2 of 2 files are skipped: 2 not an image; first: table\.csv"):
        split_folder(tmp_path, 0.1)
