"""A trained run whose reports differ from film to film."""

from __future__ import annotations

import shutil
from pathlib import Path


def varied_copy(source: Path, run: Path) -> None:
    """Copies a run, and varies the copy."""
    shutil.copytree(source, run)
    vary(run)


def vary(run: Path) -> None:
    """Makes weights so large that most films get a text of their own: with one text for all, nothing is compared."""
    from safetensors.torch import load_file, save_file

    from emrrg_cli.checksums import write_checksums

    for name, factor in (("encoder", 30), ("llm/model", 50), ("bridge", 50)):
        file = run / "model" / f"{name}.safetensors"
        tensors = load_file(file)
        for key, tensor in tensors.items():
            if "proj" in key or key == "patch_embed.weight":
                tensor *= factor
            elif key.endswith("warmup"):  # opens the gates of the hybrid layers
                tensor.fill_(1.0)
        save_file(tensors, file, {"format": "pt"})
    write_checksums(run / "model")
