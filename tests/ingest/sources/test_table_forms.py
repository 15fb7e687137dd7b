"""Tables as spreadsheets and scripts write them: the same rows, however they are written."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.report_text import clean_report
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.ingest.preprocess import preprocess
from emrrg_cli.ingest.sources.folder import Columns, FolderSource
from emrrg_cli.ingest.sources.r2gen import R2GenSource
from emrrg_cli.ingest.sources.table import CsvFile, read_table
from emrrg_cli.recipe.preprocessing import PreprocessRecipe

PLAIN = "file,text\n0.png,Clear lungs.\n1.png,Large heart.\n"
ROWS = [("0.png", "Clear lungs."), ("1.png", "Large heart.")]

FORMS = {
    "control": ("t.csv", PLAIN),
    "blank lines first": ("t.csv", "\n \n\n" + PLAIN),
    "empty cells first": ("t.csv", ",\n" + PLAIN),
    "blank lines between": ("t.csv", PLAIN.replace("\n", "\n\n")),
    "separator line": ("t.csv", "sep=;\n" + PLAIN.replace(",", ";")),
    "separator comma": ("t.csv", "sep=,\n\n" + PLAIN),
    "separator tab": ("t.csv", "sep=\t\n" + PLAIN.replace(",", "\t")),
    "separator bar": ("t.csv", '"SEP=|"\n' + PLAIN.replace(",", "|")),
    "commas within quotes": ("t.csv", 'file;text;"age, sex, site, room"\n0.png;Clear lungs.;x\n1.png;Large heart.;x\n'),
    "a header over two lines": ("t.csv", 'file;text;"age,\nsex, site"\n0.png;Clear lungs.;x\n1.png;Large heart.;x\n'),
    "quoted headers": ("t.csv", '"file","text"\n"0.png","Clear lungs."\n"1.png","Large heart."\n'),
    "TSV": ("t.tsv", PLAIN.replace(",", "\t")),
    "TSV with quotes": ("t.tsv", '"file"\t"text"\n0.png\t"Clear lungs."\n1.png\t"Large heart."\n'),
    "TSV with blank lines": ("t.tsv", "\n\nsep=\t\n\n" + PLAIN.replace(",", "\t")),
}


def _rows(path: Path) -> list[tuple[str, str]]:
    return [(row["file"], row["text"]) for _, row in read_table(path).rows() if row]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_form_has_the_same_rows(tmp_path: Path, form: str, ends: str, encoding: str, packed: bool) -> None:
    name, content = FORMS[form]
    data = content.replace("\n", ends).encode(encoding)
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(data) if packed else data)
    assert _rows(path) == ROWS


def test_quotes_in_tsv_are_characters(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text('file\ttext\n0\t"Clear" lungs.\n1\t"Open.\n2\tClosed."\n3\t"A ""b"" c"\n4\t"\n5\t""\n')
    texts = [text for _, text in _rows(path)]
    assert texts == ['"Clear" lungs.', '"Open.', 'Closed."', 'A "b" c', '"', ""]


def test_large_tables_share_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(("\nsep=;\n" + PLAIN.replace(",", ";")).encode("utf-16-le"))
    assert [cells for _, cells in CsvFile(path, ("file", "text"))] == ROWS


@pytest.mark.parametrize(("name", "line"), [("t.csv", 4), ("t.csv.gz", 4)])
def test_an_open_quote_names_its_line(tmp_path: Path, name: str, line: int) -> None:
    data = ('sep=,\nfile,text\n0.png,a\n1.png,"b\n' + "2.png,c\n" * 50).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(RunError, match=rf"{name}:{line}: not valid CSV"):
        list(read_table(tmp_path / name).rows())


def test_a_line_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emrrg_cli.ingest.sources.text_files._MAX_LINE", 1000)
    for name, start in (("t.csv", "file,text\n"), ("t.tsv", "file\ttext\n"), ("t.jsonl", '{"file": 1}\n')):
        (tmp_path / name).write_text(start + "x" * 2000)
        with pytest.raises(RunError, match=r":2: a line of more than 1,000 characters"):
            list(read_table(tmp_path / name).rows())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes")
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "device.csv").symlink_to("/dev/zero")
    for name in ("pipe.csv", "device.csv"):
        with pytest.raises(UsageError, match="is not a table"):
            read_table(tmp_path / name)
        with pytest.raises(RunError, match="not a regular file"):
            CsvFile(tmp_path / name, ("file",))


# Line ends of reports.

LINES = ("No acute disease.", "Scarring at the left base.", "", "Heart of normal size.")
REPORTS = {"lf": "\n".join(LINES), "crlf": "\r\n".join(LINES), "cr": "\r".join(LINES)}
REPORTS["mixed"] = f"{LINES[0]}\r\n{LINES[1]}\r\r\n{LINES[3]}"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "annotation"])
def test_line_ends_of_reports(tiny_r2gen: Path, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name in REPORTS:
        (root / f"{name}.png").write_bytes((tiny_r2gen / "images" / "study00" / "0.png").read_bytes())
    table = tmp_path / f"t.{kind}"
    columns = Columns(image="file", report="text", findings="text", impression="text")
    if kind == "annotation":
        rows = [{"id": name, "report": text, "image_path": f"{name}.png"} for name, text in REPORTS.items()]
        (root / "annotation.json").write_text(json.dumps({"train": rows, "val": [], "test": []}))
        source: R2GenSource | FolderSource = R2GenSource(root)
    else:
        if kind == "csv":
            table.write_bytes("".join(f'{n}.png,"{t}"\r\n' for n, t in {"file": 0, **REPORTS}.items()).encode()
                              .replace(b'file.png,"0"', b"file,text"))  # fmt: skip
        else:
            table.write_text("".join(json.dumps({"file": f"{n}.png", "text": t}) + "\n" for n, t in REPORTS.items()))
        source = FolderSource(root, table=table, columns=columns, fractions=(1, 0, 0))
    preprocess(source, tmp_path / "out", PreprocessRecipe(stage="preprocess", workers=1))
    texts = open_dataset(tmp_path / "out")["train"]["report"][:]
    assert set(texts) == {REPORTS["lf"]}
    assert clean_report(texts[0], "r2gen-mimic").count(" . ") == 2


def test_line_ends_of_predictions(tmp_path: Path) -> None:
    from emrrg_cli.evaluation.predictions import read_predictions

    rows = [{"study_id": name, "hypothesis": text, "reference": text} for name, text in REPORTS.items()]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    predictions = read_predictions(tmp_path / "p.jsonl")
    assert {*predictions.hypotheses, *predictions.references} == {REPORTS["lf"]}
