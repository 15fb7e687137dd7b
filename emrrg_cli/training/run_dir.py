"""Where a run lives, and whether a directory is free for a new one or fit to be continued."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from emrrg_cli.errors import UsageError
from emrrg_cli.recipe.load import RUN_RECIPE, load_recipe
from emrrg_cli.recipe.schema import Settings

# Settings that may differ when a run is continued: they change where it stops and what is shown, not what it computes.
_FREE = {
    ("output",),
    ("data", "workers"),
    ("train", "stop_after_steps"),
    ("train", "checkpoint_every_steps"),
    ("train", "log_every"),
    ("train", "micro_batch_size"),
    ("train", "patience"),
    ("train", "trackers"),
    ("generation", "batch_size"),
}


def default_run_dir(recipe: str, *, resume: bool = False) -> Path:
    """`runs/<recipe>`: `iu_xray/finetune` goes to `runs/iu_xray-finetune`. To resume, a run's own recipe names it."""
    path = Path(recipe)
    if resume and path.name == RUN_RECIPE and path.is_file():
        return path.parent
    parts = [path.parent.name, path.stem] if path.suffix in (".yaml", ".yml") else list(path.parts)
    return Path("runs") / "-".join(part for part in parts if part)


def check_run_dir(run_dir: Path, settings: Settings, *, resume: bool) -> None:
    """Makes sure that nothing is overwritten and that a run is continued with its own recipe.

    Raises:
        UsageError: when the directory is taken, when there is nothing to resume, or when the recipe has changed.
    """
    saved = run_dir / RUN_RECIPE
    if not resume:
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
            hint = "Give --resume to continue it, or another --output." if saved.is_file() else "Give another --output."
            raise UsageError(f"{run_dir} already exists and is not empty", hint=hint)
        check_writable(run_dir)
        return
    if not saved.is_file():
        raise UsageError(f"{run_dir}: there is no run to resume here", hint="Start it without --resume.")
    check_writable(run_dir)
    before = load_recipe(str(saved), [], stage=getattr(settings, "stage", None)).model_dump()
    changed = [key for key in _differences(before, settings.model_dump()) if key not in _FREE]
    if changed:
        shown = ", ".join(".".join(key) for key in changed[:5])
        raise UsageError(
            f"{run_dir} was started with another recipe: {shown} {'differs' if len(changed) == 1 else 'differ'}",
            hint=f"Resume with the same recipe (it is in {saved}), or start a new run with another --output.",
        )


def check_writable(directory: Path) -> None:
    """Makes sure, before hours of work, that the directory is or can be made and written to. Makes nothing.

    Raises:
        UsageError: when it, or one above it, is a file or may not be written.
    """
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UsageError(f"{directory} cannot be written: {nearest} is a file", hint="Give another --output.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"{directory} cannot be written: no permission in {nearest}", hint="Give another --output.")


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    keys: list[tuple[str, ...]] = []
    for key in sorted(a.keys() | b.keys()):
        one, other = a.get(key), b.get(key)
        if isinstance(one, dict) and isinstance(other, dict) and key != "score_weights":
            keys += _differences(one, other, (*prefix, key))
        elif one != other:
            keys.append((*prefix, key))
    return keys
