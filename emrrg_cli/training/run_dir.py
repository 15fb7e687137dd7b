"""The directory of a run: its default name, and checks before a new or resumed run uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from emrrg_cli.console import printable
from emrrg_cli.errors import UsageError
from emrrg_cli.files.output_paths import check_writable
from emrrg_cli.files.temporary import is_leftover
from emrrg_cli.recipe.common import LoopSettings, Settings
from emrrg_cli.recipe.layers import MAPPINGS
from emrrg_cli.recipe.load import RUN_RECIPE, load_saved_recipe
from emrrg_cli.recipe.paths import with_absolute_paths

R = TypeVar("R", bound=Settings)


# Settings that may differ when a run is continued: they change where it stops and what is shown, not what it computes.
_FREE = {
    ("output",),
    ("data", "workers"),
    ("train", "stop_after_steps"),
    ("train", "checkpoint_every_steps"),
    ("train", "log_every"),
    ("train", "detect_non_finite"),
    ("train", "micro_batch_size"),
    ("train", "patience"),
    ("train", "trackers"),
    ("generation", "batch_size"),
}


def default_run_dir(recipe: str, *, resume: bool = False) -> Path:
    """Returns `runs/iu_xray-finetune` for `iu_xray/finetune`; to resume from a run's `recipe.yaml`, its directory."""
    path = Path(recipe)
    if resume and path.name == RUN_RECIPE and path.is_file():
        return path.parent
    parts = [path.parent.name, path.stem] if path.suffix in (".yaml", ".yml") else list(path.parts)
    return Path("runs") / "-".join(part for part in parts if part)


def first_checkpoint_interval(run_dir: Path, settings: LoopSettings) -> int | None:
    """Returns the `train.checkpoint_every_steps` that the run was started with. `--resume` may change it.

    Args:
        settings: Used if the run has no recipe.
    """
    saved = run_dir / RUN_RECIPE
    if not saved.is_file():
        return settings.checkpoint_every_steps
    train: LoopSettings = load_saved_recipe(run_dir).train  # type: ignore[attr-defined]
    return train.checkpoint_every_steps


def check_run_dir(run_dir: Path, settings: Settings, *, resume: bool) -> None:
    """Checks that nothing is overwritten and that a run is resumed with its own recipe.

    Raises:
        UsageError: The directory is not empty or its path is not UTF-8, there is no run to resume, or the recipe or
            the content of its dataset directories has changed.
        RunError: A record of the run cannot be read.
    """
    saved = run_dir / RUN_RECIPE
    if (shown := printable(str(run_dir.absolute()))) != str(run_dir.absolute()):  # a run records its path
        raise UsageError(f"the path of a run must be UTF-8 text, got {shown}", hint="Give another --output.")
    if not resume:
        if run_dir.exists() and (not run_dir.is_dir() or any(not is_leftover(entry) for entry in run_dir.iterdir())):
            hint = "Give --resume to continue it, or another --output." if saved.is_file() else "Give another --output."
            raise UsageError(f"{run_dir} already exists and is not empty", hint=hint)
        check_writable(run_dir)
        return
    if not saved.is_file():
        raise UsageError(f"{run_dir}: there is no run to resume here", hint="Start it without --resume.")
    check_writable(run_dir)
    before = with_absolute_paths(load_saved_recipe(run_dir, getattr(settings, "stage", None))).model_dump()
    now = with_absolute_paths(settings)
    changed = [key for key in _differences(before, now.model_dump()) if key not in _FREE]
    if changed and {*changed} <= {("data", "root"), ("data", "sets")} and _has_moved(run_dir, before, now):
        return
    if changed:
        shown = ", ".join(".".join(key) for key in changed[:5])
        raise UsageError(
            f"{run_dir} was started with another recipe: {shown} {'differs' if len(changed) == 1 else 'differ'}",
            hint=f"Resume with the same recipe (it is in {saved}), or start a new run with another --output.",
        )
    _check_data(run_dir, now)


def _check_data(run_dir: Path, recipe: Settings) -> None:
    from emrrg_cli.training.environment import first_environment  # imports torch

    recorded = (first_environment(run_dir) or {}).get("data")
    if recorded is None:
        return
    for root, fingerprint in data_fingerprints(recipe).items():
        if recorded.get(root, fingerprint) != fingerprint:
            raise UsageError(
                f"the data in {root} has changed since {run_dir} was started",
                hint="Restore the dataset directory, or start a new run with another --output.",
            )


def _has_moved(run_dir: Path, before: dict[str, Any], now: Settings) -> bool:
    """Whether the data sets are those of the run in other directories, as on clusters that copy them for each job."""
    from emrrg_cli.training.environment import first_environment  # imports torch

    recorded = (first_environment(run_dir) or {}).get("data") or {}

    def by_content(recipe: dict[str, Any], fingerprints: dict[str, str]) -> list[dict[str, Any]]:
        data = recipe["data"]
        return [{**one, "root": fingerprints.get(one["root"], one["root"])} for one in (data, *data.pop("sets", []))]

    return bool(recorded) and by_content(before, recorded) == by_content(now.model_dump(), data_fingerprints(now))


def data_fingerprints(recipe: Settings) -> dict[str, str]:
    """Returns the fingerprint of each dataset directory of a recipe by absolute path; folders of images have none.

    Raises:
        UsageError: A directory does not exist.
        RunError: A directory cannot be read.
    """
    from emrrg_cli.datasets.fingerprint import dataset_fingerprint
    from emrrg_cli.datasets.manifest import is_dataset_dir

    data = with_absolute_paths(recipe).model_dump()["data"]
    roots = [one["root"] for one in (data, *data.get("sets", []))]
    plain = {root for root in roots if root is not None and Path(root).is_dir() and not is_dataset_dir(root)}
    return {root: dataset_fingerprint(root) for root in roots if root is not None and root not in plain}


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    keys: list[tuple[str, ...]] = []
    for key in sorted(a.keys() | b.keys()):
        one, other = a.get(key), b.get(key)
        if isinstance(one, dict) and isinstance(other, dict) and key not in MAPPINGS:
            keys += _differences(one, other, (*prefix, key))
        elif one != other:
            keys.append((*prefix, key))
    return keys
