"""Study cards for the page of `generate`: small pictures, and maps of where the model looked."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from emrrg_cli.decoding.outputs import RecordIndex, Row
from emrrg_cli.files.atomic import atomic_file
from emrrg_cli.files.records import append_jsonl, iterate_jsonl, jsonl_line
from emrrg_cli.reporting.gallery import Pictures

_SIDE = 512  # of a picture, pixels
_TEXTS = ("images", "maps")


@dataclass(frozen=True)
class PageOptions:
    """Options of the page of a run.

    Args:
        studies: number of studies on the page; 0: no page.
        grounding: whether the page shows where the model looked in each sentence.
        command: the command line.
    """

    studies: int = 2000
    grounding: bool = True
    command: str = ""


PAGE, NO_PAGE = PageOptions(), PageOptions(0, grounding=False)


@dataclass(frozen=True)
class StudyCard:
    """A study's name and pictures."""

    study: str
    pictures: Pictures


def small_picture(image: Image.Image) -> str:
    """Converts an image to a data URL with a WebP picture of about 15 kB."""
    small = image.convert("L")
    small.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=75, method=0)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def pictures_with_maps(images: Sequence[str], maps: Tensor) -> Pictures:
    """Combines pictures and maps `[sentences, views, grid, grid]` of a study; maps are stored with 8 bits."""
    encoded, peaks = [], []
    for one in maps:
        largest = one.max().item()
        values = (one * (255 / largest)).round().byte() if largest > 0 else None
        encoded.append("" if values is None else base64.b64encode(values.numpy().tobytes()).decode("ascii"))
        peaks.append(round(largest * one.numel(), 2))
    return Pictures(list(images), maps.shape[-1], encoded, peaks)


class CardFile:
    """The cards of a run in `page.jsonl`. A later run that adds studies makes the page again from this file.

    `page.jsonl.partial` grows study by study. Only the positions of cards in the file are kept in memory.

    Args:
        folder: folder of the run's output.
        fingerprint: fingerprint of model and options; cards with another fingerprint are ignored.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.file = folder / "page.jsonl"
        self.partial = folder / "page.jsonl.partial"
        self.fingerprint = fingerprint
        self.index = RecordIndex()

    def find_earlier(self) -> None:
        """Finds the cards of earlier runs."""
        for file in (self.file, self.partial):
            if file.exists():
                for begin, row in iterate_jsonl(file):
                    if row.get("fingerprint") == self.fingerprint and _is_card(row):
                        self.index.add(str(row["study"]), file, begin)

    def append(self, card: StudyCard) -> None:
        """Saves a card at once.

        Raises:
            RunError: the file cannot be written.
        """
        row = {"study": card.study, "fingerprint": self.fingerprint, **asdict(card.pictures)}
        self.index.add(card.study, self.partial, append_jsonl(self.partial, row))

    def finish(self, studies: Sequence[str]) -> None:
        """Keeps the cards of these studies, in this order, and drops the others.

        Raises:
            RunError: the file cannot be written.
        """
        shown = set(studies)
        with atomic_file(self.file) as file:
            for row in self.index.rows(studies):
                if row["study"] in shown:
                    file.write(jsonl_line(row))
        self.partial.unlink(missing_ok=True)

    def join(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Pictures]]:
        """Yields records with their pictures, in the order of `finish`; pictures are empty if a record has none."""
        cards = (row for _, row in iterate_jsonl(self.file))
        card = next(cards, None)
        for row in rows:
            if card is None or card["study"] != row["study"]:
                yield row, Pictures()
                continue
            yield row, Pictures(card["images"], card["grid"], card["maps"], card["peaks"])
            card = next(cards, None)


def _is_card(row: Row) -> bool:
    # Other programs may have changed the file, and the page must be made with any content.
    texts = all(isinstance(row.get(name), list) and all(isinstance(one, str) for one in row[name]) for name in _TEXTS)
    peaks = row.get("peaks")
    numbers = isinstance(peaks, list) and all(isinstance(one, int | float) for one in peaks)
    return texts and numbers and isinstance(row.get("grid"), int) and isinstance(row.get("study"), str)
