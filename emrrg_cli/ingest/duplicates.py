"""Images that a data set holds twice, exactly or nearly.

Chest films are alike: of 1,657 public ones 17 pairs of different films share a 64-bit difference hash. So the hash of
an image is 256 bits of its cosine transform, of which the copies of one film (compressed again, at half the size, with
another contrast) differ in 0 to 14 for nine in ten, and the films of one patient in 34 and more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ImageHash = bytes  # 8 bytes of the file, 32 of the picture

_SIDE, _LOW = 64, 16  # pixels that are transformed, and lowest frequencies that are kept, in each direction
_EXACT_BYTES = 8

# Two pictures of which at most this many bits differ share one of 16 bands of 16 bits.
NEAR = 15
_BANDS = 16
_PAIRS_AT_A_TIME = 2**20

_cosines = np.cos(np.pi * np.outer(np.arange(_LOW), np.arange(_SIDE) + 0.5) / _SIDE)
# Band `b` takes one frequency of each row and each column, so that none holds only what all chests have in common.
_order = np.array([row * _LOW + (row + band) % _LOW for band in range(_BANDS) for row in range(_LOW)])


def hash_image(grey: Image.Image, data: bytes) -> ImageHash:
    """The hash of an image: of the bytes that are written, then of what they show.

    A bit of the second tells whether a coefficient of the discrete cosine transform, one of the 16 x 16 lowest
    frequencies, is above the median of all (the perceptual hash of Zauner 2010 at 256 bits).

    Args:
        grey: Mode `L`.
        data: Its encoded bytes.
    """
    small = np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float64)
    low = (_cosines @ small @ _cosines.T).ravel()
    bits = low > np.median(low[1:])  # the first is the mean brightness
    return hashlib.blake2b(data, digest_size=_EXACT_BYTES).digest() + np.packbits(bits[_order]).tobytes()


@dataclass(frozen=True)
class Duplicate:
    """Image `index` shows what `first` shows, an image that is kept."""

    index: int
    first: int
    exact: bool


def find_duplicates(hashes: bytes, study: NDArray[np.int64], rank: NDArray[np.int64]) -> list[Duplicate]:
    """The duplicate images, each with the image that is kept in its place.

    Kept is what comes first by `rank`, then by its place. Images of one study that are nearly alike are both kept: a
    film may be there in two exposures.

    Args:
        hashes: Of all images, one after the other.
        study: `[n]`, the study of each.
        rank: `[n]`, smaller numbers are kept in preference.

    Returns:
        By `index`.
    """
    if not hashes:
        return []
    table = np.frombuffer(hashes, np.uint8).reshape(len(study), -1)
    exact = np.ascontiguousarray(table[:, :_EXACT_BYTES]).view(np.uint64).ravel()
    order = np.lexsort((np.arange(len(study)), rank))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))

    found: dict[int, Duplicate] = {}
    _, first, inverse = np.unique(exact[order], return_index=True, return_inverse=True)
    firsts = order[first[inverse.ravel()]]
    for index in np.flatnonzero(firsts != order).tolist():
        found[int(order[index])] = Duplicate(int(order[index]), int(firsts[index]), exact=True)

    distinct = order[np.sort(first)]
    neighbours: dict[int, list[int]] = {}
    for a, b in _near_pairs(np.ascontiguousarray(table[distinct, _EXACT_BYTES:])):
        # `distinct` is in the order of preference, so the earlier one may be kept for the later one.
        early, late = sorted((a, b))
        if study[distinct[early]] != study[distinct[late]]:
            neighbours.setdefault(late, []).append(early)
    for late in sorted(neighbours):
        kept = [int(distinct[early]) for early in sorted(neighbours[late]) if int(distinct[early]) not in found]
        if kept:
            found[int(distinct[late])] = Duplicate(int(distinct[late]), kept[0], exact=False)
    # What was to be kept for an exact copy may itself be done without: then so is the copy, for the same image.
    for index, duplicate in list(found.items()):
        if duplicate.exact and duplicate.first in found:
            found[index] = Duplicate(index, found[duplicate.first].first, exact=False)
    return [found[index] for index in sorted(found)]


def _near_pairs(pictures: NDArray[np.uint8]) -> set[tuple[int, int]]:
    """Pairs of rows (uint8 `[n, 32]`) that differ in at most `NEAR` bits."""
    bands = pictures.view(np.uint16)
    words = pictures.view(np.uint64)
    pairs: set[tuple[int, int]] = set()
    for band in range(_BANDS):
        for group in _equal_groups(bands[:, band]):
            for start, stop in _blocks(len(group)):
                differing = np.bitwise_count(words[group[start:stop], None] ^ words[None, group]).sum(-1)
                for a, b in np.argwhere(differing <= NEAR).tolist():
                    if (one := int(group[start + a])) < (other := int(group[b])):
                        pairs.add((one, other))
    return pairs


def _equal_groups(keys: NDArray[np.uint16]) -> Iterator[NDArray[np.int64]]:
    """The places of every key that is there more than once."""
    order = np.argsort(keys, kind="stable")
    ends = np.flatnonzero(np.diff(keys[order])) + 1
    starts = np.concatenate(([0], ends))
    sizes = np.diff(np.concatenate((starts, [len(keys)])))
    for index in np.flatnonzero(sizes > 1).tolist():
        yield order[starts[index] : starts[index] + sizes[index]]


def _blocks(rows: int) -> Iterator[tuple[int, int]]:
    step = max(1, _PAIRS_AT_A_TIME // rows)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)
