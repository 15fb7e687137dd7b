"""The table of training stages, for all code outside the modules of a stage.

A stage has an entry in `STAGES`, a recipe class (`recipe/`), a runner (`training/`), a command (`commands/training.py`)
and at least one shipped recipe. Classes and runners are named, not imported, so that the command line starts without
torch and pydantic.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class TrainingStage:
    """One training stage.

    Attributes:
        recipe: Its recipe class, as `module:name`.
        runner: `runner(recipe, run_dir, *, resume, expected_processes, verbose) -> Summary`, as `module:name`.
        next_commands: What can be run afterwards; `{run}` stands for the run directory.
    """

    recipe: str
    runner: str
    next_commands: tuple[str, ...]

    def load_recipe_class(self) -> Any:
        """The recipe class."""
        return _load(self.recipe)

    def load_runner(self) -> Any:
        """The function that trains."""
        return _load(self.runner)

    def what_next(self, run: str) -> str:
        """The lines that tell which commands to run next, for a run directory that is already quoted for a shell."""
        commands = (command.format(run=run) for command in self.next_commands)
        return "Next:  " + "\n       ".join(commands)


_ALIGN = "emrrg align RECIPE model.encoder.weights={run}"
_FINETUNE = "emrrg finetune RECIPE model.encoder.weights={run}"

# In the order of the work.
STAGES: dict[str, TrainingStage] = {
    "pretrain": TrainingStage(
        "emrrg_cli.recipe.pretraining:PretrainRecipe", "emrrg_cli.training.pretrain:run_pretrain", (_ALIGN, _FINETUNE)
    ),
    "align": TrainingStage(
        "emrrg_cli.recipe.alignment:AlignRecipe", "emrrg_cli.training.align:run_align", (_FINETUNE,)
    ),
    "finetune": TrainingStage(
        "emrrg_cli.recipe.finetuning:FinetuneRecipe",
        "emrrg_cli.training.finetune:run_finetune",
        ("emrrg evaluate --model {run}", "emrrg generate IMAGES --model {run}"),
    ),
}


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
