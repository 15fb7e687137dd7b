"""Reads the notes of MIMIC-CXR: the folder or the zip of `mimic-cxr-reports`, not unpacked, or a table of sections."""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

from emrrg_cli.datasets.report_text import unix_line_ends
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.ingest.sources.mimic_note import Note, joined, read_note
from emrrg_cli.ingest.sources.table import CsvFile, whole_number
from emrrg_cli.ingest.sources.text_files import decoded, open_regular

_MAX_BYTES = 2**20  # of one note; notes of the release have at most about 10 KB
_FOLDERS = ("", "files/", "mimic-cxr-reports/files/")
_NOTE = re.compile(r"(.*/)?p\d\d/p\d+/s\d+\.txt", re.DOTALL)
_SECTIONS = ("impression", "last_paragraph", "indication", "comparison", "technique")


class ReportError(Exception):
    """A note exists but cannot be read; the text is the reason."""


class MimicReports(Protocol):
    """Notes by patient and study."""

    def note(self, subject: int, study: int) -> Note | None:
        """Returns the sections of a note, or None if it does not exist.

        Raises:
            ReportError: The note exists but cannot be read.
        """


def open_reports(path: Path) -> MimicReports:
    """Opens notes.

    Args:
        path: The folder that holds `files/p10/p10000032/s50414267.txt` or `p10/...`, a zip of it, or a table (`.csv`,
            `.csv.gz`) as the data set's section files have it: `study`, `findings`, `impression` and others.

    Raises:
        UsageError: The folder or file does not exist or has no notes.
        RunError: The file is not a zip or a table, or is cut short.
    """
    if path.is_file() and path.name.lower().endswith((".csv", ".csv.gz")):
        return _SectionTable(path)
    return _NoteFiles(path)


class _SectionTable:
    """The table `mimic_cxr_sectioned.csv`, in memory. The first row of a study counts."""

    def __init__(self, path: Path) -> None:
        self._notes: dict[int, Note] = {}
        for _, cells in CsvFile(path, ("study", "findings"), _SECTIONS):
            if cells is not None and (study := whole_number(cells[0])) is not None:
                texts = dict(zip(("findings", *_SECTIONS), map(joined, cells[1:]), strict=True))
                self._notes.setdefault(study, Note(**texts))

    def note(self, subject: int, study: int) -> Note | None:
        return self._notes.get(study)


class _NoteFiles:
    """Text files in a folder or a zip. A zip's table of contents is kept: 145 MB for the release's 227,835 notes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        if path.is_dir():
            found = any(next((path / folder).glob("p[0-9][0-9]"), None) for folder in _FOLDERS)
        elif not path.is_file():
            raise UsageError(f"no such folder, zip or table of reports: {path}")
        else:
            self._zip = _open_zip(path)
            match = next(filter(None, map(_NOTE.fullmatch, self._zip.namelist())), None)
            found, self._folder = match is not None, match[1] or "" if match else ""
        if not found:
            raise UsageError(f"{path} has no notes such as files/p10/p10000032/s50414267.txt")

    def note(self, subject: int, study: int) -> Note | None:
        text = self._read(f"p{str(subject)[:2]}/p{subject}/s{study}.txt")
        return None if text is None else read_note(text, study)

    def _read(self, name: str) -> str | None:
        try:
            data = self._from_folder(name) if self._zip is None else self._from_zip(self._zip, name)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ReportError(error.strerror or str(error)) from None
        if data is None:
            return None
        if len(data) > _MAX_BYTES:
            raise ReportError(f"more than {_MAX_BYTES:,} bytes")
        if b"\0" in data:
            raise ReportError("not text")
        return unix_line_ends(decoded(data))

    def _from_folder(self, name: str) -> bytes | None:
        for folder in _FOLDERS:
            file = self.path / folder / name
            if file.exists():
                with open_regular(file) as content:
                    return content.read(_MAX_BYTES + 1)
        return None

    def _from_zip(self, archive: zipfile.ZipFile, name: str) -> bytes | None:
        try:
            with archive.open(self._folder + name) as content:
                return content.read(_MAX_BYTES + 1)
        except KeyError:
            return None
        # Broken, encrypted, or compressed by a method that Python does not support.
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
            raise ReportError(str(error)) from None


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise RunError(f"{path} is not a whole zip file: {error}", hint="Download it again.") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from None
