"""Checks whether a study of a data set with sections has the requested text."""

from __future__ import annotations

from emrrg_cli.ingest.study import Study
from emrrg_cli.vocabulary import Section


def lacks_text(study: Study, section: Section) -> str | None:
    """Returns why a study has no text for the section. None: it has text, or `select` reports the problem later.

    Only the source defines `report`; it leaves `Study.report` empty if its rule finds no text.
    """
    if not (study.report or study.findings or study.impression):
        return "empty report"
    return "no findings" if section == "report" and not study.report else None
