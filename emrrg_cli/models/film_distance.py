"""How unlike the films of the training a film is, by what the encoder makes of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from emrrg_cli.checksums import CHECKSUMS, check_file
from emrrg_cli.errors import RunError
from emrrg_cli.files.atomic import atomic_file, whole_directory
from emrrg_cli.files.write_errors import writing
from emrrg_cli.models.weights import load_tensors

FILM_DISTANCE = "film_distance.safetensors"
UNLIKE = "unlike the films of the training"
LEAST = 10  # films that a threshold is taken from
_USUAL = 0.995  # share of held-out films below the threshold
_DEVIATIONS = 2.576  # the same share of a normal distribution
_ROUNDING = 2.0**-8  # of a value at bf16


@dataclass(frozen=True)
class MeasuredDistance:
    """The distance of a study's films from those of the training; of several the largest."""

    distance: float
    threshold: float

    @property
    def note(self) -> str | None:
        """What a reader should know; None where it is below the threshold."""
        if self.distance <= self.threshold:
            return None
        return f"{UNLIKE} (distance {self.distance:.1f}, threshold {self.threshold:.1f})"


@dataclass(frozen=True)
class FilmDistance:
    """Mahalanobis distance of films from those of the training, by the mean and deviation of the encoder's tokens.

    Args:
        mean: of the training films, float64 `[e]`, with e = 2 d.
        precision: inverse of their shrunk covariance, float64 `[e, e]`.
        threshold: 99.5 percent of held-out films are nearer.

    Source: Lee et al., arXiv 1807.03888; shrinkage: Ledoit and Wolf, J. Multivariate Analysis 88 (2004).
    """

    mean: Tensor
    precision: Tensor
    threshold: float

    @classmethod
    def fit(cls, training: Tensor, held_out: Tensor) -> FilmDistance:
        """Fits to embeddings of films, as `embed` gives them: `[n, e]` and `[m, e]`.

        Raises:
            ValueError: there are fewer than 10 held-out films, or fewer than two in training.
        """
        if len(held_out) < LEAST or len(training) < 2:
            raise ValueError(f"{len(training)} training and {len(held_out)} held-out films are too few")
        mean = training.double().mean(dim=0)
        precision = torch.linalg.inv(_shrunk_covariance(training.double() - mean)).contiguous()
        distances = cls(mean, precision, 0.0).distances(held_out)
        threshold = distances.quantile(_USUAL)
        if len(held_out) < 1 / (1 - _USUAL):  # too few to show it: it may lie above all of them
            logarithms = distances.log()
            threshold = torch.maximum(threshold, (logarithms.mean() + _DEVIATIONS * logarithms.std()).exp())
        return cls(mean, precision, threshold.item())

    def of_studies(self, tokens: Tensor, views: Tensor) -> list[MeasuredDistance]:
        """The distance of each study by the encoder's tokens, `[n, l, d]`, with `[b]` views of each."""
        films = torch.split(self.distances(embed(tokens)), views.tolist())
        return [MeasuredDistance(max(own.tolist()), self.threshold) for own in films]

    def distances(self, embeddings: Tensor) -> Tensor:
        """The distance of each film, `[n, e] -> [n]`."""
        deviation = embeddings.double() - self.mean
        squared = torch.einsum("ni,ij,nj->n", deviation, self.precision, deviation)
        return squared.clamp(min=0).sqrt()

    def save(self, run_dir: Path) -> None:
        """Writes it into a run, for the weights that the run has now.

        Raises:
            RunError: it cannot be written.
        """
        threshold = torch.tensor(self.threshold, dtype=torch.float64)
        tensors = {"mean": self.mean, "precision": self.precision, "threshold": threshold}
        weights = torch.tensor(list(_weights_digest(run_dir)), dtype=torch.uint8)
        with writing(run_dir / FILM_DISTANCE), atomic_file(run_dir / FILM_DISTANCE) as file:
            file.write(save({**tensors, "weights": weights}))

    @classmethod
    def load(cls, run_dir: Path) -> FilmDistance | None:
        """Reads that of a run; None where there is none, or it was measured with other weights.

        Raises:
            RunError: the file is damaged.
        """
        file = run_dir / FILM_DISTANCE
        if not file.is_file():
            return None
        check_file(file)
        tensors = load_tensors(file)
        try:
            mean, precision, threshold = (tensors[name].double() for name in ("mean", "precision", "threshold"))
            if mean.ndim != 1 or precision.shape != (len(mean), len(mean)):
                raise ValueError("shapes do not fit")
            found = cls(mean, precision, threshold.item())
            return found if bytes(tensors["weights"].tolist()) == _weights_digest(run_dir) else None
        except (ValueError, KeyError, RuntimeError) as error:
            raise RunError(f"{file}, the distances of training films, cannot be read: {error}") from error


def _weights_digest(run_dir: Path) -> bytes:
    # What is trained is exported as a whole, with the checksums of its files.
    file = whole_directory(run_dir / "model") / CHECKSUMS
    return hashlib.sha256(file.read_bytes()).digest() if file.is_file() else b""


def embed(tokens: Tensor) -> Tensor:
    """What films are compared by: mean and deviation of their tokens, on the CPU, `[n, l, d] -> [n, 2 d]`."""
    values = tokens.float().cpu()
    return torch.cat([values.mean(dim=1), values.std(dim=1)], dim=-1)


def _shrunk_covariance(deviations: Tensor) -> Tensor:
    # [n, e] -> [e, e], drawn towards a multiple of the identity by as much as the sample is noisy.
    n, e = deviations.shape
    covariance = deviations.T @ deviations / n
    scale = covariance.trace() / e
    identity = torch.eye(e, dtype=covariance.dtype)
    distance = (covariance - scale * identity).square().sum() / e
    noise = ((deviations.square().T @ deviations.square()) / n - covariance.square()).sum() / n / e
    share = (noise / distance).clamp(0, 1) if distance > 0 else torch.ones(())
    # Whoever computes in 16 bits later must not find all films strange.
    rounding = _ROUNDING**2 * scale
    return (1 - share) * covariance + (share * scale + rounding) * identity
