"""Raw data to a dataset directory: the work behind `emrrg preprocess`, whatever the source."""

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

_SAMPLE_SECONDS = 3.0  # that a dry run decodes for


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

    The source is read twice: once without decoding, to find what is wrong with it as a whole before hours are spent,
    then shard by shard. What an earlier run with the same data and settings finished is taken over. The directory's
    Parquet files are the same for any number of workers, any backend and any number of interruptions. Memory grows
    with the ids of studies and patients alone, and by 40 bytes an image where duplicates are looked for.

    Args:
        source: Studies to read.
        out: Dataset directory to make; see `check_target`.
        recipe: What is asked for; image size and format, shard size, workers.
        overwrite: Replace a dataset directory at `out`.
        options: Of the command, recorded in the manifest beside the recipe.
        backend: Of joblib; see `open_pool`.
        scheduler: Address of a Dask scheduler.
        allow_leakage: Accept patients that are in more than one split.
        annotation: R2Gen's annotation file to write as well, with the images in a folder beside it.

    Returns:
        The manifest that was written.

    Raises:
        UsageError: `out` or the backend cannot be used, or an unfinished run with other data or settings is there.
        RunError: A patient is in two splits, no study is usable (nothing is written), the disk is full, or a worker
            process died.
        Interrupted: Ctrl-C or SIGTERM.
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
    """What the manifest says of the work; `started` by the monotonic clock."""
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
    """Prepares the studies that no finished shard has, and hands them to the writer.

    Raises:
        RunError: None was usable.
    """
    if writer.safe:
        progress.console.print(
            f"{writer.safe:,} of {found.total:,} studies were finished by an earlier run; continuing after them.",
            highlight=False,
        )
    task = progress.add_task("preprocess", total=found.total, skipped=0, rate=0.0)
    images, begun = 0, time.monotonic()
    # Studies that are left out before decoding were counted by the scan.
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
    """What `preprocess` would do: the source is read, a sample of studies is decoded, nothing is written.

    Returns:
        As much of the manifest as is known; `splits` and `images` are those to be written. Also `views` (by
        projection), `known_problems` (images, by reason, with the first) and `sample`: studies and images decoded,
        what was wrong with them, and an estimate for the whole (`bytes`, `seconds` of one core).

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
    # Shown only where it takes a while.
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
    # Paths of a command line need not be UTF-8, as a JSON file is.
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
    return RunError("\n".join(lines), hint=f"Images were looked for in: {looked_in}" if looked_in else None)


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
