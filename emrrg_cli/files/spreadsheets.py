"""CSV files that people open in a spreadsheet.

They begin with a byte order mark, because Excel does not read other files as UTF-8. A text that a spreadsheet would run
as a formula gets an apostrophe, and so does such a text with apostrophes before it; `plain_text` removes one.

Source: OWASP, "CSV Injection".
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

# Excel in East Asia takes the full-width signs for the others. Numbers such as -1 are no formulas.
_FORMULA = re.compile(r"'*(?:[=@\t\n\uff1d\uff0b\uff0d\uff20]|[+-](?![\d.]*\Z))")


def spreadsheet_writer(stream: TextIO, columns: Sequence[str]) -> Callable[[Iterable[Any]], None]:
    """Writes the byte order mark and the header to a stream of UTF-8; returns a function that writes a row."""
    stream.write("\ufeff")
    writer = csv.writer(stream, lineterminator="\n")

    def write(cells: Iterable[Any]) -> None:
        writer.writerow(_safe(cell) if isinstance(cell, str) else cell for cell in cells)

    write(columns)
    return write


def _safe(cell: str) -> str:
    text = cell.replace("\r\n", "\n").replace("\r", "\n")  # Python does not quote a CR, so it would end the row
    return f"'{text}" if _FORMULA.match(text) else text


def plain_text(cell: str) -> str:
    """Returns the text that `spreadsheet_writer` was given; its lines end in LF."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
