"""R2Gen's layout: an `annotation.json` with train, val and test, and a folder of images."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from emrrg_cli.data.sources.locate import locate
from emrrg_cli.data.study import UNKNOWN_VIEW, Account, ImageProblem, Split, Study, printable
from emrrg_cli.errors import RunError, UsageError

_SPLIT_KEYS: dict[str, Split] = {"train": "train", "val": "validation", "test": "test"}
# R2Gen's ids of IU X-Ray: patient, then study. One of its 2,955 ids has one more number in the middle: CXR1_1_IM-0001.
_IU_ID = re.compile(r"CXR(\d+)(?:_\d+)?_IM-\d+.*", re.DOTALL)


@dataclass(frozen=True)
class _Row:
    split: Split
    study_id: str
    patient_id: str | None
    report: str
    image_paths: tuple[str, ...]


class R2GenSource:
    """A data set in R2Gen's layout.

    Each row of `annotation.json` is a study: `id` (text or number), `report` (text or null), `image_path` (a path or a
    list of paths, relative to the folder of the file or to `images/` in it), and, in MIMIC-CXR's file, `subject_id`.
    Paths must stay inside that folder once every `..` and symbolic link is followed.

    Args:
        root: The folder, or the JSON file itself.
        source: Name of the data set. None: `iu_xray` where all ids look like `CXR2384_IM-0942`, otherwise `r2gen`.
        limit: First studies of each split that are read; None: all.

    Raises:
        UsageError: `root` does not exist or holds no `annotation.json`; `source` is empty.
        RunError: The file is not what it should be; names the row.

    Source: R2Gen (Chen et al., EMNLP 2020).
    """

    def __init__(self, root: Path, *, source: str | None = None, limit: int | None = None) -> None:
        if source is not None and not source.strip():
            raise UsageError("--source is empty", hint="Give the data set a name, or leave the option out.")
        self.annotation = _find_annotation(root)
        self.root = self.annotation.parent.resolve()
        self.image_folders = (self.root, self.root / "images")
        splits = _read_annotation(self.annotation)
        looks_like_iu = all(_IU_ID.fullmatch(row.study_id) for rows in splits.values() for row in rows)
        self.name = source or ("iu_xray" if looks_like_iu else "r2gen")
        self._rows = [row for rows in splits.values() for row in islice(rows, limit)]

    def __len__(self) -> int:
        return len(self._rows)

    def studies(self, account: Account) -> Iterator[Study]:
        """Yields train, validation, test, each in the file's order.

        Left out and counted in `account`: an id seen before (in the same split or another; the first is kept, so that
        no study is trained on and tested on) and empty reports. An image that is missing or lies outside the root
        travels with its study as a problem.
        """
        seen: dict[str, Split] = {}
        for row in self._rows:
            account.read += 1
            if row.study_id in seen:
                detail = f"in {row.split}, kept from {seen[row.study_id]}"
                account.skip_study("id seen before", row.study_id, detail=detail)
                continue
            seen[row.study_id] = row.split
            if not row.report.strip():
                account.skip_study("empty report", row.study_id)
                continue
            yield self._study(row)

    def _study(self, row: _Row) -> Study:
        found = [locate(path, self.root, self.image_folders) for path in row.image_paths]
        images = tuple(image for image in found if isinstance(image, Path))
        return Study(
            study_id=row.study_id,
            patient_id=row.patient_id or self._patient(row.study_id),
            split=row.split,
            image_paths=images,
            views=(UNKNOWN_VIEW,) * len(images),  # the layout does not say
            findings=None,
            impression=None,
            report=row.report,
            source=self.name,
            problems=tuple(image for image in found if isinstance(image, ImageProblem)),
        )

    def _patient(self, study_id: str) -> str | None:
        match = _IU_ID.fullmatch(study_id) if self.name == "iu_xray" else None
        return match[1] if match else None


def _find_annotation(root: Path) -> Path:
    if root.is_file():
        return root
    if not root.exists():
        raise UsageError(f"no such folder: {root}", hint="ROOT is the folder that holds annotation.json.")
    annotation = root / "annotation.json"
    if not annotation.is_file():
        raise UsageError(
            f"no annotation.json in {root}",
            hint="ROOT is the folder that holds R2Gen's annotation.json, or that file itself under any name.",
        )
    return annotation


def _read_annotation(path: Path) -> dict[Split, list[_Row]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise RunError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise RunError(f"{path}: not an annotation file: nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise RunError(f"{path}: not valid JSON: {error}") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None

    layout = 'An annotation file reads {"train": [...], "val": [...], "test": [...]}.'
    if not isinstance(content, dict):
        raise RunError(f"{path}: the top level is {_kind(content)}, not an object", hint=layout)
    if missing := [key for key in _SPLIT_KEYS if key not in content]:
        present = ", ".join(printable(str(key)) for key in list(content)[:10]) or "none"
        raise RunError(
            f"{path}: no {' and no '.join(missing)}; keys found: {present}",
            hint=f"{layout} A split that you do not have is an empty list.",
        )
    # A list under another key would be studies lost without a word.
    if unknown := [key for key, value in content.items() if key not in _SPLIT_KEYS and isinstance(value, list)]:
        raise RunError(f"{path}: unknown split {printable(unknown[0])!r}", hint=layout)
    splits: dict[Split, list[_Row]] = {}
    for key, split in _SPLIT_KEYS.items():
        rows = content[key]
        if not isinstance(rows, list):
            raise RunError(f"{path}: {key} is {_kind(rows)}, not a list", hint=layout)
        splits[split] = [_parse_row(row, split, f"{path}: {key}[{index}]") for index, row in enumerate(rows)]
    if not any(splits.values()):
        raise RunError(f"{path}: no studies: train, val and test are empty")
    return splits


def _parse_row(row: Any, split: Split, where: str) -> _Row:
    """Checks one row; `where` names it in errors."""
    if not isinstance(row, Mapping):
        raise RunError(f"{where} is {_kind(row)}, not an object")
    if missing := [key for key in ("id", "report", "image_path") if key not in row]:
        raise RunError(f"{where} has no {missing[0]!r}", hint="A row has id, report and image_path.")
    study_id = _text_or_number(row["id"], f"{where}: id")
    if not study_id:
        raise RunError(f"{where}: id is empty")
    report = row["report"]
    if report is not None and not isinstance(report, str):
        raise RunError(f"{where}: report is {_kind(report)}, not text")
    paths = row["image_path"]
    if isinstance(paths, str):
        paths = [paths]
    if not isinstance(paths, list):
        raise RunError(f"{where}: image_path is {_kind(paths)}, not a path or a list of paths")
    for index, path in enumerate(paths):
        if not isinstance(path, str):
            raise RunError(f"{where}: image_path[{index}] is {_kind(path)}, not text")
    patient = row.get("subject_id")
    return _Row(
        split=split,
        study_id=study_id,
        patient_id=None if patient is None else _text_or_number(patient, f"{where}: subject_id"),
        report=_whole_characters(report or ""),
        image_paths=tuple(paths),
    )


def _text_or_number(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RunError(f"{where} is {_kind(value)}, not text or a whole number")
    return _whole_characters(str(value))


def _whole_characters(text: str) -> str:
    """JSON can spell half a character (a lone surrogate), which no UTF-8 file holds; it becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _kind(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
