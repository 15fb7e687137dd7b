"""How unlike the films of a training a film is: the distance, its threshold, and the file in the run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from emrrg_cli.errors import RunError
from emrrg_cli.models.film_distance import FILM_DISTANCE, FilmDistance, _shrunk_covariance, embed


def _films(count: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    return 3 + spread * torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) @ mixing


def test_the_distance_is_that_of_mahalanobis() -> None:
    fitted = FilmDistance.fit(_films(100_000, 1), _films(500, 2))
    films = _films(5, 3)
    covariance = np.cov(_films(100_000, 1).double().numpy().T)
    deviation = (films.double() - fitted.mean).numpy()
    expected = np.sqrt(np.einsum("ni,ij,nj->n", deviation, np.linalg.inv(covariance), deviation))
    assert fitted.distances(films).numpy() == pytest.approx(expected, rel=5e-3)


def test_the_threshold_leaves_one_film_of_200_out() -> None:
    fitted = FilmDistance.fit(_films(2000, 1), _films(2000, 2))
    share = (fitted.distances(_films(20_000, 3)) > fitted.threshold).double().mean().item()
    assert 0.001 < share < 0.008
    assert (fitted.distances(_films(200, 4, spread=6)) > fitted.threshold).double().mean() > 0.9


def test_a_threshold_of_few_films_is_above_them() -> None:
    held_out = _films(12, 2)
    fitted = FilmDistance.fit(_films(300, 1), held_out)
    assert fitted.threshold > fitted.distances(held_out).max()
    with pytest.raises(ValueError, match="too few"):
        FilmDistance.fit(_films(300, 1), held_out[:9])


def test_the_covariance_shrinks_as_ledoit_and_wolf_say() -> None:
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


def test_films_are_compared_by_their_tokens() -> None:
    tokens = torch.randn(2, 5, 3)
    assert torch.allclose(embed(tokens), torch.cat([tokens.mean(1), tokens.std(1)], dim=1))
    fitted = FilmDistance.fit(torch.randn(100, 6), torch.randn(50, 6))
    measured = fitted.of_studies(tokens, torch.tensor([2]))[0]
    assert measured.distance == fitted.distances(embed(tokens)).max().item()
    far = fitted.of_studies(tokens + 100, torch.tensor([1, 1]))[1]
    assert far.note == f"unlike the films of the training (distance {far.distance:.1f}, threshold {far.threshold:.1f})"


def test_a_file_is_of_the_weights_it_was_measured_with(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / FILM_DISTANCE).unlink(missing_ok=True)
    (run / "checksums.json").unlink(missing_ok=True)
    assert FilmDistance.load(run) is None
    fitted = FilmDistance.fit(torch.randn(100, 6), torch.randn(50, 6))
    fitted.save(run)
    read = FilmDistance.load(run)
    assert read is not None
    assert read.threshold == fitted.threshold
    assert torch.equal(read.precision, fitted.precision)
    checksums = run / "model" / "checksums.json"
    checksums.write_text(checksums.read_text() + "\n")  # another export
    assert FilmDistance.load(run) is None
    (run / FILM_DISTANCE).write_bytes(b"damaged")
    with pytest.raises(RunError, match="not a readable safetensors file"):
        FilmDistance.load(run)
