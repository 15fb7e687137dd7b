"""Draws random splits by patient, so that all studies of a patient are in one split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from emrrg_cli.console import counted
from emrrg_cli.errors import UsageError
from emrrg_cli.vocabulary import SPLITS, Split

DEFAULT = "0.8,0.1,0.1"


def parse_fractions(text: str) -> tuple[float, ...]:
    """Parses fractions of train, validation and test such as `0.8,0.1,0.1`; missing fractions are 0.

    Raises:
        UsageError: The text is not one to three numbers from 0 to 1 that sum to 1.
    """
    hint = f"Give the fractions of train, validation and test, such as {DEFAULT}."
    try:
        parts = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--split {text!r} is not a list of numbers", hint=hint) from None
    if len(parts) > len(SPLITS) or not all(0 <= part <= 1 for part in parts) or abs(sum(parts) - 1) > 1e-6:
        raise UsageError(f"--split {text!r}: the fractions must sum to 1", hint=hint)
    return tuple(parts + [0.0] * (len(SPLITS) - len(parts)))


def draw_splits(patients: Iterable[str], fractions: Sequence[float], seed: int) -> dict[str, Split]:
    """Draws the split of each patient. It depends on the seed but not on the order of `patients`.

    Patients are shuffled by the seed and divided by `fractions`, rounded as closely as possible. Each fraction above 0
    gets at least one patient if there are enough.
    """
    order = sorted(set(patients), key=lambda name: (drawn_key(name, seed), name))
    counts = shares(len(order), fractions)
    names = [split for split, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
    return dict(zip(order, names, strict=True))


def drawn_remark(fractions: Sequence[float], seed: int, alone: int = 0) -> str:
    """Returns the remark about a random split; `alone` is the number of studies whose patient is unknown."""
    without = f"; {counted(alone, 'study')} without a patient: each counts as one patient" if alone else ""
    parts = ", ".join(f"{100 * part:g}" for part in fractions)
    return f"Split drawn by patient with seed {seed}: {parts} percent{without}."


def drawn_key(name: str, seed: int) -> bytes:
    """Returns the sort key of a patient in the shuffled order."""
    return hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def shares(total: int, fractions: Sequence[float]) -> list[int]:
    """Returns the number of patients in each split; see `draw_splits`."""
    wanted = [index for index, part in enumerate(fractions) if part > 0]
    counts = [int(total * part + 1e-9) for part in fractions]
    # Patients left over by rounding down go to the splits with the largest remainders; ties go to the first split.
    for index in sorted(wanted, key=lambda i: counts[i] - total * fractions[i])[: total - sum(counts)]:
        counts[index] += 1
    for index in wanted:
        fullest = max(range(len(counts)), key=counts.__getitem__)
        if counts[index] == 0 and counts[fullest] > 1:
            counts[index], counts[fullest] = 1, counts[fullest] - 1
    return counts
