"""Large CSV files of published data sets, plain and gzipped: rows one by one, one message for what is wrong."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from emrrg_cli.errors import RunError
from emrrg_cli.ingest.sources.table import CsvFile

_TEXT = 'uid,text,other\n1,"a, ""b""\nc",x\n\n2,nan,y\n3,too,many,cells\n4,é ,z\n'


def _file(tmp_path: Path, data: bytes, name: str = "t.csv") -> Path:
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_rows(tmp_path: Path, packed: bool, encoding: str) -> None:
    data = _TEXT.encode(encoding)
    path = _file(tmp_path, gzip.compress(data) if packed else data, "t.csv.gz" if packed else "t.csv")
    table = CsvFile(path, ("text", "uid"), ("absent", "other"))
    rows = [(3, ('a, "b"\nc', "1", "", "x")), (5, ("", "2", "", "y")), (6, None), (7, ("é", "4", "", "z"))]
    assert list(table) == rows
    assert list(table) == rows  # again
    assert table.encoding == encoding


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"uid,text\n\n", "has no rows"),
        (b"uid,word\n1,2\n", "has no column 'text'; its columns: uid, word"),
        (b"uid,text,text\n1,2,3\n", "has several columns named 'text'"),
        (b'uid,text\n1,"open\n', "t.csv:2: not valid CSV"),
    ],
)
def test_files_that_are_not_tables_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(RunError, match=message):
        CsvFile(_file(tmp_path, data), ("uid", "text"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(_TEXT.encode() * 200, mtime=0)[:-40], "is cut short"),
        (gzip.compress(_TEXT.encode() * 200, mtime=0)[:-6], "is cut short"),
        (_TEXT.encode(), "is not a whole gzip file: Not a gzipped file"),
        (gzip.compress(_TEXT.encode() * 200, mtime=0)[:30] + b"\xff" * 200, "is not a whole gzip file"),
        (gzip.compress(_TEXT.encode(), mtime=0)[:-8] + b"\1" * 8, "is not a whole gzip file: CRC check failed"),
    ],
)
def test_an_incomplete_gzip_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(RunError, match=message):
        list(CsvFile(_file(tmp_path, data, "t.csv.gz"), ("uid",)))


def test_an_error_in_a_late_line_names_it(tmp_path: Path) -> None:
    path = _file(tmp_path, b"uid,text\n" + b"1,2\n" * 5000 + b'1,"open\n')
    rows = iter(CsvFile(path, ("uid",)))
    assert next(rows) == (2, ("1",))
    with pytest.raises(RunError, match=r"t\.csv:5002: not valid CSV"):
        list(rows)


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(RunError, match="cannot be read"):
            CsvFile(path, ("uid",))
