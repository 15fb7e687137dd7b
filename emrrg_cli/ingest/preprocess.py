"""Converts raw data of any source to a dataset directory, for `emrrg preprocess`."""

from __future__ import annotations

import hashlib
import json
import platform
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from emrrg_cli.console import counted, err, printable
from emrrg_cli.errors import RunError
from emrrg_cli.ingest.annotation_file import export_annotation
from emrrg_cli.ingest.dataset_writer import DatasetWriter, check_target, open_writer
from emrrg_cli.ingest.parallel import Pool, open_pool, prepare_all
from emrrg_cli.ingest.prepare import prepare_study
from emrrg_cli.ingest.selection import select
from emrrg_cli.ingest.source_scan import SourceScan, scan_source
from emrrg_cli.ingest.study import HasColumns, ImportLog, StudySource
from emrrg_cli.recipe.preprocessing import PreprocessRecipe
from emrrg_cli.signals import interrupted_by
from emrrg_cli.versions import installed_versions
from emrrg_cli.vocabulary import SPLITS

_LIBRARIES = ("datasets", "pyarrow", "pillow", "numpy", "joblib")

_SAMPLE_SECONDS = 3.0  # decoding time of a dry run


def preprocess(
    source: StudySource,
    out: Path,
    recipe: PreprocessRecipe,
    *,
    overwrite: bool = False,
    options: dict[str, Any] | None = None,
    backend: str | None = None,
    scheduler: str | None = None,
    allow_leakage: bool = False,
    annotation: Path | None = None,
) -> dict[str, Any]:
    """Decodes, shrinks and writes every usable study of `source`.

    The source is read twice: first without decoding, to find problems of the whole source before hours are spent, then
    shard by shard. Shards that an earlier run with the same data and settings finished are reused. The Parquet files
    are the same for any number of workers, any backend and any number of interruptions. Memory grows only with the ids
    of studies and patients, and by 40 bytes per image if duplicates are searched.

    Args:
        source: Studies to read.
        out: Dataset directory to make; see `check_target`.
        recipe: Selection of studies, image size and format, shard size, workers.
        overwrite: Whether to replace a dataset directory at `out`.
        options: Options of the command, which the manifest records beside the recipe.
        backend: A joblib backend; see `open_pool`.
        scheduler: Address of a Dask scheduler.
        allow_leakage: Whether patients may be in more than one split.
        annotation: R2Gen annotation file to write in addition, with the images in a folder beside it.

    Returns:
        The manifest that was written.

    Raises:
        UsageError: `out` or the backend cannot be used, or `out` has an unfinished run with other data or settings.
        RunError: A patient is in two splits, no study is usable (nothing is written), the disk is full, or a worker
            process died.
        Interrupted: The process received Ctrl-C or SIGTERM.
    """
    started = time.monotonic()
    check_target(out, overwrite=overwrite, protect=source.root)
    writer: DatasetWriter | None = None
    # Ctrl-C, or SIGTERM of a scheduler: clean up, leave no process behind, and report how to continue.
    with (
        interrupted_by(signal.SIGINT, signal.SIGTERM, message=lambda: _stopped(writer)),
        open_pool(backend, recipe.workers, len(source), scheduler) as pool,
        _progress() as progress,
    ):
        found = _scan(source, recipe, progress)
        _judge_leakage(found, allowed=allow_leakage)
        with _open_writer(out, source, recipe, found, overwrite=overwrite) as writer:
            _write_studies(source, recipe, found, writer, pool, progress)
            return writer.finish(
                lambda log: _manifest(source, recipe, options) | _work_done(log, started),
                found.log,
                dedupe=recipe.dedupe,
                before=None if annotation is None else lambda dataset: export_annotation(dataset, annotation),
            )


def _judge_leakage(found: SourceScan, *, allowed: bool) -> None:
    if not allowed:
        found.check_leakage()
    elif found.leaks:
        found.log.remarks.append(f"Patients in more than one split (--allow-leakage): {found.leaks:,}.")


