"""The two consoles of the program: results go to `out` (stdout), everything else to `err` (stderr)."""

from __future__ import annotations

from rich.console import Console

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
