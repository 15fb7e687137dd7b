"""Divides studies among several machines."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emrrg_cli.errors import UsageError

if TYPE_CHECKING:
    from emrrg_cli.decoding.studies import StudyFiles

_SHARD_VARIABLES = (("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"), ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"))


@dataclass(frozen=True)
class Shard:
    """One part of several: studies `index`, `index + count`, `index + 2 * count`, ..."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parses `i/N` with i from 0, or `auto`: from the variables of a Slurm array or an indexed Kubernetes job.

        Raises:
            UsageError: the text is neither.
        """
        if text == "auto":
            for index, count in _SHARD_VARIABLES:
                if index in os.environ and count in os.environ:
                    return cls._of_job(index, count)
            names = " nor ".join("+".join(pair) for pair in _SHARD_VARIABLES)
            raise UsageError(f"--shard auto: neither {names} is set", hint="Give the shard as i/N, such as 0/4.")
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
        if match is None or int(match[1]) >= int(match[2]):
            raise UsageError(f"--shard {text!r} is not i/N with i from 0 to N - 1", hint="The first of four is 0/4.")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def _of_job(cls, index: str, count: str) -> Shard:
        first, step = ("SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP") if index.startswith("SLURM") else ("", "")
        try:
            number = (int(os.environ[index]) - int(os.environ.get(first, 0))) // int(os.environ.get(step, 1))
            shard = cls(number, int(os.environ[count]))
        except (ValueError, ZeroDivisionError):
            shard = cls(-1, 0)
        if not 0 <= shard.index < shard.count:
            names = [name for name in (index, count, first, step) if name in os.environ]
            variables = ", ".join(f"{name}={os.environ[name]}" for name in names)
            raise UsageError(
                f"--shard auto cannot tell which shard this job is from {variables}",
                hint="Give the shard as i/N, such as 0/4.",
            )
        return shard

    def part(self, studies: Sequence[StudyFiles]) -> list[StudyFiles]:
        """Returns the studies of this shard."""
        return list(studies[self.index :: self.count])

    @property
    def suffix(self) -> str:
        """The part of file names that identifies the shard."""
        return f"-{self.index}-of-{self.count}"