def _open_writer(
    out: Path, source: StudySource, recipe: PreprocessRecipe, found: SourceScan, *, overwrite: bool
) -> AbstractContextManager[DatasetWriter]:
    described = source if isinstance(source, HasColumns) else None
    return open_writer(
        out,
        fingerprint=_fingerprint(source, recipe, found),
        studies_per_shard=recipe.studies_per_shard,
        expected_studies=found.total,
        overwrite=overwrite,
        columns=described.columns if described else None,
        about=described.about if described else None,
    )


def _work_done(log: ImportLog, started: float) -> dict[str, Any]:
    """Returns the manifest's entries about the work; `started` is a time of the monotonic clock."""
    return {
        "studies_read": log.read,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 2),
    }


def _write_studies(
    source: StudySource,
    recipe: PreprocessRecipe,
    found: SourceScan,
    writer: DatasetWriter,
    pool: Pool,
    progress: Progress,
) -> None:
    """Prepares the studies that are not in finished shards, and passes them to the writer.

    Raises:
        RunError: No study is usable.
    """
    if writer.safe:
        progress.console.print(
            f"{writer.safe:,} of {found.total:,} studies were finished by an earlier run; continuing after them.",
            highlight=False,
        )
    task = progress.add_task("preprocess", total=found.total, skipped=0, rate=0.0)
    images, begun = 0, time.monotonic()
    # The scan has already counted studies that are skipped before decoding.
    studies = writer.remaining(select(source.studies(ImportLog()), recipe, source.root, ImportLog()))
    for study, prepared in prepare_all(studies, source.root, recipe, pool):
        writer.put(study, prepared)
        images += len(prepared.images)
        progress.update(
            task,
            completed=writer.studies + writer.skipped,
            skipped=found.log.studies_skipped + writer.skipped,
            rate=images / (time.monotonic() - begun),
        )
    progress.update(task, completed=found.total)
    if not writer.studies:
        writer.add_to(found.log)
        raise _nothing_usable(source, found.log)


def dry_run(
    source: StudySource,
    out: Path,
    recipe: PreprocessRecipe,
    *,
    overwrite: bool = False,
    options: dict[str, Any] | None = None,
    allow_leakage: bool = False,
) -> dict[str, Any]:
    """Reports what `preprocess` would do: reads the source, decodes a sample of studies, and writes nothing.

    Returns:
        The known part of the manifest; `splits` and `images` count what would be written. Also `views` (by projection),
        `known_problems` (images by reason, with the first example) and `sample`: studies and images decoded, their
        problems, and an estimate for the whole source (`bytes`, `seconds` of one core).

    Raises:
        UsageError, RunError: As `preprocess`, before it decodes.
    """
    check_target(out, overwrite=overwrite, protect=source.root)
    with _progress() as progress:
        found = _scan(source, recipe, progress)
    if not allow_leakage:
        found.check_leakage()
    counts = {split: {"studies": found.studies[split], "images": found.images[split]} for split in SPLITS}
    return _manifest(source, recipe, options) | {
        "dry_run": True,
        "studies_read": found.log.read,
        "studies_skipped": found.log.studies_skipped,
        "skipped": found.log.as_dict(),
        "notes": found.log.notes_as_dict(),
        "remarks": found.log.remarks,
        "splits": {split: count for split, count in counts.items() if count["studies"]},
        "images": found.images.total(),
        "views": dict(found.views.most_common()),
        "patients_in_two_splits": found.leaks,
        "known_problems": {
            reason: {"count": count, "id": printable(first[0]), "path": printable(first[1].path)}
            for reason, count in found.problems.most_common()
            for first in [found.first_problems[reason]]
        },
        "sample": _sample(source, recipe, found),
    }


