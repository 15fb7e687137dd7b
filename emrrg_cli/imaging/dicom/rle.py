"""Checks the length of run-length encoded DICOM data without decoding them."""

from __future__ import annotations


def runs_exceed(segment: memoryview, size: int) -> bool:
    """Whether a segment decodes to more than `size` bytes; 128 more are accepted, because the last run may be too long.

    Source: PS3.5 G.3.1.
    """
    total = at = 0
    while at < len(segment):
        run = segment[at]
        if run > 128:
            total, at = total + 257 - run, at + 2
        elif run < 128:
            total, at = total + run + 1, at + run + 2
        else:
            at += 1
        if total > size + 128:
            return True
    return False
