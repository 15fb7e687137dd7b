"""The page of a run of `generate`: cards are saved as they are made, and the page is written from them at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from emrrg_cli.decoding.cards import CardFile, PageOptions, StudyCard
from emrrg_cli.decoding.outputs import Output, Row
from emrrg_cli.decoding.studies import path_name
from emrrg_cli.default_model import read_limits
from emrrg_cli.files.records import iterate_jsonl
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.reporting.gallery import About, page_names, write_gallery
from emrrg_cli.versions import installed_versions

_LISTED = 200  # skipped files on the page
_ATTENTION = (
    "The map is the model's attention to the image, averaged over the words of the sentence. It shows where the model "
    "looked, which may differ from where the finding is."
)
_AVERAGED = " The model averages the views of a study, so all of them have the same map."
_GRADIENT = (
    "The map shows on which parts of the image the probability of the sentence depends most. This may differ "
    "from where the finding is."
)


class Gallery:
    """The page of a run.

    Args:
        place: the files of the run.
        options: options of the page.
    """

    def __init__(self, place: Output, run_dir: Path, recipe: FinetuneRecipe, options: PageOptions) -> None:
        self.place, self.run_dir, self.recipe, self.options = place, run_dir, recipe, options
        self.cards = CardFile(place.folder, place.fingerprint)

    def find_earlier(self) -> None:
        """Finds the cards of earlier runs with the same model and options."""
        self.cards.find_earlier()

    @property
    def is_missing(self) -> bool:
        """Whether the run has reports to show, but not all of its pages exist."""
        shown = min(self.options.studies, len(self.place.records))
        return shown > 0 and not all((self.place.folder / name).exists() for name in page_names(shown))

    def lacking(self, studies: Sequence[str]) -> set[str]:
        """Returns the studies that belong on the page and have a report without a card, as after `kill -9`.

        They are written again, because the maps are made with the report.

        Args:
            studies: names of the studies of the run, in order.
        """
        written = [name for name in studies if name in self.place.records]
        others = len(self.place.records) - len(written)  # they come first on the page
        shown = written[: max(0, self.options.studies - others)]
        return {name for name in shown if name not in self.cards.index}

    def begin(self) -> None:
        """Removes unfinished files of earlier runs that this run does not continue."""
        if not len(self.place.records):
            self.cards.partial.unlink(missing_ok=True)

    def append(self, card: StudyCard) -> None:
        """Saves a card at once.

        Raises:
            RunError: the file cannot be written.
        """
        self.cards.append(card)

    def write(self) -> None:
        """Writes the page from the records and cards of the run.

        Raises:
            RunError: the file cannot be written.
        """
        names, several = [], False
        for row in self._rows():
            names.append(str(row["study"]))
            several = several or len(row["files"]) > 1
        self.cards.finish(names)
        write_gallery(self.place.folder, self._about(several), self.cards.join(self._rows()), len(names))

    def _rows(self) -> Iterator[Row]:
        return (row for _, row in islice(iterate_jsonl(self.place.reports), self.options.studies))

    def _about(self, several: bool) -> About:
        skipped: list[tuple[str, str]] = []
        count = 0
        if self.place.skipped.exists():
            for _, row in iterate_jsonl(self.place.skipped):
                count += 1
                skipped += [(str(row["path"]), str(row["reason"]))] if count <= _LISTED else []
        maps, limits = self._map_note(several), read_limits(self.run_dir)
        return About(self._facts(), skipped, count, len(self.place.records), maps, limits)

    def _facts(self) -> list[tuple[str, str]]:
        model, generation = self.recipe.model, self.recipe.generation
        encoder = model.encoder.size or f"{model.encoder.depth} blocks of {model.encoder.d_model}"
        if generation.consensus is not None:
            decoding = f"consensus of {generation.consensus} samples"
        else:
            decoding = f"{generation.num_beams} beams" if generation.num_beams > 1 else "one token at a time"
            decoding += ", sampled" if generation.do_sample else ""
        facts = [
            ("Model", path_name(self.run_dir)),
            ("Encoder", f"{encoder}, {model.encoder.image_size} pixels"),
            ("LLM", str(model.llm.name)),
            (
                "Decoding",
                f"{decoding}, at most {generation.max_new_tokens} tokens",
            ),
            ("Command", self.options.command),
            (
                "Written",
                f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by emrrg {installed_versions(['emrrg'])['emrrg'] or ''}",
            ),
            ("Fingerprint", self.place.fingerprint),
        ]
        return [(name, value) for name, value in facts if value]

    def _map_note(self, several: bool) -> str:
        if not self.options.grounding:
            return ""
        if self.recipe.model.hybrid.every is None:
            return _GRADIENT
        return _ATTENTION + (_AVERAGED if several and self.recipe.model.views == "average" else "")
