"""The lateral film shows the same patient: what the frontal film shows stands at the same height, where it belongs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from emrrg_cli.phantom.grid import film_grid, generator
from emrrg_cli.phantom.lateral import lateral_attenuation
from emrrg_cli.phantom.lateral_findings import lateral_place
from emrrg_cli.phantom.parameters import (
    SIDES,
    Atelectasis,
    Case,
    Consolidation,
    Device,
    Distractors,
    Edema,
    Effusion,
    Findings,
    Nodule,
    Pneumothorax,
)
from emrrg_cli.phantom.profile import Profile, build_profile
from emrrg_cli.phantom.render import attenuation, build_thorax, case_grid, render
from emrrg_cli.phantom.sampling import draw_case

SIZE = 160


@cache
def _cases() -> list[Case]:
    return [case for number in range(200) if (case := draw_case(generator(6, number))).lateral]


def _case(index: int = 0, **findings: object) -> Case:
    """A drawn patient with two films and chosen findings."""
    case = _cases()[index]
    return replace(case, distractors=Distractors(), findings=Findings(**({"ctr": 0.44} | findings)))  # type: ignore[arg-type]


def _profile(case: Case, size: int = SIZE) -> Profile:
    assert case.lateral
    film = case.lateral
    return build_profile(
        case, film_grid(size, size, field=film.field, centre=(film.shift_x, film.shift_y), tilt=0.0, bend=0.0)
    )


def _added(index: int, **findings: object) -> tuple[NDArray[np.float64], Profile]:
    """What findings add to the attenuation of a lateral film, and its geometry."""
    seen = []
    for case in (_case(index), _case(index, **findings)):
        profile = _profile(case)
        seen.append(lateral_attenuation(profile, generator(case.texture_seed, 6)))
    return seen[1] - seen[0], _profile(_case(index))


def test_a_lateral_film_is_grey_and_repeats_itself() -> None:
    for index in range(12):
        case = _case(index)
        film = render(case, 96, film=case.lateral)
        assert (film.shape, film.dtype) == ((96, 96), np.uint8)
        assert 40 < film.mean() < 200
        assert film.std() > 30
        assert np.array_equal(render(case, 96, film=case.lateral), film)
        assert not np.array_equal(film, render(case, 96))


def test_the_same_lateral_film_at_every_size() -> None:
    for index in range(3):
        case = _case(index)
        small, large = (render(case, size, film=case.lateral).astype(float) for size in (96, 192))
        halved = large.reshape(96, 2, 96, 2).mean(axis=(1, 3))
        assert np.corrcoef(small.ravel(), halved.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("side", SIDES)
def test_an_effusion_fills_the_posterior_angle(side: str) -> None:
    for level in (0.12, 0.4):
        added, profile = _added(1, effusions=(Effusion(side, "small", level, False),))  # type: ignore[arg-type]
        depth = profile.case.anatomy.angle - profile.grid.y
        behind = (profile.across > 0.6) & (profile.across < 0.9) & (np.abs(depth - 1.0) < 1.0)
        above = (profile.across > -0.5) & (profile.across < 0.3) & (profile.grid.y < 2) & (profile.air["left"] > 2)
        assert added[behind].mean() > 0.15
        assert added[behind].mean() > 5 * abs(added[above].mean())


def test_a_large_heart_fills_the_space_behind_it() -> None:
    for index in range(3):
        added, profile = _added(index, ctr=0.64, cardiomegaly="moderate")
        low = np.abs(profile.grid.y - profile.dome["left"] + 4) < 2.5
        behind = low & (profile.heart == 0) & (profile.across > -0.3) & (profile.across < 0.1)
        assert added[behind].mean() > 0.25
        assert abs(added[low & (profile.across > 0.6) & (profile.across < 0.9)].mean()) < 0.05


@pytest.mark.parametrize("zone", ["upper", "mid", "lower"])
def test_a_nodule_stands_at_the_same_height_on_both_films(zone: str) -> None:
    nodule = Nodule("right", zone, 24, 0.5, 0.5, False, 0.5)  # type: ignore[arg-type]
    added, profile = _added(2, nodule=nodule)
    x, y = lateral_place(profile, "right", nodule.zone, 0.5, 0.5)
    row, column = np.unravel_index(np.argmax(added), added.shape)
    assert profile.grid.y[row, column] == pytest.approx(y, abs=1.2)
    assert profile.grid.x[row, column] == pytest.approx(x, abs=1.2)
    seen = []
    for case in (_case(2), _case(2, nodule=nodule)):
        thorax = build_thorax(case, case_grid(case, SIZE, SIZE))
        seen.append(attenuation(thorax, generator(case.texture_seed, 1)))
    frontal = thorax.grid.y.ravel()[np.argmax(seen[1] - seen[0])]
    assert profile.grid.y[row, column] == pytest.approx(frontal, abs=1.5)


def test_the_middle_lobe_is_in_front_of_the_lower_lobe() -> None:
    centre = {}
    for zone in ("mid", "lower"):
        added, profile = _added(0, consolidations=(Consolidation("right", zone, 3.5, 0.9, False),))  # type: ignore[arg-type]
        weight = np.maximum(added, 0)
        centre[zone] = float((weight * profile.across).sum() / weight.sum())
    assert centre["mid"] < -0.15 < 0.2 < centre["lower"]


@pytest.mark.parametrize(
    "findings",
    [
        {"edema": Edema("moderate", 0.6, False)},
        {"atelectases": (Atelectasis("left", "linear", 0.8, False),)},
        {"devices": (Device("endotracheal tube", None, 0.3),)},
        {"devices": (Device("nasogastric tube", None, 0.3),)},
        {"devices": (Device("nasogastric tube", None, 0.3, True),)},
        {"devices": (Device("central line", "left", -0.5),)},
        {"devices": (Device("pacemaker", "left", 0.3),)},
    ],
    ids=lambda found: next(iter(found)),
)
def test_findings_are_visible_from_the_side(findings: dict[str, object]) -> None:
    added, _ = _added(3, **findings)
    assert np.sort(added.ravel())[-60:].mean() > 0.12
    assert np.median(np.abs(added)) < 0.05


def test_a_pneumothorax_takes_the_vessels_from_the_front() -> None:
    added, profile = _added(3, pneumothorax=Pneumothorax("left", "large", 5.5, False))
    rim = (profile.across > -0.95) & (profile.across < -0.8) & (np.abs(profile.grid.y) < 3)
    assert added[rim].mean() < -0.02


def test_lateral_layers_are_single_precision_and_finite() -> None:
    for index in range(10):
        profile = _profile(_case(index), 64)
        layers = (profile.body, *profile.air.values(), profile.heart, profile.across)
        assert {layer.dtype for layer in layers} == {np.dtype(np.float32)}
        assert all(np.isfinite(layer).all() for layer in layers)


def test_a_lateral_film_is_well_exposed_with_any_finding() -> None:
    with np.errstate(all="raise", under="ignore"):
        for number in range(150):
            case = draw_case(generator(9, number))
            if case.lateral:
                render(case, 40, film=case.lateral)
