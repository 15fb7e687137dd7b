"""Leaves out the studies of a data set with sections that lack the requested text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from emrrg_cli.ingest.study import ImportLog, Study
from emrrg_cli.vocabulary import Section


def with_text(studies: Iterable[Study], section: Section, log: ImportLog) -> Iterator[Study]:
    """Yields the studies with text for the section; others are counted in `log`, here or later by `select`.

    Only the source defines `report`; it leaves `Study.report` empty if its rule finds no text.
    """
    for study in studies:
        if not (study.report or study.findings or study.impression):
            log.skip_study("empty report", study.study_id)
        elif section == "report" and not study.report:
            log.skip_study("no findings", study.study_id)
        else:
            yield study
