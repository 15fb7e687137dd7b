"""The files that `generate` leaves: one record a study, for a whole run or for one of several shards."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.atomic import atomic_write_text
from emrrg_cli.files.output_paths import directory_guard, refuse_links
from emrrg_cli.files.records import append_jsonl, read_jsonl
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.vocabulary import PUBLISHED_PROMPT

Row = dict[str, Any]
_COLUMNS = ["path", "report", "seconds", "notes", "study", "files"]
_SAMPLE_BYTES = 1 << 16
_RESTORE = "Restore it from a copy of the run."
_SHARD_VARIABLES = (("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"), ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"))


@dataclass(frozen=True)
class Shard:
    """One part of several: studies `index`, `index + count`, `index + 2 * count`, ..."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`i/N` with i from 0, or `auto`: from the variables of a Slurm array or an indexed Kubernetes job.

        Raises:
            UsageError: it is neither.
        """
        if text == "auto":
            for index, count in _SHARD_VARIABLES:
                if index in os.environ and count in os.environ:
                    first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", 0)) if index.startswith("SLURM") else 0
                    return cls.parse(f"{int(os.environ[index]) - first}/{os.environ[count]}")
            names = " nor ".join("+".join(pair) for pair in _SHARD_VARIABLES)
            raise UsageError(f"--shard auto: neither {names} is set", hint="Give the shard as i/N, such as 0/4.")
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if match is None or int(match[1]) >= int(match[2]):
            raise UsageError(f"--shard {text!r} is not i/N with i from 0 to N - 1", hint="The first of four is 0/4.")
        return cls(int(match[1]), int(match[2]))

    @property
    def suffix(self) -> str:
        """What its files are called by."""
        return f"-{self.index}-of-{self.count}"


class Output:
    """The files of a run or of a shard in a folder.

    `reports.jsonl.partial` grows study by study; at the end its rows go into `reports.jsonl`.

    Args:
        folder: where they are.
        shard: None: the whole.
        fingerprint: of model and options; records of others are not mixed with ours.
    """

    def __init__(self, folder: Path, shard: Shard | None, fingerprint: str) -> None:
        suffix = "" if shard is None else shard.suffix
        self.folder = folder
        self.shard = shard
        self.fingerprint = fingerprint
        self.reports = folder / f"reports{suffix}.jsonl"
        self.partial = folder / f"reports{suffix}.jsonl.partial"
        self.skipped = folder / f"skipped{suffix}.jsonl"
        self.done_marker = folder / f"reports{suffix}.done"
        self._written = False
        self._require_folder: Callable[[], None] | None = None

    def open(self) -> None:
        """Makes the folder, and sure that what is written stays in it; called by the one process that writes.

        Raises:
            RunError: something in it leads out of it, or is no regular file.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        refuse_links(self.folder, ("reports*", "skipped*", "page.html"))  # others may be in a folder such as "."
        self._require_folder = directory_guard(self.folder)

    def earlier_rows(self) -> list[Row]:
        """What earlier runs with the same model and options wrote, also one that was killed.

        Raises:
            UsageError: there are reports of another model or other options.
        """
        rows: list[Row] = []
        for file in (self.reports, self.partial):
            if not file.exists():
                continue
            found = read_jsonl(file)
            if any(row.get("fingerprint") != self.fingerprint or "study" not in row for row in found):
                where = self.folder if file == self.reports else f"{file}, from a run that was cut short,"
                raise UsageError(
                    f"{where} already holds reports of another model, of other options or of an earlier version",
                    hint="Give --overwrite, or another --output.",
                )
            rows += found
        return list({row["study"]: row for row in rows}.values())

    def append(self, row: Row) -> None:
        """Saves a record at once.

        Raises:
            RunError: it cannot be written, or the folder was removed during the run.
        """
        self._check_there()
        append_jsonl(self.partial, row)
        self._written = True

    def _check_there(self) -> None:
        if self._require_folder is not None and not self._written:
            self._require_folder()
        if self._written and not self.partial.exists():
            raise RunError(
                f"{self.partial} was removed during the run, with the reports in it",
                hint="Run the same command again, and leave the output folder alone until it ends.",
            )

    def finish(self, rows: list[Row], *, keep_partial: bool) -> None:
        """Puts records into `reports.jsonl` (and `reports.csv`, of a whole run); `keep_partial` leaves all as it is.

        Raises:
            RunError: as `append`.
        """
        self._check_there()
        if not rows or keep_partial:
            return
        if self.shard is None:
            atomic_write_text(self.folder / "reports.csv", csv_text(rows))
        atomic_write_text(self.reports, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.partial.unlink(missing_ok=True)


def csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Records as a CSV table."""
    table = io.StringIO()
    writer = csv.DictWriter(table, _COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        joined = {name: "; ".join(row[name]) for name in ("notes", "files") if name in row}
        writer.writerow({**row, **joined})
    return table.getvalue()


def fingerprint_of(run_dir: Path, recipe: FinetuneRecipe) -> str:
    """A hash of a run's weights and of the options that a report depends on.

    Of each weight file its size and 16 samples are read: fast, and other weights of the same shape are told apart.

    Raises:
        RunError: A weight file cannot be read, or is not a regular file.
    """
    digest = hashlib.sha256()
    options = recipe.model_dump(mode="json", include={"model": True, "generation": True, "protocol": True})
    for name in ("batch_size", "engine"):  # a report does not depend on these
        options["generation"].pop(name)
    if options["model"]["prompt"] == PUBLISHED_PROMPT:  # unsaid, as before prompts could be chosen
        options["model"].pop("prompt")
    digest.update(json.dumps(options, sort_keys=True).encode())
    for file in sorted(run_dir.rglob("*.safetensors")):
        if "checkpoints" in file.relative_to(run_dir).parts:
            continue
        try:
            status = file.stat()
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                raise RunError(f"{file} is not a regular file", hint=_RESTORE)
            digest.update(f"{file.relative_to(run_dir)} {status.st_size}\n".encode())
            with file.open("rb") as stream:
                for sample in range(16):
                    stream.seek(max(0, status.st_size - _SAMPLE_BYTES) * sample // 15)
                    digest.update(stream.read(_SAMPLE_BYTES))
        except OSError as error:
            raise RunError(f"{file} cannot be read: {error.strerror or error}", hint=_RESTORE) from error
    return digest.hexdigest()[:16]


def merge_shards(folder: Path) -> list[Row]:
    """Writes `reports.jsonl` and `reports.csv` from the shards of a folder, which stay.

    Raises:
        UsageError: there are no shards, some are missing or not finished, or they are of different models or options.
    """
    shards: dict[int, Path] = {}
    counts: set[int] = set()
    for file in folder.glob("reports-*-of-*.done"):
        if match := re.fullmatch(r"reports-(\d+)-of-(\d+)\.done", file.name):
            shards[int(match[1])] = file.with_suffix(".jsonl")
            counts.add(int(match[2]))
    if not shards:
        raise UsageError(f"{folder}: there are no finished shards", hint="Run `emrrg generate ... --shard i/N` first.")
    if len(counts) > 1:
        raise UsageError(f"{folder}: there are shards of {' and of '.join(map(str, sorted(counts)))}")
    if missing := [index for index in range(counts.pop()) if index not in shards]:
        raise UsageError(f"{folder}: shard {missing[0]} is not finished ({len(missing)} missing)")
    rows: dict[str, Row] = {}
    for index in sorted(shards):
        found = read_jsonl(shards[index]) if shards[index].exists() else []  # one without readable images has none
        rows |= {row["study"]: row for row in found}
    if len({row.get("fingerprint") for row in rows.values()}) > 1:
        raise UsageError(f"{folder}: the shards are of different models or options")
    merged = list(rows.values())
    atomic_write_text(folder / "reports.csv", csv_text(merged))
    atomic_write_text(folder / "reports.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in merged))
    return merged
