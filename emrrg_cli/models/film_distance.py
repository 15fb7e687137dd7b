"""Measures how unlike the training films a film is, from the tokens of the encoder and from its appearance."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from emrrg_cli.checksums import CHECKSUMS, check_file
from emrrg_cli.default_model import read_limits
from emrrg_cli.errors import RunError
from emrrg_cli.files.atomic import atomic_file, whole_directory
from emrrg_cli.files.write_errors import writing
from emrrg_cli.models.weights import load_tensors

FILM_DISTANCE = "film_distance.safetensors"
Films = tuple[Tensor, Tensor]  # as `describe` returns them
UNLIKE = "unlike the training films"
LEAST = 10  # smallest number of held-out films for a threshold
_USUAL = 0.99  # share of held-out films below the threshold
_DEVIATIONS = 2.326  # the same share of a normal distribution, in standard deviations
_SMALLEST = 8  # side of the smallest texture level, in pixels
_LAYOUT = 6  # squares per side of the grid of mean brightness
_SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)  # quantiles of the brightness
_ROUNDING = 2.0**-8  # relative rounding error of bf16


@dataclass(frozen=True)
class MeasuredDistance:
    """The largest distance of a study's films from the training films.

    Attributes:
        limits: Limits of the model, from `read_limits`.
    """

    distance: float
    limits: str = ""

    @property
    def note(self) -> str | None:
        """Warning for the reader; None if the distance is at most 1."""
        if self.distance <= 1:
            return None
        note = f"{UNLIKE} (distance {self.distance:.1f}, threshold 1.0)"
        if not self.limits:
            return note
        return f"{note}: {self.limits}; this looks like something else: do not read the report as a finding"


@dataclass(frozen=True)
class _Part:
    """Mahalanobis distance from training films in some of their features: mean float64 `[e]`, precision `[e, e]`."""

    mean: Tensor
    precision: Tensor
    threshold: float = 1.0

    @classmethod
    def fit(cls, training: Tensor, held_out: Tensor) -> _Part:
        mean, spread = training.double().mean(dim=0), training.double().std(dim=0).clamp(min=1e-6)
        inverse = torch.linalg.inv(_shrunk_covariance((training.double() - mean) / spread))
        part = cls(mean, (inverse / spread[:, None] / spread).contiguous())
        distances = part.distances(held_out)
        threshold = distances.quantile(_USUAL)
        if len(held_out) < 1 / (1 - _USUAL):  # too few for the quantile, which may be above all of them
            logarithms = distances.log()
            threshold = torch.maximum(threshold, (logarithms.mean() + _DEVIATIONS * logarithms.std()).exp())
        return replace(part, threshold=threshold.item())

    def distances(self, values: Tensor) -> Tensor:
        """Returns the distance of each film: `[n, e] -> [n]`."""
        deviation = values.double() - self.mean
        squared = torch.einsum("ni,ij,nj->n", deviation, self.precision, deviation)
        return squared.clamp(min=0).sqrt()


@dataclass(frozen=True)
class FilmDistance:
    """Distance of films from the training films, from the tokens of the encoder and from their looks.

    Each of the two parts is a Mahalanobis distance divided by its threshold. The distance of a film is the larger of
    the two. The thresholds are such that 99 percent of held-out films have a distance below 1. A film with a distance
    above 1 gets a warning.

    Source: Lee et al., arXiv 1807.03888; shrinkage: Ledoit and Wolf, J. Multivariate Analysis 88 (2004).
    """

    tokens: _Part
    looks: _Part
    limits: str = ""

    @classmethod
    def fit(cls, training: Films, held_out: Films) -> FilmDistance:
        """Fits the distance to films, in the form that `describe` returns.

        Raises:
            ValueError: There are fewer than 10 held-out films or fewer than 2 training films.
        """
        if len(held_out[0]) < LEAST or len(training[0]) < 2:
            raise ValueError(f"{len(training[0])} training and {len(held_out[0])} held-out films are too few")
        tokens, looks = (_Part.fit(*values) for values in zip(training, held_out, strict=True))
        scale = max(1.0, cls(tokens, looks).distances(held_out).quantile(_USUAL).item())
        tokens, looks = (replace(part, threshold=scale * part.threshold) for part in (tokens, looks))
        return cls(tokens, looks)

    def distances(self, films: Films) -> Tensor:
        """Returns the distance of each film, `[n]`."""
        parts = zip((self.tokens, self.looks), films, strict=True)
        return torch.stack([part.distances(values) / part.threshold for part, values in parts]).amax(dim=0)

    def of_studies(self, films: Films, views: Tensor) -> list[MeasuredDistance]:
        """Returns the distance of each study; `views` `[b]` is the number of films of each study."""
        distances = torch.split(self.distances(films), views.tolist())
        return [MeasuredDistance(max(own.tolist()), self.limits) for own in distances]

    def save(self, run_dir: Path) -> None:
        """Writes the distance into a run, together with a digest of the run's current weights.

        Raises:
            RunError: it cannot be written.
        """
        tensors = {"weights": torch.tensor(list(_weights_digest(run_dir)), dtype=torch.uint8)}
        for name, part in (("tokens", self.tokens), ("looks", self.looks)):
            threshold = torch.tensor(part.threshold, dtype=torch.float64)
            tensors |= {f"{name}.mean": part.mean, f"{name}.precision": part.precision, f"{name}.threshold": threshold}
        with writing(run_dir / FILM_DISTANCE), atomic_file(run_dir / FILM_DISTANCE) as file:
            file.write(save(tensors))

    @classmethod
    def load(cls, run_dir: Path) -> FilmDistance | None:
        """Reads the distance of a run; None if it is missing, of other weights, or of an earlier version.

        Raises:
            RunError: the file is damaged.
        """
        file = run_dir / FILM_DISTANCE
        if not file.is_file():
            return None
        check_file(file)
        tensors = load_tensors(file)
        if "texture.mean" in tensors:  # an earlier version wrote it
            return None
        try:
            found = cls(_read_part(tensors, "tokens"), _read_part(tensors, "looks"), read_limits(run_dir))
            return found if bytes(tensors["weights"].tolist()) == _weights_digest(run_dir) else None
        except (ValueError, KeyError, RuntimeError) as error:
            reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
            raise RunError(f"{file}, the distances of training films, cannot be read: {reason}") from error


def _weights_digest(run_dir: Path) -> bytes:
    # The trained parts are exported together with the checksums of their files.
    file = whole_directory(run_dir / "model") / CHECKSUMS
    return hashlib.sha256(file.read_bytes()).digest() if file.is_file() else b""


def _read_part(tensors: dict[str, Tensor], name: str) -> _Part:
    mean, precision, threshold = (tensors[f"{name}.{key}"].double() for key in ("mean", "precision", "threshold"))
    if mean.ndim != 1 or precision.shape != (len(mean), len(mean)):
        raise ValueError("shapes do not fit")
    return _Part(mean, precision, threshold.item())


def describe(tokens: Tensor, pixels: Tensor) -> Films:
    """Describes films: mean and deviation of their tokens `[n, 2 d]`, and their looks `[n, t]`, both on the CPU.

    The looks are texture, quantiles of brightness, and mean brightness on a grid. They are computed on the device of
    the tokens.

    Args:
        tokens: of the encoder, `[n, l, d]`.
        pixels: uint8 `[n, size, size]`.
    """
    values, pixels = tokens.float(), pixels.to(tokens.device, non_blocking=True)
    looks = torch.cat([_texture(pixels), _brightness(pixels)], dim=-1)
    return torch.cat([values.mean(dim=1), values.std(dim=1)], dim=-1).cpu(), looks.cpu()


def _brightness(pixels: Tensor) -> Tensor:
    n, count = len(pixels), pixels[0].numel()
    of_film = 256 * torch.arange(n, device=pixels.device)[:, None] + pixels.flatten(1)  # int64: film and brightness
    darker = torch.bincount(of_film.flatten(), minlength=256 * n).view(n, 256).cumsum(dim=1)
    places = torch.tensor([round(share * (count - 1)) for share in _SHARES], device=pixels.device)
    ordered = torch.searchsorted(darker, places.expand(n, -1).contiguous(), right=True)  # as sorting would have them
    layout = F.adaptive_avg_pool2d(pixels.float()[:, None], _LAYOUT).flatten(1)
    return torch.cat([ordered.float(), layout], dim=-1) / 255


def _texture(pixels: Tensor) -> Tensor:
    # For each level of a Laplacian pyramid: two measures of its strength, and the correlation of neighbouring pixels
    # in a row and in a column.
    level, found = pixels.float()[:, None] / 255, []
    while level.shape[-1] >= _SMALLEST:
        below = F.avg_pool2d(level, 2)
        detail = level - F.interpolate(below, size=level.shape[-2:], mode="bilinear")
        energy = detail.square().mean(dim=(1, 2, 3)) + 1e-6
        across = (detail[..., 1:] * detail[..., :-1]).mean(dim=(1, 2, 3)) / energy
        down = (detail[..., 1:, :] * detail[..., :-1, :]).mean(dim=(1, 2, 3)) / energy
        found += [energy.log(), (detail.abs().mean(dim=(1, 2, 3)) + 1e-4).log(), across, down]
        level = below
    return torch.stack(found, dim=-1)


def _shrunk_covariance(deviations: Tensor) -> Tensor:
    # [n, e] -> [e, e], shrunk towards a multiple of the identity; the more noise in the sample, the more it shrinks.
    n, e = deviations.shape
    covariance = deviations.T @ deviations / n
    scale = covariance.trace() / e
    identity = torch.eye(e, dtype=covariance.dtype)
    distance = (covariance - scale * identity).square().sum() / e
    noise = ((deviations.square().T @ deviations.square()) / n - covariance.square()).sum() / n / e
    share = (noise / distance).clamp(0, 1) if distance > 0 else torch.ones(())
    # The rounding errors of 16-bit inference must not make all films look unlike.
    rounding = _ROUNDING**2 * scale
    return (1 - share) * covariance + (share * scale + rounding) * identity
