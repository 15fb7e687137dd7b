"""The output files of `generate`: one record per study, for a whole run or for one of several shards."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from emrrg_cli.console import counted
from emrrg_cli.decoding.shards import Shard
from emrrg_cli.decoding.stamps import any_changed
from emrrg_cli.decoding.studies import StudyFiles, path_name
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.atomic import atomic_file
from emrrg_cli.files.output_paths import directory_guard, refuse_links
from emrrg_cli.files.records import append_jsonl, iterate_jsonl, jsonl_line
from emrrg_cli.files.spreadsheets import spreadsheet_writer
from emrrg_cli.reporting.tables import DISCLAIMER

Row = dict[str, Any]
_COLUMNS = ["path", "report", "seconds", "notes", "study", "files", "disclaimer"]
_REPLACED = ("reports.csv", "page.html")
_MOST_FILES = 1 << 20  # shards of a run
_MOST_OPEN = 100  # of these files open at a time


class Output:
    """The files of a run or of a shard in a folder.

    `reports.jsonl.partial` (`reports-new.jsonl.partial` if earlier reports are replaced) grows study by study; at the
    end its rows go into `reports.jsonl`. Only the positions of records in these files are kept in memory.

    Args:
        folder: folder of the files.
        shard: the shard; None: the whole run.
        fingerprint: fingerprint of model and options; records with another fingerprint are not mixed in.
    """

    def __init__(self, folder: Path, shard: Shard | None, fingerprint: str) -> None:
        suffix = "" if shard is None else shard.suffix
        self.folder = folder
        self.shard = shard
        self.fingerprint = fingerprint
        self.reports = folder / f"reports{suffix}.jsonl"
        self.partial = folder / f"reports{suffix}.jsonl.partial"
        self.replacement = folder / f"reports-new{suffix}.jsonl.partial"
        self._partials = (self.partial, self.replacement)
        self.replaces = False  # whether this run replaces earlier reports
        self.skipped = folder / f"skipped{suffix}.jsonl"
        self.skipped_partial = folder / f"skipped{suffix}.jsonl.partial"
        self.done_marker = folder / f"reports{suffix}.done"
        self.records = RecordIndex()
        self._owners: dict[str, str] | None = None  # study of each file of this run
        self._written = self._begun = False
        self._require_folder: Callable[[], None] | None = None

    def open(self) -> None:
        """Creates the folder and checks that no link leads out of it; only the writing process calls this.

        Raises:
            RunError: an entry is a link out of the folder or not a regular file.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        refuse_links(self.folder, ("reports*", "skipped*", "page*"))  # a folder such as "." may have other files
        self._require_folder = directory_guard(self.folder)

    def find_earlier(self, studies: Sequence[StudyFiles], *, overwrite: bool = False) -> int:
        """Finds the records of earlier runs with the same model and options, including killed runs.

        A run with `overwrite` that was stopped is continued, also without the option, if its studies are in this run
        with the same context. Otherwise `overwrite` finds none.

        Args:
            studies: the studies of this run.
            overwrite: whether earlier reports are replaced.

        Returns:
            Number of records that are left out, because the files of their studies have changed.

        Raises:
            UsageError: there are reports of another model, other options, another context or another grouping of the
                files, or files of the user that this run would replace.
        """
        current, changed = {study.name: study for study in studies}, set()
        continues = self._continues_replacement(current)
        self.replaces = continues or (overwrite and self.reports.exists())
        earlier = (self.replacement,) if continues else () if overwrite else (self.reports, self.partial)
        if self.replaces:
            self.partial = self.replacement
        foreign = [name for name in _REPLACED if (self.folder / name).exists()]
        if foreign and self.shard is None and not overwrite and not any(self.folder.glob("reports*.jsonl*")):
            raise UsageError(
                f"{self.folder / foreign[0]} exists without reports beside it, so it may be a file of your own",
                hint="Give another --output, or --overwrite to replace it.",
            )
        for file in earlier:
            if not file.exists():
                continue
            for begin, row in iterate_jsonl(file):
                if row.get("fingerprint") != self.fingerprint or "study" not in row:
                    where = self.folder if file == self.reports else f"{file}, from an interrupted run,"
                    raise UsageError(
                        f"{where} already holds reports of another model, of other options or of an earlier version",
                        hint="Give --overwrite, or another --output.",
                    )
                name = str(row["study"])
                files = [*row.get("files", ()), *row.get("unused_files", ())]
                if (study := current.get(name)) is None:
                    self._refuse_regrouped(name, files, studies)
                elif sorted(files) != sorted(map(path_name, study.files)) or any_changed(
                    study.files, dict(zip(files, row.get("stamps", ()), strict=False))
                ):
                    changed.add(name)
                    continue
                elif row.get("context", {}) != study.context:
                    raise UsageError(
                        f"{self.folder} already holds a report of {name} that was written with another context",
                        hint="Give --overwrite, or another --output.",
                    )
                self.records.add(name, file, begin)
        return sum(name not in self.records for name in changed)

    def _continues_replacement(self, current: Mapping[str, StudyFiles]) -> bool:
        rows = iterate_jsonl(self.replacement) if self.replacement.exists() else iter(())
        own = [
            row.get("fingerprint") == self.fingerprint
            and (study := current.get(str(row.get("study")))) is not None
            and row.get("context", {}) == study.context
            for _, row in rows
        ]
        return bool(own) and all(own)

    def _refuse_regrouped(self, name: str, files: Iterable[str], studies: Sequence[StudyFiles]) -> None:
        # Otherwise the reports of the old study and of the new study with the same images would both be kept.
        if self._owners is None:
            self._owners = {path_name(file): study.name for study in studies for file in study.files}
        if file := next((file for file in files if file in self._owners), None):
            raise UsageError(
                f"{self.folder} already holds a report of study {name}, but its image {file} is now in study "
                f"{self._owners[file]}",
                hint="Group the images as before (--study-by, --table), or give --overwrite or another --output.",
            )

    @property
    def is_whole(self) -> bool:
        """Whether the records that were found are already in their final files."""
        lacking = self.shard is None and len(self.records) > 0 and not (self.folder / "reports.csv").exists()
        return not (self.partial.exists() or lacking)

    def begin(self) -> None:
        """Removes unfinished files of earlier runs that this run does not continue."""
        if not len(self.records):
            self.partial.unlink(missing_ok=True)
        if not self.replaces:
            self.replacement.unlink(missing_ok=True)
        self._begun = True
        self.skipped_partial.unlink(missing_ok=True)
        self.done_marker.unlink(missing_ok=True)

    def append(self, row: Row) -> None:
        """Saves a record at once.

        Raises:
            RunError: the file cannot be written, or the folder was removed during the run.
        """
        self._check_there()
        self.records.add(row["study"], self.partial, append_jsonl(self.partial, row))
        self._written = True

    def append_skipped(self, path: str, reason: str) -> None:
        """Saves the path of a file that could not be read, and the reason.

        Raises:
            RunError: as `append`.
        """
        self._check_there()
        append_jsonl(self.skipped_partial, {"path": path, "reason": reason})

    def _check_there(self) -> None:
        if self._require_folder is not None and not self._written:
            self._require_folder()
        if self._written and not self.partial.exists():
            raise RunError(
                f"{self.partial} was removed during the run, with the reports in it",
                hint="Run the same command again, and leave the output folder alone until it ends.",
            )

    def finish(self, order: Iterable[str], *, keep_partial: bool) -> None:
        """Writes `reports.jsonl` (and `reports.csv` for a whole run); with `keep_partial`, changes nothing.

        Args:
            order: names of studies; records of other studies come first.

        Raises:
            RunError: as `append`.
        """
        self._check_there()
        if keep_partial:
            return
        if self.skipped_partial.exists():
            self.skipped_partial.replace(self.skipped)
        elif self._begun:
            self.skipped.unlink(missing_ok=True)
        if len(self.records):
            write_reports(self.reports, self.records.rows(order), with_table=self.shard is None)
            for file in self._partials:
                file.unlink(missing_ok=True)


