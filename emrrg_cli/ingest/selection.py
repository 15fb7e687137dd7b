"""Selects studies and views of a source, before images are decoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from emrrg_cli.datasets.report_text import select_section
from emrrg_cli.imaging.views import projection
from emrrg_cli.ingest.study import ImportLog, RenderedImage, Study, image_name
from emrrg_cli.recipe.preprocessing import PreprocessRecipe
from emrrg_cli.vocabulary import WantedView


def select(studies: Iterable[Study], recipe: PreprocessRecipe, root: Path | None, log: ImportLog) -> Iterator[Study]:
    """Yields the studies that the recipe selects: `report` is its section, `image_paths` are its views.

    - Section `report` is the text by the source's rule, which may be empty. For any other section, a study without its
      text is skipped; `both` is findings followed by impression, or the one that exists.
    - `frontal` or `lateral` views skip images of a known other projection, and studies without other images. Images
      of unknown projection are kept with a note.
    - A study whose report has less than `min_words` words (separated by white space) is skipped.

    Args:
        studies: The studies of a source.
        recipe: The selection.
        root: Folder of the source.
        log: Counts skipped studies and images.
    """
    for study in studies:
        chosen = _with_section(study, recipe, log)
        if chosen is not None and recipe.views != "all":
            chosen = _with_views(chosen, recipe.views, root, log)
        if chosen is not None:
            yield chosen


def _with_section(study: Study, recipe: PreprocessRecipe, log: ImportLog) -> Study | None:
    if recipe.section != "report":
        texts = {"report": study.report, "findings": study.findings, "impression": study.impression}
        text = select_section(texts, recipe.section)
        if not text.strip():
            name = {"both": "findings or impression"}.get(recipe.section, recipe.section)
            log.skip_study(f"no {name}", study.study_id)
            return None
        study = replace(study, report=text)
    if recipe.min_words and (words := len((study.report or "").split())) < recipe.min_words:
        log.skip_study("report too short", study.study_id, detail=f"{words} of {recipe.min_words} words")
        return None
    return study


def _with_views(study: Study, wanted: WantedView, root: Path | None, log: ImportLog) -> Study | None:
    kept: list[tuple[Path | RenderedImage, str]] = []
    left_out: list[tuple[Path | RenderedImage, str]] = []
    unknown: list[Path | RenderedImage] = []
    images: tuple[Path | RenderedImage, ...] = (*study.image_paths, *study.rendered)
    for image, view in zip(images, study.views, strict=True):
        kind = projection(view)
        (kept if kind in (wanted, "unknown") else left_out).append((image, view))
        if kind == "unknown":
            unknown.append(image)
    if not kept and left_out:
        log.skip_study(f"no {wanted} view", study.study_id, detail=", ".join(view for _, view in left_out))
        return None
    for image, view in left_out:
        log.leave_out_image(study.study_id, image_name(image, root), f"not a {wanted} view", view)
    for image in unknown:
        log.note_image(study.study_id, image_name(image, root), f"view not known, kept as {wanted}")
    return replace(
        study,
        image_paths=tuple(image for image, _ in kept if isinstance(image, Path)),
        rendered=tuple(image for image, _ in kept if not isinstance(image, Path)),
        views=tuple(view for _, view in kept),
    )
