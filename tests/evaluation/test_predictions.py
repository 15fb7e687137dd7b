"""Foreign prediction files as they are found, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emrrg_cli.errors import UsageError
from emrrg_cli.evaluation.predictions import Columns, Predictions, read_predictions, write_rexrank

TRUTH = {"s1": "No effusion.", "s2": 'Heart, "enlarged".\nLungs clear.'}
TEXTS = {"s1": "There is no effusion .", "s2": "Clear lungs, é."}


def _write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def _csv(path: Path, rows: list[list[str]], **options: Any) -> Path:
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows(rows)
    return path


def _read(path: Path, references: Path | None = None, columns: Columns | None = None) -> tuple[dict, dict]:
    found = read_predictions(path, references, columns)
    return dict(zip(found.study_ids, found.references, strict=True)), dict(
        zip(found.study_ids, found.hypotheses, strict=True)
    )


def test_json_lines_as_we_write_them(tmp_path: Path) -> None:
    rows = [{"study_id": i, "hypothesis": TEXTS[i], "reference": TRUTH[i], "more": 1} for i in TRUTH]
    path = _write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert _read(path) == (TRUTH, TEXTS)


def test_r2gens_result_json_with_references_beside_it(tmp_path: Path) -> None:
    path = _write(tmp_path / "test_result.json", {i: [TEXTS[i]] for i in reversed(TEXTS)})
    references = _write(tmp_path / "test_refs.json", {i: [TRUTH[i]] for i in TRUTH})
    assert _read(path, references) == (TRUTH, TEXTS)


def test_a_csv_may_have_other_column_names(tmp_path: Path) -> None:
    rows = [["Accession", "Model output", "Radiologist"], *([i, TEXTS[i], TRUTH[i]] for i in TRUTH)]
    path = _csv(tmp_path / "theirs.csv", rows)
    assert _read(path, columns=Columns("Accession", "Model output", "Radiologist")) == (TRUTH, TEXTS)
    with pytest.raises(UsageError, match="no column with the hypothesis") as caught:
        _read(path)
    assert caught.value.hint == (
        "The columns are: Accession, Model output, Radiologist. Name it with --hypothesis-column."
    )


def test_the_two_csv_files_that_peers_publish(tmp_path: Path) -> None:
    predictions = _csv(tmp_path / "predicted.csv", [["study_id", "report"], *([i, TEXTS[i]] for i in TEXTS)])
    truth = _csv(tmp_path / "gt.csv", [["", "study_id", "report"], *(["0", i, TRUTH[i]] for i in reversed(TRUTH))])
    assert _read(predictions, truth) == (TRUTH, TEXTS)


def test_csv_files_of_one_column_are_matched_by_row(tmp_path: Path) -> None:
    predictions = _csv(tmp_path / "res.csv", [[text] for text in TEXTS.values()])
    truth = _csv(tmp_path / "gts.csv", [[text] for text in TRUTH.values()])
    assert [list(side.values()) for side in _read(predictions, truth)] == [[*TRUTH.values()], [*TEXTS.values()]]


def test_a_table_with_tabs_a_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    text = "\ufeffstudy_id\tprediction\tground_truth\r\ns1\tone\ttwo\r\n"
    path = tmp_path / "p.tsv"
    path.write_bytes(text.encode())
    assert _read(path) == ({"s1": "two"}, {"s1": "one"})


def test_rexranks_json_with_its_sections(tmp_path: Path) -> None:
    rows = {
        "501": {"model_prediction": "Findings: clear.", "section_findings": "Lungs.", "section_impression": "Normal."},
        "502": {"model_prediction": "x", "section_findings": float("nan"), "section_impression": "Normal."},
    }
    truth, texts = _read(_write(tmp_path / "r.json", rows))
    # As ReXrank's own script joins them.
    assert truth == {"501": "Findings: Lungs. Impression: Normal.", "502": "Findings: None Impression: Normal."}
    assert texts == {"501": "Findings: clear.", "502": "x"}
    only = _read(tmp_path / "r.json", columns=Columns(reference="section_impression"))[0]
    assert only == {"501": "Normal.", "502": "Normal."}


def test_rexranks_json_without_sections_has_a_reference_column(tmp_path: Path) -> None:
    rows = {i: {"model_prediction": TEXTS[i], "report": TRUTH[i]} for i in TRUTH}
    assert _read(_write(tmp_path / "r.json", rows)) == (TRUTH, TEXTS)
    with pytest.raises(UsageError, match="id s1: the reference is not a text but NaN"):
        _read(_write(tmp_path / "nan.json", rows | {"s1": {"model_prediction": "x", "report": float("nan")}}))
    with pytest.raises(UsageError, match="no column with the reference"):
        _read(_write(tmp_path / "none.json", {"s1": {"model_prediction": "x"}}))


def test_a_lone_surrogate_is_replaced(tmp_path: Path) -> None:
    row = '{"id": "a\\ud800", "hypothesis": "\\ud800 x", "reference": "\\ud83e\\udec0 \\udc00"}'
    assert _read(_write(tmp_path / "p.jsonl", row)) == ({"a\ufffd": "\U0001fac0 \ufffd"}, {"a\ufffd": "\ufffd x"})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_as_spreadsheets_write_them(tmp_path: Path, encoding: str, delimiter: str) -> None:
    rows = [["Case", "Model; output", "ref"], *([i, TEXTS[i], TRUTH[i]] for i in TRUTH)]
    path = _csv(tmp_path / "p.csv", rows, delimiter=delimiter)
    path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    assert _read(path, columns=Columns("Case", "Model; output")) == (TRUTH, TEXTS)


def test_rexranks_json_is_written_and_read_back(tmp_path: Path) -> None:
    predictions = Predictions(list(TRUTH), list(TRUTH.values()), list(TEXTS.values()))
    write_rexrank(tmp_path / "out.json", predictions)
    assert _read(tmp_path / "out.json") == (TRUTH, TEXTS)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["s1"]["model_prediction"] == TEXTS["s1"]


def test_a_list_of_records_and_ids_that_are_numbers(tmp_path: Path) -> None:
    path = _write(tmp_path / "p.json", [{"id": 7, "prediction": "a", "reference": "b"}])
    assert _read(path) == ({"7": "b"}, {"7": "a"})


def test_ids_that_a_data_frame_made_floats(tmp_path: Path) -> None:
    written = _csv(tmp_path / "written.csv", [["id", "report"], ["12.0", "a"], ["7.0", "b"]])
    truth = {"12": "c", "7": "d"}
    assert _read(written, _write(tmp_path / "truth.json", truth)) == (truth, {"12": "a", "7": "b"})
    numbers = "".join(json.dumps({"id": number, "report": text}) + "\n" for number, text in ((12.0, "c"), (7.0, "d")))
    assert _read(written, _write(tmp_path / "truth.jsonl", numbers)) == (truth, {"12": "a", "7": "b"})
    some = _csv(tmp_path / "some.csv", [["id", "report"], ["1.0", "a"], ["1.1", "b"]])  # 1.0 is no 1 here
    with pytest.raises(UsageError, match=r"2 hypotheses without a reference \(1\.0, 1\.1\)"):
        _read(some, _write(tmp_path / "other.json", {"1": "c", "1.10": "d"}))


def test_empty_reports_are_kept_and_mentioned(tmp_path: Path) -> None:
    path = _csv(tmp_path / "p.csv", [["id", "hypothesis", "reference"], ["a", "", "x"], ["b", "y", " "]])
    found = read_predictions(path)
    assert list(found.hypotheses) == ["", "y"]
    assert found.remarks[2:] == [
        "1 hypothesis is empty and counts as wrong",
        "1 reference is empty and counts as wrong",
    ]


def test_different_ids_are_explained(tmp_path: Path) -> None:
    path = _write(tmp_path / "p.json", {"s501": ["a"], "s502": ["b"]})
    references = _write(tmp_path / "r.json", {"501": ["a"], "502": ["b"]})
    with pytest.raises(UsageError, match=r"2 references .* \(501, 502\); 2 hypo.*; 0 match") as caught:
        _read(path, references)
    assert caught.value.hint == "No id is in both: the first reference has '501', the first hypothesis 's501'."


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "id,hypothesis,reference\na,x,y\na,z,w\n", r"the id a occurs twice \(row 2 and row 3\)"),
        ("p.json", '{"a": ["x"], "a": ["y"]}', "the key 'a' occurs twice"),
        ("p.csv", "id,hypothesis,reference\na,nan,y\n", r"row 2: the hypothesis is not a text but NaN"),
        ("p.jsonl", '{"id": "a", "hypothesis": NaN, "reference": "y"}', "line 1: the hypothesis is not a text but NaN"),
        ("p.jsonl", '{"id": "a", "hypothesis": "x", "reference": null}', "the reference is not a text but null"),
        (
            "p.jsonl",
            '{"id": "a", "hypothesis": ["x", "y"], "reference": "z"}',
            r"not a text but a list \(\[\"x\", \"y\"\]\)",
        ),
        ("p.jsonl", '{"id": "a"', r"p.jsonl:1: not JSON"),
        ("p.jsonl", "[1]", r"p.jsonl:1: expected an object, found a list"),
        ("p.jsonl", '{"id": "", "hypothesis": "x", "reference": "z"}', "no id in 'id'"),
        ("p.jsonl", '{"id": true, "hypothesis": "x", "reference": "z"}', r"not true or false \(true\)"),
        ("p.json", "null", r"p.json: expected an object, found null"),
        ("p.json", "", r"p.json is empty"),
        ("p.jsonl", "\n", r"p.jsonl is empty"),
        ("p.csv", "id,hypothesis,reference\na,x,\n", r"p.csv: every reference is empty"),
        ("p.json", "{}", "contains no studies"),
        ("p.json", "[" * 100_000, "nested too deeply"),
        ("p.csv", "", "is empty"),
        ("p.csv", "id,hypothesis\na,b,c\n", "row 2: 3 cells, but the header has 2"),
        ("p.csv", "id,id\na,b\n", "two columns have the same name"),
        ("p.csv", "id,hypothesis\na,b\n", "no column with the reference"),
        ("p.jsonl", '{"study": "a", "report": "x", "findings": {"Edema": "positive"}}', "no column with the reference"),
        ("p.txt", "x", "unknown file type"),
    ],
)
def test_a_file_that_is_wrong_gets_one_message(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _read(_write(tmp_path / name, content))


def test_other_encodings_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes("id,hypothesis,reference\na,b,c\nb,caf\xe9,x\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"p\.csv:3: not UTF-8 \(byte 0xe9\)"):
        _read(tmp_path / "p.csv")
    with pytest.raises(UsageError, match=r"cannot read .*none\.csv"):
        _read(tmp_path / "none.csv")
    with pytest.raises(UsageError, match="is not a file"):
        _read(tmp_path)


def test_the_columns_that_were_used_are_named(tmp_path: Path) -> None:
    path = _csv(tmp_path / "p.csv", [["id", "report", "findings"], ["a", "x", "y"]])
    assert read_predictions(path).remarks == ["p.csv: CSV, hypotheses from 'report'", "references from 'findings'"]
    sections = {"a": {"model_prediction": "x", "section_findings": "y"}, "b": {"model_prediction": "z"}}
    found = read_predictions(_write(tmp_path / "r.json", sections))
    assert list(found.references) == ["Findings: y Impression: None", ""]
    assert "joined as ReXrank does" in found.remarks[1]
    assert found.remarks[2] == "1 reference is empty and counts as wrong"


def test_hypotheses_are_not_their_own_references(tmp_path: Path) -> None:
    path = _write(tmp_path / "p.jsonl", json.dumps({"id": "a", "hypothesis": "x"}))
    with pytest.raises(UsageError, match="no column with the reference") as caught:
        read_predictions(path, path)
    assert "--references" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="hypotheses and references are the same column, 'hypothesis'"):
        read_predictions(path, columns=Columns(reference="hypothesis"))
    both = _write(tmp_path / "b.jsonl", json.dumps({"id": "a", "hypothesis": "x", "reference": "x"}))
    assert read_predictions(both).remarks[-1] == "each hypothesis equals its reference"


def test_the_id_column_may_be_that_of_one_file(tmp_path: Path) -> None:
    theirs = _csv(tmp_path / "theirs.csv", [["case", "ours"], *([i, TEXTS[i]] for i in TEXTS)])
    truth = _csv(tmp_path / "gt.csv", [["study_id", "report"], *([i, TRUTH[i]] for i in TRUTH)])
    assert _read(theirs, truth, Columns("case", "ours")) == (TRUTH, TEXTS)


def test_old_line_ends_and_excels_first_line(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b'id,prediction,reference\ra,one,two\rb,"x\ry",z\r')
    assert _read(path) == ({"a": "two", "b": "z"}, {"a": "one", "b": "x\ny"})
    path.write_bytes(b"sep=;\r\nid;prediction;reference\r\na;one;two\r\n")
    assert _read(path) == ({"a": "two"}, {"a": "one"})


def test_a_header_that_pandas_wrote_is_not_a_report(tmp_path: Path) -> None:
    predictions = _csv(tmp_path / "res.csv", [["0"], *([text] for text in TEXTS.values())])
    truth = _csv(tmp_path / "gts.csv", [[text] for text in TRUTH.values()])
    assert [list(side.values()) for side in _read(predictions, truth)] == [[*TRUTH.values()], [*TEXTS.values()]]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.csv", 'id,hypothesis,reference\na,"x,y\nb,z,w\n', "a double quote is not closed"),
        ("p.csv", 'id,hypothesis,reference\na,"x" y,z\n', "is not a CSV file"),
        ("p.jsonl", '{"id": "a", "id": "b", "hypothesis": "x", "reference": "y"}', "the key 'id' occurs twice"),
        ("p.jsonl", '{"id": 1.5, "hypothesis": "x", "reference": "y"}', r"not a decimal number \(1.5\)"),
        ("p.jsonl", '{"id": "a", "hypothesis": "x", "reference": "y"}\n{"id": "b", "reference": "z"}',
         "line 2: 'hypothesis' is missing"),
        ("p.json", {"a": {"model_prediction": "x"}, "b": "y", "c": {"model_prediction": "z"}}, "entry 'b' is none"),
        ("p.json", {"a": ["x"], "b": {"model_prediction": "y"}, "c": ["z"]}, "entry 'b' is one"),
    ],
)  # fmt: skip
def test_what_was_read_wrongly_before_gets_a_message(tmp_path: Path, name: str, content: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_predictions(_write(tmp_path / name, content))


def test_a_file_that_is_not_there_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*nosuch: No such file"):
        read_predictions(tmp_path / "nosuch")
