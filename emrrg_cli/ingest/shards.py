"""The Parquet shards of one split. Each has a journal, from which an interrupted run continues.

A shard has the next studies of its split, in the order of the source. Its journal records how many studies were read
and which images were skipped. The journal is written after the shard, so a shard with a journal is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

from emrrg_cli.files.atomic import atomic_write_text
from emrrg_cli.ingest.prepare import PreparedImages
from emrrg_cli.ingest.study import ImportLog, Study
from emrrg_cli.vocabulary import Split

# Row groups are small, because readers fetch whole groups and the writer keeps one in memory.
STUDIES_PER_ROW_GROUP = 100
BYTES_PER_ROW_GROUP = 64 * 2**20

REPORT_HASH_BYTES = 8


@dataclass(frozen=True)
class Journal:
    """The record of one shard: the studies that were written and skipped.

    Attributes:
        read: Number of studies read.
        studies: Number of studies written; a shard without studies has no file.
        images: Number of images written.
        digest: Digest of the rows, in hexadecimal.
        views: Number of images of each written study.
        hashes: Hashes of the images, in hexadecimal; empty if duplicates are not searched.
        reports: Hashes of the reports, likewise; zeros for a study without a report.
        skipped: As `ImportLog.as_dict`.
        notes: As `ImportLog.notes_as_dict`.
    """

    read: int
    studies: int
    images: int
    digest: str
    views: list[int]
    hashes: str
    reports: str
    skipped: dict[str, Any]
    notes: dict[str, Any]


@dataclass
class _Segment:
    """The shard that is being written, and the studies read for it."""

    log: ImportLog = field(default_factory=ImportLog)
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    read: int = 0
    views: list[int] = field(default_factory=list)
    hashes: bytearray = field(default_factory=bytearray)
    reports: bytearray = field(default_factory=bytearray)

    def journal(self) -> Journal:
        return Journal(
            read=self.read,
            studies=len(self.views),
            images=sum(self.views),
            digest=self.digest.hexdigest(),
            views=self.views,
            hashes=self.hashes.hex(),
            reports=self.reports.hex(),
            skipped=self.log.as_dict(),
            notes=self.log.notes_as_dict(),
        )


class SplitShards:
    """Appends the studies of one split to its shards.

    Args:
        work: Folder with `shards/` and `journal/`.
        split: The split.
        studies_per_shard: Number of studies in a shard.
        features: Columns of the rows.
        trust: Whether a journal alone proves a finished shard, because shard files may have been moved.
    """

    def __init__(self, work: Path, split: Split, studies_per_shard: int, features: Features, *, trust: bool) -> None:
        self._work, self._split, self._studies_per_shard = work, split, studies_per_shard
        self._schema = features.arrow_schema
        self._finished: list[Journal] = []  # without hashes and logs, which can be read again
        self._segment = _Segment()
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._writer: pq.ParquetWriter | None = None
        while (journal := self._read_journal(len(self._finished))) is not None:
            if journal.studies and not (trust or self.path(len(self._finished)).exists()):
                break
            self._finished.append(_summary(journal))

    @property
    def read(self) -> int:
        """Studies read so far, used or not, by this run and earlier ones."""
        return sum(journal.read for journal in self._finished) + self._segment.read

    @property
    def safe(self) -> int:
        """Studies in finished shards. A later run does not read them again."""
        return sum(journal.read for journal in self._finished)

    @property
    def studies(self) -> int:
        """Studies that were written."""
        return sum(journal.studies for journal in self._finished) + len(self._segment.views)

    @property
    def skipped(self) -> int:
        """Number of studies without a usable image."""
        return self.read - self.studies

    def path(self, index: int) -> Path:
        """The file of a finished shard."""
        return self._work / "shards" / f"{self._split}-{index:05d}.parquet"

    def journals(self) -> Iterator[Journal]:
        """The journals of all shards, once they are finished."""
        for index in range(len(self._finished)):
            journal = self._read_journal(index)
            assert journal is not None
            yield journal

    def put(self, study: Study, prepared: PreparedImages) -> None:
        """Appends a study, or counts why none of its images can be used."""
        segment = self._segment
        segment.read += 1
        if not prepared.images:
            if prepared.problems:
                first = prepared.problems[0]
                segment.log.skip_study(first.reason, study.study_id, path=first.path, detail=first.detail)
            else:
                segment.log.skip_study("no image listed", study.study_id)
            return
        for problem in prepared.problems:
            segment.log.drop_image(study.study_id, problem)
        for name, note in prepared.notes:
            segment.log.note_image(study.study_id, name, note)
        text = {
            "study_id": study.study_id,
            "patient_id": study.patient_id,
            "views": list(prepared.views),
            "findings": study.findings,
            "impression": study.impression,
            "report": study.report,
            "source": study.source,
            **study.extra,
        }
        images = prepared.images
        self._rows.append(text | {"images": [{"bytes": image.data, "path": image.name} for image in images]})
        segment.digest.update(json.dumps([text, [(image.name, len(image.data)) for image in images]]).encode())
        for image in images:
            segment.digest.update(image.data)
        segment.views.append(len(images))
        if prepared.hashes:
            segment.hashes += b"".join(prepared.hashes)
            segment.reports += _hash_report(study.report)
        self._bytes += sum(len(image.data) for image in images)
        if len(segment.views) == self._studies_per_shard:
            self.end_shard()
        elif len(self._rows) == STUDIES_PER_ROW_GROUP or self._bytes >= BYTES_PER_ROW_GROUP:
            self._end_row_group()

    def end_shard(self) -> None:
        """Write the shard to disk, then its journal."""
        if not self._segment.read:
            return
        index = len(self._finished)
        self._end_row_group()
        if self._writer is not None:
            with named_errors(self._growing):
                self._writer.close()
                self._writer = None
                to_disk(self._growing, self.path(index))
        journal = self._segment.journal()
        atomic_write_text(self._journal_path(index), json.dumps(vars(journal), ensure_ascii=False))
        self._finished.append(_summary(journal))
        self._segment = _Segment()

    def close(self) -> None:
        """Close the open file, if the run stops early."""
        if self._writer is not None:
            self._writer.close()

    @property
    def _growing(self) -> Path:
        return self._work / "shards" / f"{self._split}.growing"

    def _journal_path(self, index: int) -> Path:
        return self._work / "journal" / f"{self._split}-{index:05d}.json"

    def _read_journal(self, index: int) -> Journal | None:
        try:
            return Journal(**json.loads(self._journal_path(index).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def _end_row_group(self) -> None:
        if not self._rows:
            return
        with named_errors(self._growing):
            if self._writer is None:
                self._writer = new_parquet(self._growing, self._schema)
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._bytes = [], 0


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Add the file name to errors in a block, because errors of writing and of pyarrow have none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def new_parquet(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A Parquet file to write row groups to."""
    return pq.ParquetWriter(path, schema, use_dictionary=False)


def to_disk(written: Path, final: Path) -> None:
    """Sync a file to disk, then rename it from its temporary name to the final one."""
    with written.open("rb+") as file:
        os.fsync(file.fileno())
    written.replace(final)


def _summary(journal: Journal) -> Journal:
    return replace(journal, views=[], hashes="", reports="", skipped={}, notes={})


def _hash_report(report: str | None) -> bytes:
    words = " ".join((report or "").split())
    if not words:
        return bytes(REPORT_HASH_BYTES)
    return hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=REPORT_HASH_BYTES).digest()
