"""Measures images per second of stage 1: the training step with and without the loader, and only the loader.

    python tests/benchmarks/pretrain.py DATA --recipe xray/pretrain-base [--batch-size 256] [--workers 16] [--steps 64]
        [KEY=VALUE ...]

DATA is a dataset directory or a folder of images. The step is that of `emrrg pretrain`: forward, backward, clipping and
AdamW under the recipe's precision, on one device. "On the device" repeats it on one batch that is already on the
device; "with the loader" is real training. Their ratio shows the cost of the loader.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.image_dataset import (
    Augmentation,
    FolderImages,
    ImageBatch,
    ImageDataset,
    SplitImages,
    collate_images,
    split_folder,
)
from emrrg_cli.datasets.loading import load_batches
from emrrg_cli.datasets.manifest import is_dataset_dir
from emrrg_cli.recipe.load import load_recipe
from emrrg_cli.runtime import choose_precision, make_accelerator
from emrrg_cli.training.pretrain import PixelPretrainer, build_pretrainer
from emrrg_cli.training.schedule import build_optimizer


def batches(dataset: ImageDataset, size: int, count: int, workers: int, device: torch.device) -> Iterator[ImageBatch]:
    """`count` batches of random images, as the training loop loads them."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(len(dataset), (count, size), generator=generator).tolist()
    return load_batches(dataset, indices, collate_images, workers=workers, pin_memory=device.type == "cuda")


def finish(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--recipe", default="xray/pretrain-base")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=64)
    options = parser.parse_intermixed_args()
    recipe = load_recipe(options.recipe, options.overrides, stage="pretrain")
    accelerator = make_accelerator(choose_precision(recipe.train.precision), 0)
    device = accelerator.device
    settings, size, workers = recipe.train, options.batch_size, options.workers
    # Loading processes deliver their batches in rounds, so several whole rounds are timed.
    steps = max(options.steps, 3 * workers)

    root = Path(options.data)
    source = (
        SplitImages(open_dataset(root)["train"])
        if is_dataset_dir(root)
        else FolderImages(root, split_folder(root, 0.0, workers=workers).train)
    )
    low, high = recipe.data.crop_scale
    augmentation = Augmentation((low, high), recipe.data.flip)
    dataset = ImageDataset(source, recipe.model.encoder.image_size, augmentation, settings.seed)

    torch.manual_seed(settings.seed)
    pretrainer = build_pretrainer(recipe.model, recipe.model.scan)
    pretrainer.encoder.gradient_checkpointing = settings.gradient_checkpointing
    module = PixelPretrainer(pretrainer)
    model, optimizer = accelerator.prepare(module, build_optimizer(module, settings))

    def step(batch: ImageBatch) -> None:
        parts = batch.pixels.split(settings.micro_batch_size or size)
        for part in parts:
            output = model(ImageBatch(part))
            accelerator.backward(output.loss_sum / size)
        if settings.clip_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    (first,) = batches(dataset, size, 1, 0, device)
    fixed = first.to(device)
    for _ in range(3):  # kernels are chosen and compiled
        step(fixed)
    rates: dict[str, float] = {}

    def timed(name: str, loop: Any, count: int) -> None:
        finish(device)
        began = time.perf_counter()
        loop(count)
        finish(device)
        rates[name] = count * size / (time.perf_counter() - began)

    def on_device(count: int) -> None:
        for _ in range(count):
            step(fixed)

    timed("step, batch on the device", on_device, steps)

    def started() -> Iterator[ImageBatch]:
        # Two rounds are consumed at full speed, so that the processes run and no batch is in reserve.
        loader = batches(dataset, size, steps + 2 * workers, workers, device)
        for _ in range(2 * workers):
            next(loader)
        return loader

    ahead = started()

    def with_loader(count: int) -> None:
        for _ in range(count):
            step(next(ahead).to(device))

    timed("step, with the loader", with_loader, steps)
    alone = started()

    def load(count: int) -> None:
        for _ in range(count):
            next(alone)

    timed("loader alone", load, steps)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    what = f"{options.recipe}, batch {size}, {workers} loading processes, {name}, {accelerator.mixed_precision}"
    table = Table("", "images/s", title=f"{what}, scan {pretrainer.encoder.layers[0].mixer.engine}")
    for row, rate in rates.items():
        table.add_row(row, f"{rate:,.1f}")
    cost = rates["step, batch on the device"] / rates["step, with the loader"]
    table.add_row("time with the loader / time on the device", f"{cost:.3f}")
    if device.type == "cuda":
        table.add_row("peak GPU memory", f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB")
    Console().print(table)


if __name__ == "__main__":
    main()
