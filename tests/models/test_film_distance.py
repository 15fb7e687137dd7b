"""How unlike the films of a training a film is: the distance, its threshold, and the file in the run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from emrrg_cli.errors import RunError
from emrrg_cli.models.film_distance import (
    FILM_DISTANCE,
    FilmDistance,
    Films,
    MeasuredDistance,
    _Part,
    _shrunk_covariance,
    describe,
)


def _films(count: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    return 3 + spread * torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) @ mixing


def test_the_distance_is_that_of_mahalanobis() -> None:
    fitted = _Part.fit(_films(100_000, 1), _films(500, 2))
    films = _films(5, 3)
    covariance = np.cov(_films(100_000, 1).double().numpy().T)
    deviation = (films.double() - fitted.mean).numpy()
    expected = np.sqrt(np.einsum("ni,ij,nj->n", deviation, np.linalg.inv(covariance), deviation))
    assert fitted.distances(films).numpy() == pytest.approx(expected, rel=5e-3)


def test_the_threshold_excludes_one_film_of_100() -> None:
    fitted = _Part.fit(_films(2000, 1), _films(2000, 2))
    share = (fitted.distances(_films(20_000, 3)) > fitted.threshold).double().mean().item()
    assert 0.005 < share < 0.016
    assert (fitted.distances(_films(200, 4, spread=6)) > fitted.threshold).double().mean() > 0.9


def test_a_threshold_of_few_films_is_above_them() -> None:
    held_out = _films(12, 2)
    fitted = _Part.fit(_films(300, 1), held_out)
    assert fitted.threshold > fitted.distances(held_out).max()
    with pytest.raises(ValueError, match="too few"):
        FilmDistance.fit((_films(300, 1), _films(300, 1)), (held_out[:9], held_out[:9]))


def test_the_covariance_is_shrunk_by_ledoit_and_wolf() -> None:
    # With fewer films than dimensions: the optimal share by their lemma, film by film.
    deviations = torch.randn(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    deviations -= deviations.mean(dim=0)
    n, e = deviations.shape
    sample = deviations.T @ deviations / n
    scale = sample.trace() / e
    apart = ((sample - scale * torch.eye(e)) ** 2).sum() / e
    noise = sum(((torch.outer(x, x) - sample) ** 2).sum() / e for x in deviations) / n**2
    share = min(noise, apart) / apart
    expected = (1 - share) * sample + (share + 2.0**-16) * scale * torch.eye(e)
    assert torch.allclose(_shrunk_covariance(deviations), expected)
    assert torch.linalg.cond(_shrunk_covariance(deviations)) < 100


def _described(count: int, seed: int, size: int = 16) -> Films:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, size, size), generator=generator, dtype=torch.uint8)
    return describe(torch.randn(count, 5, 3, generator=generator), pixels)


def test_films_are_described_by_tokens_and_looks() -> None:
    tokens = torch.randn(2, 5, 3)
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(16, 8)
    spread, looks = describe(tokens, torch.stack([stripes, stripes.T]))
    assert torch.allclose(spread, torch.cat([tokens.mean(1), tokens.std(1)], dim=1))
    assert looks.shape == (2, 8 + 9 + 36)  # texture of levels of 16 and 8 pixels, shares, squares
    assert looks[0, 0].exp().item() == pytest.approx(0.25, abs=0.05)  # 0 and 1 around a mean of one half
    assert looks[0, 2] < -0.8  # neighbours across differ
    assert looks[0, 3] > 0.8  # neighbours down are the same
    assert torch.allclose(looks[0, [0, 1, 2, 3]], looks[1, [0, 1, 3, 2]], atol=1e-5)
    half = torch.zeros(1, 12, 12, dtype=torch.uint8)
    half[:, :, 6:] = 255
    brightness = describe(tokens[:1], half)[1][0, -45:]
    assert brightness[:9].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert brightness[9:].view(6, 6).tolist() == [[0, 0, 0, 1, 1, 1]] * 6


def test_quantiles_are_those_of_the_sorted_pixels() -> None:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (5, 12, 12), generator=generator, dtype=torch.uint8)
    pixels[0], pixels[1] = 255, pixels[1] // 64 * 64
    ordered = pixels.flatten(1).sort(dim=1).values
    places = [round(share * 143) for share in (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)]
    assert torch.equal(describe(torch.randn(5, 4, 3), pixels)[1][:, -45:-36], ordered[:, places] / 255)


def test_one_held_out_film_of_100_is_unlike_by_either_part() -> None:
    held_out = _described(1000, 2)
    fitted = FilmDistance.fit(_described(1000, 1), held_out)
    assert (fitted.distances(held_out) > 1).sum() == 10


@pytest.mark.parametrize("part", [0, 1])
def test_tokens_or_looks_make_a_film_unlike(part: int) -> None:
    fitted = FilmDistance.fit(_described(400, 1), _described(300, 2))
    films = _described(50, 3)
    assert (fitted.distances(films) > 1).double().mean() < 0.1
    strange = list(films)
    strange[part] = strange[part] * 5 + 5
    far = fitted.of_studies((strange[0], strange[1]), torch.tensor([2, 48]))
    assert min(one.distance for one in far) > 1
    assert far[0].distance == fitted.distances((strange[0][:2], strange[1][:2])).max().item()


def test_a_note_says_why_a_film_is_unlike() -> None:
    assert MeasuredDistance(1.0).note is None
    note = "unlike the training films (distance 2.3, threshold 1.0)"
    assert MeasuredDistance(2.34).note == note
    limited = MeasuredDistance(2.34, "this model knows drawings only").note
    assert limited is not None
    assert limited.startswith(f"{note}: this model knows drawings only; ")
    assert limited.endswith("do not read the report as a finding")


def test_a_file_is_of_the_weights_it_was_measured_with(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "checksums.json").unlink(missing_ok=True)
    assert FilmDistance.load(run) is None
    fitted = FilmDistance.fit(_described(100, 1), _described(50, 2))
    fitted.save(run)
    read = FilmDistance.load(run)
    assert read is not None
    assert torch.equal(read.distances(_described(20, 3)), fitted.distances(_described(20, 3)))
    checksums = run / "model" / "checksums.json"
    checksums.write_text(checksums.read_text() + "\n")  # another export
    assert FilmDistance.load(run) is None
    save_file({"texture.mean": torch.zeros(2)}, run / FILM_DISTANCE)  # of an earlier version
    assert FilmDistance.load(run) is None
    save_file({"looks.mean": torch.zeros(2)}, run / FILM_DISTANCE)
    with pytest.raises(RunError, match=r"cannot be read: tokens\.mean is missing"):
        FilmDistance.load(run)
    (run / FILM_DISTANCE).write_bytes(b"damaged")
    with pytest.raises(RunError, match="not a readable safetensors file"):
        FilmDistance.load(run)
