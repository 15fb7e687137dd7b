"""Synthetic films: what is measured in the picture is what the parameters say, at any size, every time."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from emrrg_cli.ingest.sources.phantom import synthetic_study
from emrrg_cli.phantom.anatomy import Thorax, build_thorax
from emrrg_cli.phantom.grid import generator
from emrrg_cli.phantom.parameters import (
    DRAWING,
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
    Side,
    sign,
)
from emrrg_cli.phantom.render import attenuation, case_grid, healthy, render
from emrrg_cli.phantom.sampling import draw_case

SIZE = 128
SIDES: tuple[Side, Side] = ("right", "left")


def _case(index: int = 0, **findings: object) -> Case:
    """A drawn patient with chosen findings, on a film without border, marker and distractors."""
    case = draw_case(generator(5, index))
    film = replace(case.film, collimation=(0.0, 0.0, 0.0, 0.0), marker="")
    return replace(case, film=film, distractors=Distractors(), findings=Findings(**({"ctr": 0.44} | findings)))  # type: ignore[arg-type]


def _seen(case: Case, size: int = SIZE) -> tuple[NDArray[np.float64], Thorax]:
    return render(case, size).astype(float), build_thorax(case, case_grid(case, size, size))


def _base(thorax: Thorax, side: Side) -> NDArray[np.bool_]:
    """The outer costophrenic corner."""
    y, outwards, angle = thorax.grid.y, thorax.outwards * thorax.on(side), thorax.case.anatomy.angle
    inner, outer = 0.7 * thorax.half_width, 0.95 * thorax.half_width
    return (y > angle - 4) & (y < angle - 1.5) & (outwards > inner) & (outwards < outer)


def _mid_lung(thorax: Thorax, side: Side) -> NDArray[np.bool_]:
    outwards = thorax.outwards * thorax.on(side)
    return (np.abs(thorax.grid.y - 2) < 4) & (outwards > 5) & (outwards < 0.8 * thorax.half_width)


def test_a_film_is_grey_and_has_the_requested_size() -> None:
    case = draw_case(generator(1, 2))
    assert (render(case).shape, render(case).dtype) == ((256, 256), np.uint8)
    assert render(case, 80, 120).shape == (80, 120)
    assert render(case, 32).std() > 20


def test_a_film_depends_only_on_its_case() -> None:
    case = draw_case(generator(1, 3))
    first = render(case, SIZE)
    render(draw_case(generator(1, 4)), SIZE)
    assert np.array_equal(render(case, SIZE), first)
    assert not np.array_equal(render(replace(case, texture_seed=case.texture_seed + 1), SIZE), first)


def test_the_same_patient_at_every_size() -> None:
    for index in range(4):
        case = _case(index)
        small, large = render(case, 96).astype(float), render(case, 192).astype(float)
        halved = large.reshape(96, 2, 96, 2).mean(axis=(1, 3))
        assert np.corrcoef(small.ravel(), halved.ravel())[0, 1] > 0.995
        assert abs(small.mean() - halved.mean()) < 2


@pytest.mark.parametrize("index", range(6))
def test_dense_tissue_is_bright(index: int) -> None:
    image, thorax = _seen(_case(index))
    spine = (thorax.outwards < 1.5) & (thorax.grid.y > 2) & (thorax.grid.y < thorax.dome["right"])
    for side in SIDES:
        assert image[_mid_lung(thorax, side)].mean() < image[spine].mean() - 60
    outside = thorax.body == 0
    assert outside.sum() < 10 or image[outside].mean() < 40


@pytest.mark.parametrize("ctr", [0.4, 0.48, 0.56, 0.66])
def test_the_heart_is_as_wide_as_the_ratio_says(ctr: float) -> None:
    for index in range(3):
        case = _case(index, ctr=ctr)
        thorax = build_thorax(case, case_grid(case, 256, 256))
        columns = thorax.grid.x[thorax.heart > 0]
        measured = (columns.max() - columns.min()) / (2 * case.anatomy.thorax_half_width)
        assert measured == pytest.approx(ctr, abs=0.02)
        assert thorax.heart_span[1] - thorax.heart_span[0] == pytest.approx(
            2 * ctr * case.anatomy.thorax_half_width, rel=0.01
        )


def test_a_larger_heart_whitens_the_lung_beside_it() -> None:
    for index in range(3):
        normal, thorax = _seen(_case(index, ctr=0.44))
        large, _ = _seen(_case(index, ctr=0.62, cardiomegaly="moderate"))
        beside = (thorax.grid.x > thorax.heart_span[1] + 0.5) & (thorax.grid.x < thorax.heart_span[1] + 2)
        beside &= np.abs(thorax.grid.y - thorax.dome["right"] + 4) < 2
        assert large[beside].mean() > normal[beside].mean() + 20


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("amount", "level"), [("small", 0.12), ("moderate", 0.4), ("large", 0.75)])
def test_an_effusion_whitens_its_base_and_not_the_other(side: Side, amount: str, level: float) -> None:
    other = SIDES[1 - SIDES.index(side)]
    for index in range(2):
        before, thorax = _seen(_case(index))
        after, _ = _seen(_case(index, effusions=(Effusion(side, amount, level, False),)))  # type: ignore[arg-type]
        change = after - before
        assert change[_base(thorax, side)].mean() > 25
        assert abs(change[_base(thorax, other)].mean()) < 12
        assert (change[_mid_lung(thorax, side)].mean() > 25) == (amount == "large")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("amount", "gap"), [("small", 1.5), ("moderate", 3.0), ("large", 5.5)])
def test_a_pneumothorax_darkens_the_periphery(side: Side, amount: str, gap: float) -> None:
    case = _case(1, pneumothorax=Pneumothorax(side, amount, gap, False))  # type: ignore[arg-type]
    (before, thorax), (after, _) = _seen(_case(1), 256), _seen(case, 256)
    outwards = thorax.outwards * thorax.on(side)
    rim = (outwards > thorax.half_width - 0.8 * gap) & (outwards < thorax.half_width - 0.3)
    rim &= np.abs(thorax.grid.y + 2) < 2
    assert after[rim].mean() < before[rim].mean() - 8
    # No vessels beyond the line: less texture once the ribs, which are in both, are taken out.
    seen = [attenuation(build_thorax(c, thorax.grid), generator(c.texture_seed, 1)) for c in (_case(1), case)]
    assert seen[1][rim].mean() < seen[0][rim].mean()


@pytest.mark.parametrize("zone", ["upper", "mid", "lower"])
@pytest.mark.parametrize("side", SIDES)
def test_a_consolidation_is_at_its_stated_place(side: Side, zone: str) -> None:
    before, thorax = _seen(_case(2))
    one = Consolidation(side, zone, 3.5, 0.8, False)  # type: ignore[arg-type]
    after, _ = _seen(_case(2, consolidations=(one,)))
    change = np.maximum(after - before, 0) * (thorax.air > 1)
    centre = [float((change * axis).sum() / change.sum()) for axis in (thorax.grid.x, thorax.grid.y)]
    a = thorax.case.anatomy
    thirds = (centre[1] - a.apex) / (thorax.dome[side] - a.apex)
    assert np.sign(centre[0]) == sign(side)
    assert {"upper": 0.1, "mid": 0.42, "lower": 0.65}[zone] < thirds < {"upper": 0.45, "mid": 0.72, "lower": 1.0}[zone]
    assert change.max() > 30


@pytest.mark.parametrize("millimetres", [10, 20, 29])
def test_a_nodule_has_its_size(millimetres: int) -> None:
    case = _case(3, nodule=Nodule("left", "upper", millimetres, 0.5, 0.5, False))
    thorax = build_thorax(case, case_grid(case, 512, 512))
    rng = [generator(case.texture_seed, 1) for _ in range(2)]
    added = attenuation(thorax, rng[0]) - attenuation(build_thorax(_case(3), thorax.grid), rng[1])
    area = (added > 0.15 * added.max()).sum() * thorax.grid.pixel**2
    assert 2 * np.sqrt(area / np.pi) * 10 == pytest.approx(millimetres, rel=0.15)


def test_edema_atelectasis_and_devices_are_visible() -> None:
    before, thorax = _seen(_case(4), 256)
    edema, _ = _seen(_case(4, edema=Edema("moderate", 0.6, False)), 256)
    near = (thorax.outwards > 3.5) & (thorax.outwards < 8) & (np.abs(thorax.grid.y - 4) < 4) & (thorax.air > 4)
    far = (thorax.outwards > 10) & (thorax.air > 4) & (thorax.grid.y < -3)
    assert (edema - before)[near].mean() > 25
    assert (edema - before)[near].mean() > 2 * (edema - before)[far].mean()
    for side in SIDES:
        plate, _ = _seen(_case(4, atelectases=(Atelectasis(side, "linear", 0.8, False),)), 256)
        base = (thorax.below > -6) & (thorax.below < 0) & (thorax.air > 1)
        changed = np.sort((plate - before)[base & (thorax.on(side) > 0)])[-200:].mean()
        assert changed > 25
    for kind, side in (
        ("endotracheal tube", None),
        ("central line", "right"),
        ("pacemaker", "left"),
        ("nasogastric tube", None),
    ):
        metal, _ = _seen(_case(4, devices=(Device(kind, side, 0.3),)), 256)  # type: ignore[arg-type]
        assert np.sort((metal - before).ravel())[-60:].mean() > 20, kind


def test_disease_does_not_change_the_exposure() -> None:
    before, thorax = _seen(_case(0))
    after, _ = _seen(_case(0, effusions=(Effusion("left", "large", 0.66, False),)))
    assert abs((after - before)[_mid_lung(thorax, "right")].mean()) < 10


def test_everything_is_single_precision() -> None:
    for index in range(30):
        case = synthetic_study(2, index)[0]
        thorax = build_thorax(case, case_grid(case, 64, 64))
        layers = (thorax.air, thorax.body, thorax.heart, healthy(thorax), attenuation(thorax, np.random.default_rng(0)))
        assert {layer.dtype for layer in layers} == {np.dtype(np.float32)}
        assert all(np.isfinite(layer).all() for layer in layers)


@pytest.mark.parametrize(
    "distractors",
    [
        Distractors(skin_fold="left"),
        Distractors(nipples=0.8),
        Distractors(granuloma="right"),
        Distractors(calcified_nodes="right"),
        Distractors(rib_callus="left"),
        Distractors(cartilage=1.0),
    ],
    ids=lambda d: next(name for name, value in vars(d).items() if value and name != "skin_fold_at"),
)
def test_a_distractor_is_visible_and_not_a_finding(distractors: Distractors) -> None:
    plain = _case(2)
    before, _ = _seen(plain, 256)
    after, thorax = _seen(replace(plain, distractors=distractors), 256)
    change = np.abs(after - before)
    assert np.sort(change.ravel())[-8:].mean() > 10
    assert change.mean() < 2
    for side in ("left", "right"):
        if side in vars(distractors).values():
            other = SIDES[1 - SIDES.index(side)]
            assert change[thorax.on(side) > 0].max() > change[thorax.on(other) > 0].max()


def test_the_letters_of_the_marker_are_drawn() -> None:
    case = _case(0)
    film = replace(case.film, marker="L", marker_x=0.85, marker_y=0.12, marker_turn=0.0)
    before, after = (render(replace(case, film=film), 256).astype(int) for film in (case.film, film))
    rows, columns = np.nonzero(after - before > 60)
    assert len(rows) > 10
    assert 0.8 < columns.mean() / 256 < 0.92
    assert 0.05 < rows.mean() / 256 < 0.2


def test_the_version_of_the_drawing_matches_the_films() -> None:
    drawn = json.dumps([(case.as_dict(), report.text) for case, report in (synthetic_study(0, i) for i in range(40))])
    films = [float(render(synthetic_study(0, i)[0], 32).mean()) for i in range(4)]
    # Another digest, or other means: DRAWING grows, and the changelog says that films differ.
    assert DRAWING == 2
    assert hashlib.sha256(drawn.encode()).hexdigest()[:16] == "718ea3d8d2172b91"
    assert films == pytest.approx([113.9, 129.3, 112.1, 101.3], abs=0.5)
