"""Whether a study of a data set with sections has the text that is asked for."""

from __future__ import annotations

from emrrg_cli.ingest.study import Study
from emrrg_cli.vocabulary import Section


def lacks_text(study: Study, section: Section) -> str | None:
    """The reason why a study has no text for the section. None: it has one, or the later selection reports it.

    Only the source knows what `report` stands for: it leaves `Study.report` empty where its rule finds nothing.
    """
    if not (study.report or study.findings or study.impression):
        return "empty report"
    return "no findings" if section == "report" and not study.report else None