def _sample(source: StudySource, recipe: PreprocessRecipe, found: SourceScan) -> dict[str, Any]:
    """Decode a sample of studies from all parts of the source, for a limited time."""
    # In random order, so that the sample covers the whole source even if the time ends early.
    chosen = sorted(found.sample, key=lambda study: hashlib.blake2b(study.study_id.encode("utf-8", "replace")).digest())
    log, images, size, tried = ImportLog(), 0, 0, 0
    started = time.monotonic()
    for study in chosen:
        if time.monotonic() - started > _SAMPLE_SECONDS:
            break
        prepared = prepare_study(study, source.root, recipe)
        tried += 1
        images += len(prepared.images)
        size += sum(len(image.data) for image in prepared.images)
        for problem in prepared.problems:
            log.leave_out_image(study.study_id, problem.path, problem.reason, problem.detail)
        for name, note in prepared.notes:
            log.note_image(study.study_id, name, note)
    scale = found.total / tried if tried else 0.0
    return {
        "studies": tried,
        "images": images,
        "problems": log.as_dict(),
        "notes": log.notes_as_dict(),
        "bytes": round(size * scale),
        "seconds": round((time.monotonic() - started) * scale, 1),
    }


def _scan(source: StudySource, recipe: PreprocessRecipe, progress: Progress) -> SourceScan:
    task = progress.add_task("read", total=len(source), skipped=0, rate=0.0, visible=False)
    # Shown only if it takes a while.
    started = time.monotonic()

    def report_progress(read: int) -> None:
        progress.update(task, completed=read, visible=time.monotonic() - started > 2)

    found = scan_source(source, recipe, report_progress)
    progress.remove_task(task)
    return found


def _fingerprint(source: StudySource, recipe: PreprocessRecipe, found: SourceScan) -> str:
    """Fingerprint of everything that the written bytes depend on."""
    described = source if isinstance(source, HasColumns) else None
    settings = recipe.model_dump(exclude={"workers"})
    columns = {name: vars(column) for name, column in described.columns.items()} if described else {}
    libraries = installed_versions(["emrrg", *_LIBRARIES])
    content = [source.name, str(source.root), settings, columns, libraries, found.digest]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _manifest(source: StudySource, recipe: PreprocessRecipe, options: dict[str, Any] | None) -> dict[str, Any]:
    return {
        **installed_versions(["emrrg"]),
        "python": platform.python_version(),
        "libraries": installed_versions(_LIBRARIES),
        "source": source.name,
        "root": None if source.root is None else printable(str(source.root)),
        "recipe": recipe.model_dump(),
        "options": _printable(options or {}),
    }


def _printable(value: Any) -> Any:
    # Paths on a command line may not be valid UTF-8, but JSON files must be.
    if isinstance(value, Mapping):
        return {_printable(key): _printable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_printable(entry) for entry in value]
    return printable(value) if isinstance(value, str) else value


def _stopped(writer: DatasetWriter | None) -> str:
    if writer is None or not writer.safe:
        return "stopped; nothing was written"
    return f"stopped; the same command continues after the first {counted(writer.safe, 'study')}"


def _nothing_usable(source: StudySource, log: ImportLog) -> RunError:
    lines = [f"none of the {log.read:,} studies in {source.root} can be used, so nothing was written:"]
    for reason, entry in log.skipped.items():
        example = entry.examples[0]
        first = ", ".join(filter(None, (example["id"], example.get("path"), example.get("detail"))))
        lines.append(f"  {reason}: {entry.counted()}, first: {first}")
    looked_in = ", ".join(printable(str(folder)) for folder in source.image_folders)
    return RunError("\n".join(lines), hint=f"Images were searched in: {looked_in}" if looked_in else None)


@contextmanager
def _progress() -> Iterator[Progress]:
    with Progress(
        TextColumn("{task.description} {task.completed:,}/{task.total:,} studies"),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[rate]:.0f} images/s, {task.fields[skipped]:,} skipped,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=err,
    ) as progress:
        yield progress
