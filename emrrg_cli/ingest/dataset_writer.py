"""Writes a dataset directory. A run that was killed continues where it stopped.

Until OUT is complete, the work is in a directory beside it, on the same file system:

.OUT.partial/
  work.json                       fingerprint of data, recipe and libraries
  shards/train-00000.parquet      a finished shard
  journal/train-00000.json        written after each finished shard
  finish.json                     how the shards become the dataset; written after the last shard
  dataset/                        is renamed to OUT

A continued run reads the source from its start and skips the studies that the journals of each split count. It writes
the same bytes as a run without interruption.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from emrrg_cli.console import err
from emrrg_cli.datasets.card import CARD, card
from emrrg_cli.datasets.directory import Column, dataset_features
from emrrg_cli.datasets.manifest import MANIFEST
from emrrg_cli.datasets.shard_files import shard_digest
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.files.atomic import atomic_write_text, put_directory, recover_directory
from emrrg_cli.files.locks import locked
from emrrg_cli.files.write_errors import reason, space_hint
from emrrg_cli.ingest.dedupe import Plan, Shard, make_plan, remarks_about
from emrrg_cli.ingest.prepare import PreparedImages
from emrrg_cli.ingest.shards import SplitShards, named_errors, new_parquet, to_disk
from emrrg_cli.ingest.study import ImportLog, Study
from emrrg_cli.vocabulary import SPLITS, Split

_FORMAT = 1  # of the work directory


def check_target(out: Path, *, overwrite: bool, protect: Path | None = None) -> None:
    """Checks that a dataset directory may be written to `out`.

    Args:
        out: The directory.
        overwrite: Whether an existing dataset directory may be replaced.
        protect: A path (the raw data) that must not be inside a replaced directory.

    Raises:
        UsageError: `out` is a file, or a directory that is not empty while `overwrite` is false, or a directory that
            `preprocess` did not write, which is never removed.
    """
    target = out.resolve()
    if not target.exists():
        recover_directory(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{out} is a file", hint="OUT is the directory to write.")
    if protect is not None and protect.resolve().is_relative_to(target):
        raise UsageError(f"{out} holds the raw data", hint="Choose another directory for the dataset.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{out} exists and is not empty", hint="Choose another directory, or pass --overwrite.")
    if not (target / MANIFEST).is_file():
        raise UsageError(
            f"{out} was not written by `emrrg preprocess` (it has no {MANIFEST}), so --overwrite does not remove it",
            hint="Choose another directory, or remove this one yourself.",
        )


def is_finishing(out: Path) -> bool:
    """Whether an interrupted run had finished all shards and was making the directory `out` from them."""
    return (_work_directory(out) / "finish.json").exists()


def _work_directory(out: Path) -> Path:
    final = out.resolve()
    return final.with_name(f".{final.name}.partial")


@contextlib.contextmanager
def open_writer(
    out: Path,
    *,
    fingerprint: str,
    studies_per_shard: int,
    expected_studies: int = 0,
    overwrite: bool = False,
    columns: Mapping[str, Column] | None = None,
    about: str | None = None,
) -> Iterator[DatasetWriter]:
    """Opens a writer for a dataset directory at `out`. It continues an earlier run with the same fingerprint.

    If the block ends before `finish`, `out` is unchanged, and finished shards stay in the work directory.

    Args:
        out: The directory to make or to replace; see `check_target`.
        fingerprint: Fingerprint of everything that the result depends on.
        studies_per_shard: Studies in one Parquet file.
        expected_studies: Studies in the source, to estimate the needed space when the disk is full.
        overwrite: Whether finished shards of other data or settings may be removed.
        columns: Columns beside `FEATURES`; `Study.extra` fills them.
        about: A paragraph for the dataset card; None: a sentence that the terms of the source apply.

    Raises:
        UsageError: There are finished shards of other data or settings, and `overwrite` is false.
        RunError: The disk cannot be written (full, read-only, ...), or another process is writing to `out`.
    """
    final, work = out.resolve(), _work_directory(out)
    writer = None
    try:
        with locked(out):
            work.mkdir(parents=True, exist_ok=True)
            _prepare(work, fingerprint, overwrite)
            writer = DatasetWriter(work, final, studies_per_shard, columns or {}, about)
            try:
                yield writer
            finally:
                writer.close()
                begun = (work / "finish.json").exists() or any((work / "shards").glob("*.parquet"))
                if writer.finished or not begun:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:  # pyarrow's own I/O errors are OSErrors too
        space = space_hint(error, out, None if writer is None else writer.needed(expected_studies))
        continues = "The same command continues after the finished shards." if (work / "shards").exists() else None
        raise RunError(
            f"cannot write {error.filename or out}: {reason(error)}", hint=" ".join(filter(None, (space, continues)))
        ) from error


class DatasetWriter:
    """Fills the work directory and turns it into a dataset directory; made by `open_writer`."""

    def __init__(
        self,
        work: Path,
        final: Path,
        studies_per_shard: int,
        columns: Mapping[str, Column],
        about: str | None,
    ) -> None:
        self._work, self._final, self._columns, self._about = work, final, columns, about
        self._features = dataset_features(columns)
        complete = (work / "finish.json").exists()
        self._splits: dict[Split, SplitShards] = {
            split: SplitShards(work, split, studies_per_shard, self._features, trust=complete) for split in SPLITS
        }
        self.finished = False
        self._put_studies = self._put_bytes = 0

    @property
    def studies(self) -> int:
        """Number of studies written so far, by this run or an earlier one."""
        return sum(shards.studies for shards in self._splits.values())

    @property
    def skipped(self) -> int:
        """Number of studies read without a usable image."""
        return sum(shards.skipped for shards in self._splits.values())

    @property
    def safe(self) -> int:
        """Number of studies, used or not, in finished shards."""
        return sum(shards.safe for shards in self._splits.values())

    def remaining(self, studies: Iterator[Study]) -> Iterator[Study]:
        """Yields the studies of a source, read from its start, that are not in a finished shard."""
        done = {split: shards.safe for split, shards in self._splits.items()}
        for study in studies:
            if done[study.split]:
                done[study.split] -= 1
            else:
                yield study

    def put(self, study: Study, prepared: PreparedImages) -> None:
        """Appends a study to its split, or counts why none of its images can be used."""
        self._put_studies += 1
        self._put_bytes += sum(len(image.data) for image in prepared.images)
        self._splits[study.split].put(study, prepared)

    def needed(self, expected_studies: int) -> int | None:
        """Estimates the bytes that the remaining studies need, from the studies read so far; None if there are none."""
        if not self._put_studies:
            return None
        left = max(expected_studies - self.safe, self._put_studies)
        return round(self._put_bytes / self._put_studies * left)

    def add_to(self, log: ImportLog) -> None:
        """Finishes the shards and adds their skipped items and notes, split by split."""
        for shards in self._splits.values():
            shards.end_shard()
            for journal in shards.journals():
                log.add(journal.skipped, journal.notes)

    def finish(
        self,
        manifest: Callable[[ImportLog], Mapping[str, Any]],
        log: ImportLog,
        *,
        dedupe: str = "off",
        before: Callable[[Path], None] | None = None,
    ) -> dict[str, Any]:
        """Finishes the shards, writes manifest and card, and renames the directory to its final name.

        Args:
            manifest: Called with the complete log; returns the entries of the source and the recipe. The writer adds
                counts and `fingerprint`.
            log: Items that were skipped while the source was read; skipped images are added to it.
            dedupe: `off`, `report` or `drop`. `report` and `drop` need hashes for every study that was put.
            before: Called with the complete directory before it is renamed.

        Returns:
            The manifest as written.
        """
        self.add_to(log)
        dataset = self._work / "dataset"
        (dataset / "data").mkdir(parents=True, exist_ok=True)  # before the plan: a plan without it means a finished run
        plan = self._plan(dedupe)
        log.add(plan.skipped, {})
        log.remarks += remarks_about(plan.duplicates)
        counts: dict[str, dict[str, int]] = {}
        for split in SPLITS:
            chosen = [shard for shard in plan.shards if shard.split == split]
            for number, shard in enumerate(chosen):
                self._place(shard, dataset / "data" / f"{split}-{number:05d}-of-{len(chosen):05d}.parquet")
            if chosen:
                counts[split] = {
                    "studies": sum(shard.studies for shard in chosen),
                    "images": sum(shard.images for shard in chosen),
                    "shards": len(chosen),
                }
        content = {
            **manifest(log),
            "studies_written": sum(count["studies"] for count in counts.values()),
            "studies_skipped": log.studies_skipped,
            "skipped": log.as_dict(),
            "notes": log.notes_as_dict(),
            "remarks": log.remarks,
            **({"duplicates": plan.duplicates} if plan.duplicates else {}),
            "splits": counts,
            "files": {f"data/{file.name}": shard_digest(file) for file in sorted((dataset / "data").glob("*.parquet"))},
            "images": sum(count["images"] for count in counts.values()),
            "fingerprint": self._fingerprint(plan),
        }
        atomic_write_text(dataset / MANIFEST, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        atomic_write_text(dataset / CARD, card(content, self._columns, self._about))
        if before is not None:
            before(dataset)
        put_directory(dataset, self._final)
        self.finished = True
        return content

    def close(self) -> None:
        """Closes open files."""
        for shards in self._splits.values():
            with contextlib.suppress(OSError):  # usually a full disk, which the first error reports
                shards.close()

    def _plan(self, dedupe: str) -> Plan:
        """Writes the plan before the first shard is moved, so that a continued run moves the others in the same way."""
        path = self._work / "finish.json"
        if path.exists():
            return Plan.from_dict(json.loads(path.read_text(encoding="utf-8")))
        plan = make_plan(self._splits, look=dedupe != "off", drop=dedupe == "drop")
        atomic_write_text(path, json.dumps(plan.as_dict(), ensure_ascii=False))
        return plan

    def _place(self, shard: Shard, target: Path) -> None:
        source = self._splits[shard.split].path(shard.index)
        if target.exists():  # an interrupted run placed it
            source.unlink(missing_ok=True)
        elif shard.dropped:
            growing = target.with_suffix(".growing")
            with named_errors(growing):
                _copy_without(source, growing, shard, self._features.arrow_schema)
                to_disk(growing, target)
            source.unlink()
        else:
            source.replace(target)

    def _fingerprint(self, plan: Plan) -> str:
        """Fingerprint of all rows: from the digests of the shards and the images dropped from them."""
        digest = hashlib.blake2b(digest_size=16)
        for split, shards in self._splits.items():
            for journal in shards.journals():
                digest.update(f"{split} {journal.digest}\n".encode())
        digest.update(json.dumps([shard.dropped for shard in plan.shards]).encode())
        return digest.hexdigest()


def _copy_without(source: Path, target: Path, shard: Shard, schema: pa.Schema) -> None:
    """Copies a shard without the dropped images and without studies that have no other image."""
    dropped: dict[int, set[int]] = {}
    for study, view in shard.dropped:
        dropped.setdefault(study, set()).add(view)
    with pq.ParquetFile(source) as file, new_parquet(target, schema) as writer:
        study = 0
        for group in range(file.num_row_groups):
            rows = []
            for row in file.read_row_group(group).to_pylist():
                gone = dropped.get(study, set())
                for key in ("images", "views"):
                    row[key] = [value for view, value in enumerate(row[key]) if view not in gone]
                if row["images"]:
                    rows.append(row)
                study += 1
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _prepare(work: Path, fingerprint: str, overwrite: bool) -> None:
    """Empties the work directory unless the same command left its work there.

    Raises:
        UsageError: It has finished shards of another command, and `overwrite` is false.
    """
    mark = work / "work.json"
    content = json.dumps({"format": _FORMAT, "fingerprint": fingerprint})
    if mark.exists():
        if not (work / "dataset").exists() and (work / "finish.json").exists():
            pass  # a run was killed after its last step
        elif mark.read_bytes() == content.encode():
            return
        elif not overwrite and any((work / "journal").glob("*")):
            raise UsageError(
                f"{work} holds an unfinished run with other data or settings",
                hint="Run the earlier command again to finish it, or pass --overwrite to start from the beginning.",
            )
        else:
            err.print(
                f"{work} holds an unfinished run with other data or settings; this run replaces it.",
                markup=False,
                soft_wrap=True,
            )
    for name in ("shards", "journal", "dataset"):
        shutil.rmtree(work / name, ignore_errors=True)
    (work / "finish.json").unlink(missing_ok=True)
    for name in ("shards", "journal"):
        (work / name).mkdir()
    atomic_write_text(mark, content)
