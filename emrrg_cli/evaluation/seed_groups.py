"""Means over runs that differ only in their seed, tested against the group of the first run."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from emrrg_cli.evaluation import bootstrap
from emrrg_cli.scoring.comparison import Floats

# Runs that differ only in these settings are seeds of the same method.
RANDOM = ("data.seed", "generation.seed", "train.seed")
_NOT_METHOD = {*RANDOM, "output"}


def method_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings without the seeds, and without the seed in the path of weights of an earlier stage.

    The seed of a whole chain is in the names of all of its runs: `align-1` for seed 1 and `align-2` for seed 2 are the
    same method.
    """
    method = {key: value for key, value in settings.items() if key not in _NOT_METHOD}
    own = re.compile(rf"(?<!\d){settings.get('train.seed')}(?!\d)(?=\D*$)")  # the last number
    return {
        key: own.sub("{seed}", value) if key.endswith("weights") and isinstance(value, str) else value
        for key, value in method.items()
    }


def seed_groups(
    rows: Sequence[Mapping[str, Any]],
    settings: Sequence[Mapping[str, Any] | None],
    drawn: Sequence[Mapping[str, Floats] | None],
    remarks: list[str],
) -> list[dict[str, Any]]:
    """Returns the mean and the standard deviation of each group of runs that differ only in their seed.

    Runs without such a partner are groups of one, if any group has more. All are tested against the group of the first
    run, by a bootstrap over studies and Student's t over seeds. The draws are the same for groups with the same seeds,
    which may share stages. Under the null hypothesis, 200 studies and 2, 3 or 5 seeds a side, p is below .05 in 2 to 6
    percent of comparisons, or fewer if the seeds of the groups differ or the seeds disagree mostly on single studies.
    The test ignores the spread that the seed of a group of one would have.

    Args:
        rows: name, studies, scores and settings of each run.
        settings: all settings of each run; None: not known.
        drawn: scores `[resamples]` of each run for the same draws of the studies of the first run; None: it has others.
        remarks: warnings for the user, which this extends.
    """
    members: dict[Any, list[int]] = {}
    for number, one in enumerate(settings):
        key: Any = number if one is None else repr(sorted(method_of(one).items(), key=lambda item: item[0]))
        members.setdefault(key, []).append(number)
    parts: list[list[int]] = []
    for numbers in members.values():
        seeds = {_seed(settings[i]) for i in numbers}
        if len(seeds) < len(numbers):
            named = ", ".join(rows[i]["name"] for i in numbers)
            remarks.append(f"{named}: runs with the same settings and the same seed, so no mean over seeds is shown.")
        together = len(seeds) == len(numbers)
        parts += [sorted(numbers, key=lambda i: _seed(settings[i]))] if together else [[number] for number in numbers]
    if all(len(numbers) == 1 for numbers in parts):
        return []
    groups = [_group([rows[i] for i in numbers], settings[numbers[0]]) for numbers in parts]
    means = [_mean([drawn[i] for i in numbers], [_seed(settings[i]) for i in numbers]) for numbers in parts]
    studies = rows[0].get("patients") or rows[0]["studies"]  # independent ones
    for group, mean in zip(groups[1:], means[1:], strict=True):
        if len(group["members"]) == 1 or len(groups[0]["members"]) == 1:
            one = group if len(group["members"]) == 1 else groups[0]
            remarks.append(f"{one['name']} has one seed, so tests do not know how much its scores depend on the seed.")
        if means[0] is None or mean is None:
            remarks.append(f"{group['name']}: not tested against {groups[0]['name']}, since the studies differ.")
            continue
        gains = {name: bootstrap.widened(mean[name] - means[0][name], studies) for name in mean}
        group["against_first"] = {
            "differences": {name: group["mean"][name] - groups[0]["mean"][name] for name in gains},
            "intervals": bootstrap.intervals_of(gains, studies, are_widened=True),
            "p": {name: bootstrap.p_two_sided(means[0][name], mean[name], studies) for name in gains},
        }
    return groups


def _group(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None) -> dict[str, Any]:
    names = [row["name"] for row in rows]
    method = {key: method_of(settings or {}).get(key) for key in rows[0]["settings"]}
    values = {name: [row["scores"][name] for row in rows] for name in rows[0]["scores"]}
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = re.sub(r"[\W_]*(seed|s)?[\W_]*$", "", "".join(letters[0] for letters in same))
    title = names[0] if len(names) == 1 else f"{common or ', '.join(names)}, mean of {len(names)} seeds"
    return {
        "name": title,
        "members": names,
        "settings": method if len(rows) > 1 else rows[0]["settings"],
        "mean": {name: float(np.mean(one)) for name, one in values.items()},
        "deviation": {name: float(np.std(one, ddof=1)) if len(one) > 1 else None for name, one in values.items()},
    }


def _seed(settings: Mapping[str, Any] | None) -> str:
    return repr([(settings or {}).get(key) for key in RANDOM])


def _mean(drawn: Sequence[Mapping[str, Floats] | None], seeds: Sequence[str]) -> dict[str, Floats] | None:
    """Returns the mean scores `[resamples]` of a group, each plus a random error of a mean of so few seeds.

    The error is the standard deviation over the seeds / sqrt(seeds), times a draw of Student's t. Drawing two to five
    seeds with replacement, also with deviations scaled by sqrt(n / (n - 1)), gives differences between equal methods a
    p value below .05 too often.
    """
    known = [one for one in drawn if one is not None]
    if len(known) < len(drawn):
        return None
    scores = {name: np.stack([one[name] for one in known], axis=1) for name in known[0]}  # [resamples, seeds]
    resamples, count = next(iter(scores.values())).shape
    generator = np.random.default_rng([bootstrap.SEED, zlib.crc32(" ".join(seeds).encode())])
    # A product of scores with this is t * deviation / sqrt(seeds), and 0 for one seed.
    errors = generator.standard_normal((resamples, count)) / np.sqrt(count)
    errors -= errors.mean(axis=1, keepdims=True)
    errors /= np.sqrt(generator.chisquare(max(1, count - 1), (resamples, 1)))
    return {name: one.mean(axis=1) + errors @ one.mean(axis=0) for name, one in scores.items()}
