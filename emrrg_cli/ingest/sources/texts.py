"""Whether a study of a data set with sections has the text that is asked for."""

from __future__ import annotations

from emrrg_cli.ingest.study import Study
from emrrg_cli.vocabulary import Section


def lacks_text(study: Study, section: Section) -> str | None:
    """Why a study cannot have the section as its report; None: it can, or the selection that follows reports it.

    Only the source knows what `report` stands for: it leaves `Study.report` empty where its rule finds nothing.
    """
    if not (study.report or study.findings or study.impression):
        return "empty report"
    return "no findings" if section == "report" and not study.report else None