class RecordIndex:
    """The positions of the newest record of each study in JSON-lines files; about 100 bytes per study."""

    def __init__(self) -> None:
        self._files: list[Path] = []
        self._places: dict[str, int] = {}  # begin * _MOST_FILES + number of the file

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, study: str) -> bool:
        return study in self._places

    def add(self, study: str, file: Path, begin: int) -> None:
        """Adds the record of a study; it replaces an earlier one."""
        if file not in self._files:
            self._files.append(file)
        self._places[study] = begin * _MOST_FILES + self._files.index(file)

    def rows(self, order: Iterable[str]) -> Iterator[Row]:
        """Yields the records: first those of studies that are not in `order`, then the others in that order."""
        named = dict.fromkeys(order)
        with ExitStack() as stack:
            opened: dict[int, BinaryIO] = {}
            for study in (*(name for name in self._places if name not in named), *named):
                if study not in self._places:
                    continue
                begin, number = divmod(self._places[study], _MOST_FILES)
                if number not in opened:
                    if len(opened) == _MOST_OPEN:
                        stack.close()
                        opened.clear()
                    opened[number] = stack.enter_context(self._files[number].open("rb"))
                opened[number].seek(begin)
                yield json.loads(opened[number].readline())


def write_reports(reports: Path, rows: Iterable[Row], *, with_table: bool) -> int:
    """Writes records one at a time; `with_table` also writes `reports.csv` beside them. Returns their number.

    Raises:
        RunError: a file cannot be written; earlier files are unchanged.
    """
    count = 0
    with ExitStack() as stack:
        lines = stack.enter_context(atomic_file(reports))
        write = None
        if with_table:
            file = stack.enter_context(atomic_file(reports.with_name("reports.csv")))
            write = spreadsheet_writer(stack.enter_context(_text(file)), _COLUMNS)
        for row in rows:
            lines.write(jsonl_line(row))
            if write is not None:
                disclaimer = DISCLAIMER if "limits" not in row else f"{DISCLAIMER} Note: {row['limits']}."
                joined = {name: "; ".join(row[name]) for name in ("notes", "files") if name in row}
                cells = row | joined | {"disclaimer": disclaimer}
                write(cells.get(name, "") for name in _COLUMNS)
            count += 1
    return count


