"""Writes reports for the studies in files and folders."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from emrrg_cli.console import counted, progress_bar
from emrrg_cli.decoding.cards import NO_PAGE, PAGE, PageOptions, StudyCard
from emrrg_cli.decoding.fingerprint import fingerprint_of
from emrrg_cli.decoding.gallery import Gallery
from emrrg_cli.decoding.outputs import Output, Row
from emrrg_cli.decoding.processes import write_in_processes
from emrrg_cli.decoding.reports import load_generator
from emrrg_cli.decoding.shards import Shard
from emrrg_cli.decoding.studies import StudyFiles
from emrrg_cli.decoding.study_records import StudyResult, StudyWriter, reading_processes
from emrrg_cli.default_model import read_limits
from emrrg_cli.files.atomic import atomic_write_text
from emrrg_cli.files.locks import locked
from emrrg_cli.files.output_paths import check_writable
from emrrg_cli.files.records import iterate_jsonl
from emrrg_cli.models.film_distance import UNLIKE
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.runtime import fit_threads
from emrrg_cli.signals import interrupted_by
from emrrg_cli.silence_libraries import silence_libraries

LISTED = 10  # number of skipped files and notes kept for the terminal


@dataclass
class Written:
    """Result of `run_generation`. Records stay in their file; only the first skipped files and notes are here."""

    records: Path  # file with the records, including those of earlier runs
    skipped_file: Path  # list of all skipped files
    reports: int = 0  # number of records, including earlier ones
    of_call: int = 0  # number of records of the studies of this call
    written: int = 0  # number of records that this call wrote
    changed: int = 0  # number of records of earlier runs that are not kept, because the files of the studies changed
    skipped: int = 0  # number of skipped files
    first_skipped: list[tuple[str, str]] = field(default_factory=list)  # path and reason
    noted: int = 0  # number of new records with notes
    unlike: int = 0  # number of new records with films unlike the training films
    first_noted: list[tuple[str, str]] = field(default_factory=list)  # path and notes
    seconds: float = 0.0

    @property
    def earlier(self) -> int:
        """Number of records of earlier runs."""
        return self.reports - self.written

    def rows(self) -> Iterator[Row]:
        """Yields the records, one at a time."""
        return (row for _, row in iterate_jsonl(self.records)) if self.reports else iter(())

    def skipped_rows(self) -> Iterator[dict[str, Any]]:
        """Yields the skipped files, `path` and `reason`, one at a time."""
        return (row for _, row in iterate_jsonl(self.skipped_file)) if self.skipped else iter(())


@dataclass(frozen=True)
class Machine:
    """The device, as in `--device`, and the number of processes."""

    device: str = "auto"
    processes: int = 1


def run_generation(
    studies: Sequence[StudyFiles],
    run_dir: Path,
    recipe: FinetuneRecipe,
    output: Path,
    *,
    machine: Machine = Machine(),
    overwrite: bool = False,
    shard: Shard | None = None,
    page: PageOptions = PAGE,
) -> Written:
    """Writes a report for each study with a readable image into `reports.jsonl` (and `reports.csv`, `page.html`).

    Each record is saved at once in `reports.jsonl.partial`, which becomes `reports.jsonl` at the end, also after an
    interruption. Studies that an earlier run with the same model and options has written are skipped, unless their
    files have changed. With `overwrite`, earlier reports are replaced only after the new run completes.

    Args:
        studies: studies with contexts for the prompt (`with_contexts`).
        shard: write only this part of the studies, into separate files, with a `.done` file at the end and no page.
        page: options of the page.

    Raises:
        UsageError: if `output` has reports of another model, other options, another context or another grouping of
            the files and `overwrite` is false, or if it is a file.
        RunError: if the output is read-only, another process writes there, the model cannot be loaded, a process was
            ended, or the output was removed or contains a link to another place.
        Interrupted: after SIGINT or SIGTERM; reports written so far are kept.
    """
    check_writable(output)
    place = Output(output, shard, fingerprint_of(run_dir, recipe))
    with locked(output if shard is None else place.reports):
        place.open()
        own = list(studies) if shard is None else shard.part(studies)
        shown = page if shard is None else NO_PAGE
        return _Run(own, run_dir, recipe, place, Gallery(place, run_dir, recipe, shown), overwrite).run(machine)


class _Run:
    def __init__(
        self,
        studies: list[StudyFiles],
        run_dir: Path,
        recipe: FinetuneRecipe,
        place: Output,
        gallery: Gallery,
        overwrite: bool,
    ) -> None:
        self.studies, self.run_dir, self.recipe, self.place = studies, run_dir, recipe, place
        self.gallery = gallery
        self.limits = read_limits(run_dir)
        self.done = self.left = 0  # studies of this call
        changed = place.find_earlier(studies, overwrite=overwrite)
        if len(place.records):
            gallery.find_earlier()
        self.result = Written(place.reports, place.skipped, reports=len(place.records), changed=changed)
        self.again = "run it again without --overwrite" if overwrite and not place.replaces else "run it again"

    def run(self, machine: Machine) -> Written:
        result, place = self.result, self.place
        lacking = self.gallery.lacking([study.name for study in self.studies])
        left = [study for study in self.studies if study.name not in place.records or study.name in lacking]
        self.left = len(left)
        silence_libraries()
        whole, began = False, time.perf_counter()
        try:
            if left:
                write = self._start(left, machine)
                place.begin()
                self.gallery.begin()
                began = time.perf_counter()
                with (
                    interrupted_by(signal.SIGINT, signal.SIGTERM, message=self._stopped),
                    progress_bar("writing reports", len(left)) as advance,
                ):
                    self._save(write(), advance)
                    if machine.processes > 1:
                        self._complete_page(machine)
            whole = True
        finally:
            result.seconds = time.perf_counter() - began
            result.of_call = sum(study.name in place.records for study in self.studies)
            if left or not place.is_whole or self.gallery.is_missing:
                self._finish(whole)
        if whole and place.shard is not None:
            atomic_write_text(place.done_marker, f"{counted(result.reports, 'report')}, {result.skipped} skipped\n")
        return result

    def _start(self, left: list[StudyFiles], machine: Machine) -> Callable[[], Iterator[list[StudyResult | StudyCard]]]:
        processes, page = min(machine.processes, len(left)), self.gallery.options
        if processes > 1:
            return lambda: write_in_processes(left, processes, self.run_dir, self.recipe, machine.device, page)
        generator = load_generator(self.run_dir, device=machine.device, recipe=self.recipe)
        fit_threads(generator.model, writing=True)
        workers = reading_processes(generator.device)
        return lambda: StudyWriter(generator, self.recipe, page, workers=workers).write(left)

    def _stopped(self) -> str:
        result, place = self.result, self.place
        where = f"{place.partial}; earlier reports are unchanged" if place.replaces else place.folder
        done = f"stopped after {self.done} of {counted(self.left, 'study')}"
        return f"{done}; {counted(result.written, 'report')} saved in {where}; {self.again} to continue"

    def _save(self, results: Iterator[list[StudyResult | StudyCard]], advance: Callable[[int], None]) -> None:
        for done in results:
            for made in done:
                if isinstance(made, StudyCard):
                    self.gallery.append(made)
                else:
                    self._save_one(made)
                    self.done += 1
                    advance(1)

    def _complete_page(self, machine: Machine) -> None:
        # Each process made its share of the cards. If more files of one cannot be read, some are still lacking.
        lacking = self.gallery.lacking([study.name for study in self.studies])
        if studies := [study for study in self.studies if study.name in lacking]:
            for done in self._start(studies, replace(machine, processes=1))():
                for made in done:
                    if isinstance(made, StudyCard):
                        self.gallery.append(made)

    def _save_one(self, study: StudyResult) -> None:
        result = self.result
        for path, reason in study.skipped:
            self.place.append_skipped(path, reason)
            result.skipped += 1
            result.first_skipped += [(path, reason)] if len(result.first_skipped) < LISTED else []
        if study.row is None:
            return
        limits = {"limits": self.limits} if self.limits else {}
        self.place.append(study.row | limits | {"fingerprint": self.place.fingerprint})
        result.written += 1
        result.reports = len(self.place.records)
        path = study.row["path"]
        if study.row["notes"]:
            result.noted += 1
            result.unlike += any(note.startswith(UNLIKE) for note in study.row["notes"])
            result.first_noted += [(path, "; ".join(study.row["notes"]))] if len(result.first_noted) < LISTED else []

    def _finish(self, whole: bool) -> None:
        result, place = self.result, self.place
        keep_partial = place.replaces and not (whole and result.reports)
        place.finish((study.name for study in self.studies), keep_partial=keep_partial)
        if keep_partial:
            result.records, result.skipped_file = place.partial, place.skipped_partial
        elif result.reports and self.gallery.options.studies:
            self.gallery.write()
