"""Measures which films a run marks as unlike its training films: held-out films, other X-rays, and other images.

    python tests/benchmarks/unlike_films.py --model runs/phantom --data data/phantom --others FOLDER FOLDER --each 200

`--others` are folders of images, at any depth. Pages of text, noise and drawn scenes are made by this script. Prints
for each kind the share that is marked (distance above 1) and the median distance.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from emrrg_cli import load_generator
from emrrg_cli.decoding.reports import study_pixels
from emrrg_cli.decoding.stored_studies import stored_studies
from emrrg_cli.imaging.read import read_image
from emrrg_cli.models.film_distance import describe

SIDE = 256


def noise(rng: np.random.Generator) -> Image.Image:
    """Makes grey noise, blurred by up to 8 pixels."""
    image = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8))
    return image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 8))))


def scene(rng: np.random.Generator) -> Image.Image:
    """Draws a scene like a photograph: sky, ground, and a few bodies of different brightness."""
    image = Image.fromarray(np.linspace(*rng.uniform(0, 255, 2), SIDE)[:, None].repeat(SIDE, 1).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(3, 15))):
        x, y, w, h = rng.integers(0, SIDE, 4).tolist()
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + w // 2, y + h // 2), fill=int(rng.integers(0, 256)))
    return image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 2))))


def page(rng: np.random.Generator) -> Image.Image:
    """Draws a page of text."""
    image = Image.new("L", (SIDE, SIDE), 250)
    draw = ImageDraw.Draw(image)
    letters = "abcdefghijklmnopqrstuvwxyz     .,"
    for top in range(int(rng.integers(5, 30)), SIDE - 10, int(rng.integers(10, 20))):
        draw.text((12, top), "".join(rng.choice(list(letters), int(rng.integers(10, 45)))), fill=20)
    return image


def pictures(folder: Path, count: int) -> list[Any]:
    """Draws `count` image files of a folder with a fixed seed."""
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".dcm"))
    return random.Random(0).sample(found, min(count, len(found)))


def groups(options: argparse.Namespace) -> Iterator[tuple[str, list[Any]]]:
    """Yields names and images."""
    for split in ("train", "validation", "test"):
        films = [study.files[0].content() for study in stored_studies(str(options.data), split)[: options.each]]
        yield f"{split} split", films
    for folder in options.others:
        yield folder.parent.name, pictures(folder, options.each)
    for make in (noise, scene, page):
        rng = np.random.default_rng(0)
        yield f"{make.__name__}s" if make is not noise else "noise", [make(rng) for _ in range(options.each)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="dataset directory that it was trained on")
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="folders of images")
    parser.add_argument("--each", type=int, default=200)
    options = parser.parse_args()
    generator = load_generator(options.model, device="cpu")
    known = generator.writer.film_distance
    assert known is not None, "this run has no distances: train it with this version"
    size = generator.recipe.model.encoder.image_size
    print("| images | number | median distance | flagged |\n|---|---|---|---|")
    for name, images in groups(options):
        distances = []
        for start in range(0, len(images), 32):
            pixels = torch.cat([study_pixels(read_image(image), size) for image in images[start : start + 32]])
            with torch.no_grad():
                distances.append(known.distances(describe(generator.model.encode_films(pixels), pixels)))
        found = torch.cat(distances)
        share = (found > 1).double().mean()
        print(f"| {name} | {len(found)} | {found.median():.1f} | {100 * share:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
