"""The fingerprint of a run's weights and options, which stands in every record of `generate`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from emrrg_cli.decoding.outputs import fingerprint_of
from emrrg_cli.errors import RunError
from emrrg_cli.recipe.load import load_run_recipe


def _fingerprint(run: Path, *changes: str) -> str:
    return fingerprint_of(run, load_run_recipe(run, None, changes, "generate"))


@pytest.mark.skipif(os.name != "posix", reason="special files")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "is not a regular file"),
        (lambda file: file.symlink_to("/dev/zero"), "is not a regular file"),
        (Path.mkdir, "is not a regular file"),
        (lambda file: file.symlink_to(file.with_name("gone")), "cannot be read: No such file"),
    ],
    ids=["pipe", "device", "folder", "broken link"],
)
def test_weights_that_are_no_file_are_refused(
    tiny_run: Path, tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    file = run / "model" / "bridge.safetensors"
    file.unlink()
    make(file)
    with pytest.raises(RunError, match=reason):
        _fingerprint(run)


def test_other_weights_have_another_fingerprint(tiny_run: Path, varied_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "copy")
    assert _fingerprint(tmp_path / "copy") == _fingerprint(tiny_run)
    assert _fingerprint(varied_run) != _fingerprint(tiny_run)


def test_options_that_change_reports_change_the_fingerprint(tiny_run: Path) -> None:
    plain = _fingerprint(tiny_run)
    assert _fingerprint(tiny_run, "generation.batch_size=2", "generation.engine=transformers") == plain
    assert _fingerprint(tiny_run, "generation.length_penalty=1.5") != plain
    recipe = load_run_recipe(tiny_run, None, [], "generate")
    told = recipe.model_copy(update={"model": recipe.model.model_copy(update={"findings_threshold": 0.2})})
    assert fingerprint_of(tiny_run, told) != plain