@contextmanager
def _text(file: BinaryIO) -> Iterator[io.TextIOWrapper]:
    # A text writer for a binary file that stays open.
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    yield text
    text.detach()


def merge_shards(folder: Path, *, overwrite: bool = False) -> int:
    """Writes `reports.jsonl` and `reports.csv` from the shards of a folder; returns the number of records.

    Args:
        overwrite: also replace a `reports.jsonl` with studies that the shards do not have.

    Raises:
        UsageError: there are no shards, some are missing, unfinished or not whole, they have different models or
            options, or `reports.jsonl` has other studies.
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
        raise UsageError(
            f"{folder}: the shards are of runs with different numbers of shards: {', '.join(map(str, sorted(counts)))}",
            hint="Keep the files of one of these runs, and move those of the others away.",
        )
    [count] = counts
    if missing := [index for index in range(count) if index not in shards]:
        raise UsageError(
            f"{folder}: {counted(len(missing), 'shard')} of {count} not finished: {', '.join(map(str, missing[:10]))}",
            hint=f"Run it again: emrrg generate ... --shard {missing[0]}/{count}",
        )
    if max(shards) >= count:
        raise UsageError(f"{folder}: shard {max(shards)} of {count} cannot exist", hint="Shards count from 0.")
    records, fingerprints = RecordIndex(), set()
    for index in sorted(shards):
        before = len(records)
        # A shard without readable images has no file.
        for begin, row in iterate_jsonl(shards[index]) if shards[index].exists() else ():
            records.add(str(row["study"]), shards[index], begin)
            fingerprints.add(row.get("fingerprint"))
        recorded = re.match(r"([\d,]+) report", shards[index].with_suffix(".done").read_text())
        if recorded and int(recorded[1].replace(",", "")) != len(records) - before:
            raise UsageError(
                f"{shards[index]} has {len(records) - before} reports, but the shard wrote {recorded[1]}",
                hint=f"Run this shard again: --shard {index}/{count}.",
            )
    if len(fingerprints) > 1:
        raise UsageError(
            f"{folder}: the shards were written by different models or with different options",
            hint="Run all shards again with the same command, apart from --shard.",
        )
    whole = folder / "reports.jsonl"
    if whole.exists() and not overwrite:
        for _, row in iterate_jsonl(whole):
            if str(row.get("study")) not in records:
                raise UsageError(
                    f"{whole} has reports of studies that the shards do not have, such as {row.get('study')}",
                    hint="Give --overwrite to replace it.",
                )
    return write_reports(whole, records.rows(()), with_table=True)
