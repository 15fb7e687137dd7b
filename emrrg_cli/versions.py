"""Versions of installed packages, from their metadata: importing a package may take seconds, or need a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata


def installed_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Returns versions by distribution name; None if it is not installed, such as `emrrg` in a bare checkout."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
