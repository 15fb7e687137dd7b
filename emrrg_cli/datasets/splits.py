"""A split drawn by seed, with all studies of a patient on one side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from emrrg_cli.errors import UsageError
from emrrg_cli.vocabulary import SPLITS, Split

DEFAULT = "0.8,0.1,0.1"


def parse_fractions(text: str) -> tuple[float, ...]:
    """`0.8,0.1,0.1` as the parts of train, validation and test; parts left out are 0.

    Raises:
        UsageError: They are not one to three numbers from 0 to 1 that sum to 1.
    """
    hint = f"Give the parts of train, validation and test, such as {DEFAULT}."
    try:
        parts = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--split {text!r} is not a list of numbers", hint=hint) from None
    if len(parts) > len(SPLITS) or not all(0 <= part <= 1 for part in parts) or abs(sum(parts) - 1) > 1e-6:
        raise UsageError(f"--split {text!r}: the parts must sum to 1", hint=hint)
    return tuple(parts + [0.0] * (len(SPLITS) - len(parts)))


def draw_splits(patients: Iterable[str], fractions: Sequence[float], seed: int) -> dict[str, Split]:
    """The split of each patient: the same for a seed, whatever order they come in.

    Patients are put in an order drawn from the seed and cut by `fractions`, rounded so that the parts are as near as
    they can be; a part above 0 gets one patient at least, while there are enough.
    """
    order = sorted(set(patients), key=lambda name: (drawn_key(name, seed), name))
    counts = shares(len(order), fractions)
    names = [split for split, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
    return dict(zip(order, names, strict=True))


def drawn_remark(fractions: Sequence[float], seed: int, alone: int = 0) -> str:
    """The remark about a drawn split; `alone` is the number of studies whose patient is not known."""
    without = f"; studies without a patient ({alone:,}) count as patients of their own" if alone else ""
    parts = ", ".join(f"{100 * part:g}" for part in fractions)
    return f"Split drawn by patient with seed {seed}: {parts} percent{without}."


def drawn_key(name: str, seed: int) -> bytes:
    """Where a patient stands in the order that a split is cut from."""
    return hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def shares(total: int, fractions: Sequence[float]) -> list[int]:
    """How many of the patients each split gets; see `draw_splits`."""
    wanted = [index for index, part in enumerate(fractions) if part > 0]
    counts = [int(total * part + 1e-9) for part in fractions]
    # What rounding down left over goes to the largest remainders, the first split first.
    for index in sorted(wanted, key=lambda i: counts[i] - total * fractions[i])[: total - sum(counts)]:
        counts[index] += 1
    for index in wanted:
        fullest = max(range(len(counts)), key=counts.__getitem__)
        if counts[index] == 0 and counts[fullest] > 1:
            counts[index], counts[fullest] = 1, counts[fullest] - 1
    return counts
