"""Reads the notes of MIMIC-CXR from the folder or the zip of `mimic-cxr-reports`, without unpacking it."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

from emrrg_cli.datasets.report_text import unix_line_ends
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.ingest.sources.text_files import open_regular

_MAX_BYTES = 2**20  # of one note; notes of the release have at most about 10 KB
_PREFIXES = ("", "files/", "mimic-cxr-reports/files/")


class ReportError(Exception):
    """A note exists but cannot be read; the text is the reason."""


class MimicReports:
    """Notes by patient and study.

    Args:
        path: The folder that holds `files/p10/p10000032/s50414267.txt` or `p10/...`, or a zip of it. The table of
            contents of a zip is kept in memory: 145 MB for the 227,835 notes of the release.

    Raises:
        UsageError: The folder or file does not exist.
        RunError: The file is not a zip or is cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        if path.is_dir():
            return
        if not path.is_file():
            raise UsageError(f"no such folder or zip of reports: {path}")
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, EOFError, ValueError) as error:
            raise RunError(f"{path} is not a whole zip file: {error}", hint="Download it again.") from None
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror or error}") from None

    def read(self, subject: int, study: int) -> str | None:
        """Returns the text of a note, or None if it does not exist.

        Raises:
            ReportError: The note exists but cannot be read.
        """
        name = f"p{str(subject)[:2]}/p{subject}/s{study}.txt"
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
        try:
            return unix_line_ends(data.decode("utf-8-sig"))
        except UnicodeDecodeError:
            return unix_line_ends(data.decode("cp1252", "replace"))

    def _from_folder(self, name: str) -> bytes | None:
        for prefix in _PREFIXES:
            file = self.path / prefix / name
            if file.exists():
                with open_regular(file) as content:
                    return content.read(_MAX_BYTES + 1)
        return None

    def _from_zip(self, archive: zipfile.ZipFile, name: str) -> bytes | None:
        for prefix in _PREFIXES:
            try:
                with archive.open(prefix + name) as content:
                    return content.read(_MAX_BYTES + 1)
            except KeyError:
                continue
            # Broken, encrypted, or compressed by a method that Python does not support.
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
                raise ReportError(str(error)) from None
        return None
