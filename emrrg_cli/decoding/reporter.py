"""A callable that writes reports for batches, for programs that distribute batches over machines: Ray Data, Dask."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from emrrg_cli.console import printable
from emrrg_cli.decoding.contexts import with_contexts
from emrrg_cli.decoding.reports import load_generator
from emrrg_cli.decoding.studies import StudyFiles, path_name
from emrrg_cli.decoding.study_records import StudyResult, StudyWriter
from emrrg_cli.errors import UsageError, require_path
from emrrg_cli.imaging.dicom.facts import DicomFacts, find_dicom_facts
from emrrg_cli.ingest.sources.table import cell_text
from emrrg_cli.recipe.overrides import require_texts
from emrrg_cli.silence_libraries import silence_libraries
from emrrg_cli.vocabulary import CONTEXT_FIELDS

if TYPE_CHECKING:
    from emrrg_cli.decoding.reports import Generator

_BATCH = 'Give one value for each study: {"image": ["a.png", "b.png"]}.'
_lock = threading.Lock()  # a model writes one batch at a time; Dask calls from several threads


class Reporter:
    """Writes reports for batches of studies. Each process loads the model once, at the first call.

    The object is small and can be pickled. It has only the path of the run, which each machine must be able to read.
    Without a path, the default model of the package writes the reports; it knows synthetic films only.

        ray.data.read_images("films", include_paths=True).map_batches(
            emrrg_cli.Reporter, fn_constructor_args=("runs/iu",), batch_size=16, concurrency=2)

    Args:
        run_dir: run directory of `emrrg finetune`.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1` or `mps`.
        overrides: `key=value` changes to the run's recipe, such as `generation.num_beams=1`.
    """

    def __init__(
        self, run_dir: Path | str | None = None, *, device: str = "auto", overrides: Sequence[str] = ()
    ) -> None:
        self.run_dir = None if run_dir is None else str(require_path(run_dir, "the run directory").absolute())
        self.device = device
        self.overrides = require_texts(overrides)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a report for each study of a batch, with the same text as `emrrg generate`.

        Args:
            batch: columns of `b` studies. `image`: for each study a path, an encoded image as bytes, a uint8 array
                `[h, w]` or `[h, w, 3]`, a PIL image, a list of these (the views of the study), or None. `study`
                (optional): names, which also seed sampling; None: that of the image. `indication`, `comparison`,
                `technique`, `age` and `sex`, if the model reads them (`data.context`); otherwise they come from the
                DICOM headers, as the views do.

        Returns:
            The batch with additional arrays `[b]`: `report`; `findings`, a JSON object of labels by finding;
            `mean_token_logprob` (float64); `notes`, separated by `; `. A study without a readable image has an empty
            report, a note with the reason, and NaN. Research output: not for diagnosis.

        Raises:
            UsageError: There is no column `image`, a column or its values have the wrong type, or two studies have the
                same name.
            RunError: The model cannot be loaded.
        """
        studies = _studies(batch)
        with _lock:
            generator = _load(self.run_dir, self.device, self.overrides)
            writer = StudyWriter(generator, generator.recipe)
            # A batch may contain the same image twice, also with different contexts.
            different: list[dict[str, StudyFiles]] = []
            places: list[tuple[int, str]] = []
            for study in with_contexts(studies, {}, generator.recipe.data):
                same = (n for n, group in enumerate(different) if group.get(study.name, study).context == study.context)
                if (number := next(same, len(different))) == len(different):
                    different.append({})
                different[number].setdefault(study.name, study)
                places.append((number, study.name))
            results = {
                (number, done.study): done
                for number, group in enumerate(different)
                for some in writer.write(list(group.values()))
                for done in some
                if isinstance(done, StudyResult)
            }
        columns = zip(*(_columns(results[place]) for place in places), strict=True) if places else [()] * 4
        reports, findings, sure, notes = columns
        added = {"report": reports, "findings": findings, "notes": notes}
        return {
            **batch,
            **{name: np.array(texts, dtype=object) for name, texts in added.items()},
            "mean_token_logprob": np.array(sure, dtype=np.float64),
        }


@cache
def _load(run_dir: str | None, device: str, overrides: tuple[str, ...]) -> Generator:
    silence_libraries()
    return load_generator(run_dir, device=device, overrides=overrides)


class _Given:
    """An image of a batch; its name is its path if it has one."""

    def __init__(self, image: Any, name: str) -> None:
        self.image = Path(image) if isinstance(image, str) else image
        self.name = path_name(self.image) if isinstance(self.image, Path) else name

    def __str__(self) -> str:
        return self.name

    def content(self) -> bytes | Path | Image.Image:
        """Returns the input of `read_image`."""
        if isinstance(self.image, np.ndarray):
            return Image.fromarray(self.image)
        return self.image

    def facts(self) -> DicomFacts | None:
        """Returns the facts of a DICOM file."""
        return find_dicom_facts(self.image) if isinstance(self.image, bytes | Path) else None


def _studies(batch: Mapping[str, Any]) -> list[StudyFiles]:
    if not hasattr(batch, "keys"):
        raise UsageError(f"a batch is a dictionary of columns, not {type(batch).__name__}", hint=_BATCH)
    if "image" not in batch:
        raise UsageError(f"the batch has no column image; it has {', '.join(map(str, batch)) or 'none'}", hint=_BATCH)
    images = [_views(given) for given in _column(batch, "image")]
    given = [printable(cell_text(name)) for name in _column(batch, "study")] if "study" in batch else [""] * len(images)
    if len(given) != len(images):
        raise UsageError(f"the batch has {len(images)} images and {len(given)} studies")
    twice, count = Counter(filter(None, given)).most_common(1)[0] if any(given) else ("", 0)
    if count > 1:
        raise UsageError(f"study {twice} occurs twice in the batch", hint="Give its views as a list in one row.")
    names = [name or _name(views) for name, views in zip(given, images, strict=True)]
    contexts = {field: _column(batch, field) for field in CONTEXT_FIELDS if field in batch}
    if wrong := next((field for field, column in contexts.items() if len(column) != len(images)), None):
        raise UsageError(f"the batch has {len(images)} images and {len(contexts[wrong])} values of {wrong}")
    studies = []
    for row, (name, views) in enumerate(zip(names, images, strict=True)):
        films = [_Given(view, f"{name}/{place}") for place, view in enumerate(views)]
        # None, and NaN, into which tables turn None, count as missing.
        context = {field: text for field, column in contexts.items() if (text := cell_text(column[row]))}
        studies.append(StudyFiles.of(name, [(film, film.facts()) for film in films], context))
    return studies


def _column(batch: Mapping[str, Any], name: str) -> list[Any]:
    # A list, because a pandas column would be read by label.
    column = batch[name]
    if isinstance(column, str | bytes | Mapping) or not hasattr(column, "__len__") or getattr(column, "ndim", 1) == 0:
        raise UsageError(f"the column {name} must be a list or an array, not {type(column).__name__}", hint=_BATCH)
    return list(column)


def _views(given: Any) -> list[Any]:
    if isinstance(given, list | tuple) or (isinstance(given, np.ndarray) and given.dtype == object):
        return [_checked(view) for view in given]
    missing = given is None or (isinstance(given, float) and math.isnan(given))  # an empty cell of a table
    return [] if missing else [_checked(given)]


def _checked(view: Any) -> Any:
    if isinstance(view, np.ndarray):
        if view.dtype != np.uint8 or not (view.ndim == 2 or (view.ndim == 3 and view.shape[2] == 3)):
            raise UsageError(
                f"an image is an array {list(view.shape)} of {view.dtype}, not [h, w] or [h, w, 3] of uint8"
            )
    elif not isinstance(view, bytes | str | Path | Image.Image):
        raise UsageError(f"an image is {type(view).__name__}, not a path, bytes, an array or a PIL image")
    return view


def _name(views: list[Any]) -> str:
    # The same name as `generate` gives a file; an image without a path is named by its content.
    if len(views) == 1 and isinstance(views[0], str | Path):
        return path_name(Path(views[0]))
    digest = hashlib.sha256()
    for view in views:
        content = view if isinstance(view, bytes) else str(view) if isinstance(view, str | Path) else np.asarray(view)
        data = content.encode() if isinstance(content, str) else bytes(content)
        digest.update(f"{np.shape(content)} {len(data)} ".encode() + data)
    return digest.hexdigest()


def _columns(result: StudyResult) -> tuple[str, str, float, str]:
    if result.row is None:
        return "", "{}", math.nan, "; ".join(f"no report: {reason}" for _, reason in result.skipped)
    row = result.row
    findings = json.dumps(row["findings"], ensure_ascii=False)
    return row["report"], findings, row.get("mean_token_logprob", math.nan), "; ".join(row["notes"])
