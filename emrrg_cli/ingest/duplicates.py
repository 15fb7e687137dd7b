"""Finds images that a data set contains twice, exactly or nearly.

Chest films look similar: among 1,657 public films, 17 pairs of different films share a 64-bit difference hash. The hash
of an image is therefore 256 bits of its cosine transform. Copies of one film (compressed again, at half the size, with
another contrast) differ in 0 to 14 bits in nine of ten cases; different films of one patient differ in 34 or more.
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

# Two pictures that differ in at most this many bits have one of 16 bands of 16 bits in common.
NEAR = 15
_BANDS = 16
_PAIRS_AT_A_TIME = 2**20

_cosines = np.cos(np.pi * np.outer(np.arange(_LOW), np.arange(_SIDE) + 0.5) / _SIDE)
# Band `b` takes one frequency of each row and each column, so that no band has only features that all chests share.
_order = np.array([row * _LOW + (row + band) % _LOW for band in range(_BANDS) for row in range(_LOW)])


def hash_image(grey: Image.Image, data: bytes) -> ImageHash:
    """Hashes an image: first its encoded bytes, then its content.

    Each bit of the second hash tells whether one of the 16 x 16 lowest coefficients of the discrete cosine transform is
    above their median (the perceptual hash of Zauner 2010 with 256 bits).

    Args:
        grey: The image, mode `L`.
        data: The encoded bytes of the image.
    """
    small = np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float64)
    low = (_cosines @ small @ _cosines.T).ravel()
    bits = low > np.median(low[1:])  # the first is the mean brightness
    return hashlib.blake2b(data, digest_size=_EXACT_BYTES).digest() + np.packbits(bits[_order]).tobytes()


@dataclass(frozen=True)
class Duplicate:
    """Image `index` is a duplicate of `first`, which is kept."""

    index: int
    first: int
    exact: bool


def find_duplicates(hashes: bytes, study: NDArray[np.int64], rank: NDArray[np.int64]) -> list[Duplicate]:
    """Finds duplicate images, each with the image that is kept instead.

    The image with the lowest `rank`, then the lowest index, is kept. Nearly equal images of one study are both kept,
    because a study may have a film in two exposures.

    Args:
        hashes: The hashes of all images, concatenated.
        study: `[n]`, the study of each image.
        rank: `[n]`, images with smaller numbers are kept first.

    Returns:
        The duplicates, sorted by `index`.
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
        # `distinct` is in the order of preference, so the earlier image is kept instead of the later one.
        early, late = sorted((a, b))
        if study[distinct[early]] != study[distinct[late]]:
            neighbours.setdefault(late, []).append(early)
    for late in sorted(neighbours):
        kept = [int(distinct[early]) for early in sorted(neighbours[late]) if int(distinct[early]) not in found]
        if kept:
            found[int(distinct[late])] = Duplicate(int(distinct[late]), kept[0], exact=False)
    # The image kept instead of an exact copy may itself be a near duplicate: then both refer to the same kept image.
    for index, duplicate in list(found.items()):
        if duplicate.exact and duplicate.first in found:
            found[index] = Duplicate(index, found[duplicate.first].first, exact=False)
    return [found[index] for index in sorted(found)]


def _near_pairs(pictures: NDArray[np.uint8]) -> set[tuple[int, int]]:
    """Finds the pairs of rows (uint8 `[n, 32]`) that differ in at most `NEAR` bits."""
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
    """Yields the indices of each key that occurs more than once."""
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
