"""Versions of what is installed, from its metadata: importing a package may take seconds, or need a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata


def installed_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Version by distribution name; None where it is not installed, as `emrrg` itself is not in a bare checkout."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
