"""A fingerprint of a model and of its options: reports with different ones are not mixed in an output."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

from emrrg_cli.errors import RunError
from emrrg_cli.recipe.finetuning import FinetuneRecipe

_SAMPLE_BYTES = 1 << 16
_RESTORE = "Restore it from a copy of the run."


def fingerprint_of(run_dir: Path, recipe: FinetuneRecipe) -> str:
    """Returns a hash of a run's weights and of the options that a report depends on.

    Only the size and 16 samples of each weight file are read: this is fast and detects other weights of the same shape.

    Raises:
        RunError: A weight file cannot be read, or is not a regular file.
    """
    digest = hashlib.sha256()
    # Defaults are left out, so that a new setting in a later version does not change the hash.
    named = {"model", "generation", "protocol"}
    options = recipe.model_dump(mode="json", include=named, exclude_defaults=True)
    if recipe.data.max_views is not None:
        options["data"] = {"max_views": recipe.data.max_views}
    if recipe.generation.engine != "transformers" or not recipe.generation.do_sample:
        # Reports do not depend on these, except that transformers draws all samples of a batch with one generator.
        for name in ("batch_size", "engine"):
            options.get("generation", {}).pop(name, None)
    digest.update(json.dumps(options, sort_keys=True).encode())
    for file in sorted(run_dir.rglob("*.safetensors")):
        if "checkpoints" in file.relative_to(run_dir).parts:
            continue
        try:
            status = file.stat()
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
                raise RunError(f"{file} is not a regular file", hint=_RESTORE)
            digest.update(f"{file.relative_to(run_dir)} {status.st_size}\n".encode())
            with file.open("rb") as stream:
                for sample in range(16):
                    stream.seek(max(0, status.st_size - _SAMPLE_BYTES) * sample // 15)
                    digest.update(stream.read(_SAMPLE_BYTES))
        except OSError as error:
            raise RunError(f"{file} cannot be read: {error.strerror or error}", hint=_RESTORE) from error
    return digest.hexdigest()[:16]
