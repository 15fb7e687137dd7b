"""Compares sets of reports: intervals, paired tests against the first set, and means over seeds."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emrrg_cli.console import counted
from emrrg_cli.errors import UsageError
from emrrg_cli.evaluation import bootstrap, clinical
from emrrg_cli.evaluation.language import tokenized
from emrrg_cli.evaluation.predictions import PREDICTIONS, Columns, Predictions, read_predictions
from emrrg_cli.evaluation.seed_groups import method_of, seed_groups
from emrrg_cli.files.records import read_record
from emrrg_cli.labeling import label_reports
from emrrg_cli.recipe.library import read_layer
from emrrg_cli.scoring.comparison import Corpus, Floats
from emrrg_cli.scoring.scores import SCORES, Unavailable
from emrrg_cli.vocabulary import SPLIT_NAMES, Tokenizer

RULES = tuple(f"rules_{name}" for name in clinical.HEADLINE)


@dataclass(frozen=True)
class Contender:
    """One set of reports: its name, its predictions, and the settings of its run (None: not known)."""

    name: str
    predictions: Predictions
    settings: Mapping[str, Any] | None = None
    tokenizer: Tokenizer = "whitespace"


def find_contender(path: Path, split: str, references: Path | None, columns: Columns | None = None) -> Contender:
    """Reads the reports of a run directory, an evaluation directory, or a prediction file.

    Raises:
        UsageError: There are no reports, or they cannot be read.
    """
    if not path.is_dir():
        return Contender(path.stem, read_predictions(path, references, columns))
    made = path / "evaluation"
    folders = [made / split, made / SPLIT_NAMES.get(split, split)] if made.is_dir() else [path]
    folder = next((one for one in folders if one.is_dir()), folders[0])
    file = folder / PREDICTIONS
    if not file.is_file():
        hint = f"Evaluate it first: emrrg evaluate --model {shlex.quote(str(path))} --split {shlex.quote(split)}"
        raise UsageError(f"{path} has no predictions of the {split} split ({file})", hint=hint)
    record = read_record(folder / "scores.json", "the scores of an evaluation", "Evaluate again.") or {}
    settings = _settings(Path(record.get("model", path)) / "recipe.yaml") | _flat(record.get("settings"))
    tokenizer = settings.get("evaluation.tokenizer") or record.get("tokenizer", "whitespace")
    name = path.resolve().name
    if folder == path and "model" in record:  # an evaluation directory
        run = Path(record["model"]).name
        name = run if name == record.get("split") else f"{run}/{name}"
    return Contender(name, read_predictions(file), settings or None, tokenizer)


def compare(
    contenders: Sequence[Contender], *, meteor: bool = False, resamples: int = bootstrap.RESAMPLES
) -> dict[str, Any]:
    """Scores each contender, and tests it against the first one on the studies that both have.

    Returns:
        `rows`: for each contender its `name`, `studies`, `scores`, `intervals`, and `against_first` (differences, their
        95 % intervals and two-sided p values by paired bootstrap; absent for the first).
        There are no intervals for fewer studies or patients than `bootstrap.LEAST_STUDIES`.
        `settings`: names of the settings that differ between runs. `groups`: means and standard deviations of runs that
        differ only in their seed, tested against the group of the first run (`emrrg_cli.evaluation.seed_groups`).
        `remarks`: warnings for the user.

    Raises:
        UsageError: Fewer than two contenders, or one has no study in common with the first.
    """
    if len(contenders) < 2:
        raise UsageError("compare needs at least two sets of reports", hint="emrrg compare RUN_A RUN_B")
    names = _distinct_names([one.name for one in contenders])
    _require_common_studies(contenders, names)
    contenders = [one if one.settings is None else replace(one, settings=_flat(one.settings)) for one in contenders]
    patients = {
        study: patient
        for one in contenders
        for study, patient in zip(one.predictions.study_ids, one.predictions.patients, strict=False)
        if patient is not None
    }
    contenders = [contenders[0], *(_in_order(one, contenders[0]) for one in contenders[1:])]
    scored = [_score(one, _count(one, meteor), patients, resamples) for one in contenders]
    settings = [one.settings for one in contenders]
    varying = _varying([one if one is None else method_of(one) for one in settings])
    remarks: list[str] = []
    rows: list[dict[str, Any]] = []
    for name, one in zip(names, scored, strict=True):
        studies = len(one.contender.predictions)
        row: dict[str, Any] = {"name": name, "studies": studies}
        row["patients"] = None if one.patients is None else one.independent
        row["scores"] = {key: float(value) for key, value in one.exact.items()}
        row["intervals"] = bootstrap.intervals_of(one.drawn, one.independent)
        if few := bootstrap.few_studies(studies, one.patients):
            remarks.append(f"{name} has {few}.")
        row["settings"] = {key: (one.contender.settings or {}).get(key) for key in varying}
        if rows:
            row["against_first"] = _test(scored[0], one, patients, meteor, resamples, remarks)
        rows.append(row)
    first = list(contenders[0].predictions.study_ids)
    drawn = [one.drawn if list(one.contender.predictions.study_ids) == first else None for one in scored]
    return {
        "rows": rows,
        "settings": varying,
        "groups": seed_groups(rows, settings, drawn, remarks),
        "remarks": list(dict.fromkeys(remarks)),
    }


def _count(contender: Contender, meteor: bool) -> dict[str, Floats]:
    """Returns the statistics `[n, k]` of each score; n-grams are as rare as in the references of these studies."""
    predictions = contender.predictions
    references, hypotheses = tokenized(predictions.references, predictions.hypotheses, contender.tokenizer)
    pairs = Corpus(references).compare(references, hypotheses)
    statistics: dict[str, Floats] = {}
    for one in SCORES:
        if one.slow and not meteor:
            continue
        try:
            statistics[one.names[0]] = one.statistics(pairs)
        except Unavailable as reason:
            raise UsageError(f"{one.names[0]} cannot be computed: {reason}", hint="Run without --meteor.") from reason
    truth, found = label_reports(predictions.references), label_reports(predictions.hypotheses)
    policy = "uncertain_positive"
    statistics["rules"] = clinical.label_statistics(clinical.present(truth, policy), clinical.present(found, policy))
    return statistics


def _combine(statistics: Mapping[str, Floats], sums: Mapping[str, Floats], studies: int) -> dict[str, Floats]:
    """Returns scores by name, computed from sums `[..., k]`."""
    values: dict[str, Floats] = {}
    for one in SCORES:
        if one.names[0] in statistics:
            combined = one.combine(sums[one.names[0]], studies)
            values |= {name: combined[..., place] for place, name in enumerate(one.names)}
    headline = clinical.headline(sums["rules"], studies)
    return values | {name: headline[..., place] for place, name in enumerate(RULES)}


@dataclass(frozen=True)
class _Scored:
    """A contender, its statistics `[n, k]`, its scores, and its scores `[resamples]` of drawn studies or patients."""

    contender: Contender
    statistics: Mapping[str, Floats]
    patients: bootstrap.Patients | None
    exact: Mapping[str, Floats]
    drawn: dict[str, Floats]

    @property
    def independent(self) -> int:
        return bootstrap.independent(len(self.contender.predictions), self.patients)


def _score(
    contender: Contender, statistics: Mapping[str, Floats], patients: Mapping[str, str], resamples: int
) -> _Scored:
    ids = contender.predictions.study_ids
    own = bootstrap.numbered([patients.get(study) for study in ids], len(ids))
    exact = _combine(statistics, {key: value.sum(axis=0) for key, value in statistics.items()}, len(ids))
    sums = {key: bootstrap.resampled_sums(value, resamples, patients=own) for key, value in statistics.items()}
    return _Scored(contender, statistics, own, exact, _combine(statistics, sums, len(ids)))


def _test(
    first: _Scored, second: _Scored, patients: Mapping[str, str], meteor: bool, resamples: int, remarks: list[str]
) -> dict[str, Any]:
    names = (first.contender.name, second.contender.name)
    places = {study: place for place, study in enumerate(second.contender.predictions.study_ids)}
    common = [(i, places[study]) for i, study in enumerate(first.contender.predictions.study_ids) if study in places]
    sides = [first, second]
    if len(common) < max(len(one.contender.predictions) for one in sides):
        shared = counted(len(common), "study")
        remarks.append(f"{names[0]} and {names[1]} have {shared} in common; only these are tested.")
        chosen = [list(side) for side in zip(*common, strict=True)]
        sides = [_part(one, own, patients, meteor, resamples) for one, own in zip(sides, chosen, strict=True)]
    own, other = (one.contender for one in sides)
    if [text.split() for text in own.predictions.references] != [text.split() for text in other.predictions.references]:
        remarks.append(f"The references of {names[0]} and {names[1]} differ, so their scores are not comparable.")
    if own.tokenizer != other.tokenizer:
        remarks.append(f"The tokenizers of {names[0]} and {names[1]} differ: their scores are not comparable.")
    (exact, drawn), (others, others_drawn) = ((one.exact, one.drawn) for one in sides)
    number = sides[0].independent
    gains = {name: bootstrap.widened(others_drawn[name] - drawn[name], number) for name in drawn}
    return {
        "studies": len(common),
        "differences": {name: float(others[name] - exact[name]) for name in exact},
        "intervals": bootstrap.intervals_of(gains, number, are_widened=True),
        "p": {name: bootstrap.p_two_sided(drawn[name], others_drawn[name], number) for name in drawn},
    }


def _part(one: _Scored, places: Sequence[int], patients: Mapping[str, str], meteor: bool, resamples: int) -> _Scored:
    """Scores a contender again on some of its studies."""
    part = replace(one.contender, predictions=one.contender.predictions.at(places))
    if len(places) < len(one.contender.predictions):  # CIDEr depends on all references
        return _score(part, _count(part, meteor), patients, resamples)
    return _score(part, {key: value[places] for key, value in one.statistics.items()}, patients, resamples)


def _require_common_studies(contenders: Sequence[Contender], names: Sequence[str]) -> None:
    first = contenders[0].predictions.study_ids
    for name, one in zip(names[1:], contenders[1:], strict=True):
        if set(ids := one.predictions.study_ids).isdisjoint(first):
            raise UsageError(
                f"{names[0]} and {name} have no study in common: their ids are such as {first[0]} and {ids[0]}",
                hint="Compare reports of the same split, with the same ids.",
            )


def _in_order(contender: Contender, first: Contender) -> Contender:
    """Returns the contender with its studies in the order of the first one, if they are the same studies."""
    ids, wanted = contender.predictions.study_ids, first.predictions.study_ids
    if set(ids) != set(wanted):
        return contender
    places = {study: place for place, study in enumerate(ids)}
    return replace(contender, predictions=contender.predictions.at([places[study] for study in wanted]))


def _settings(file: Path) -> dict[str, Any]:
    try:
        return _flat(read_layer(file).values)
    except UsageError:
        return {}


def _flat(settings: Any, before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in (settings if isinstance(settings, Mapping) else {}).items():
        name = f"{before}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def _varying(settings: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Returns the keys whose values differ between runs; runs without settings are ignored."""
    known = [one for one in settings if one is not None]
    keys = dict.fromkeys(key for one in known for key in one)
    return [key for key in keys if len({repr(one.get(key)) for one in known}) > 1]


def _distinct_names(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, start=1)]
