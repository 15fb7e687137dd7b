"""Draws the parameters of synthetic studies: anatomy, findings and film."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeVar

import numpy as np

from emrrg_cli.phantom.parameters import (
    SIDES,
    ZONES,
    Amount,
    Anatomy,
    Atelectasis,
    Case,
    Consolidation,
    Device,
    DeviceKind,
    Distractors,
    Edema,
    Effusion,
    Film,
    Findings,
    Nodule,
    Pneumothorax,
    Severity,
    Side,
    View,
    Zone,
)

T = TypeVar("T")

_SEVERITIES: tuple[Severity, ...] = ("mild", "moderate", "severe")
_AMOUNTS: tuple[Amount, ...] = ("small", "moderate", "large")

# Types of studies with their probabilities. Findings occur together: effusion with heart failure, atelectasis with
# effusion, tubes with bedside films.
_STORIES: tuple[tuple[str, float], ...] = (
    ("normal", 0.41),
    ("failure", 0.12),
    ("pneumonia", 0.12),
    ("effusion", 0.06),
    ("pneumothorax", 0.08),
    ("nodule", 0.07),
    ("atelectasis", 0.05),
    ("large heart", 0.04),
    ("intensive care", 0.05),
)


def draw_case(rng: np.random.Generator, *, plain: bool = False) -> Case:
    """Draws one study; `plain`: one frontal film that differs less from others, without distractors."""
    names, weights = zip(*_STORIES, strict=True)
    story = names[int(rng.choice(len(names), p=weights))]
    view: View = "AP" if rng.random() < (0.95 if story == "intensive care" else 0.22) else "PA"
    draw = _Draw(rng, view, spread=0.4 if plain else 1.0)
    findings = draw.findings(story)
    if plain:
        film = replace(draw.film(view, anatomy := draw.anatomy()), equalise=0.2, marker="")
        return Case(anatomy, film, findings, texture_seed=int(rng.integers(2**31)))
    two = view == "PA" and draw.chance(0.55)  # bedside studies have one film
    anatomy = draw.anatomy()
    return Case(
        anatomy,
        draw.film(view, anatomy),
        findings,
        texture_seed=int(rng.integers(2**31)),
        distractors=draw.distractors(),
        lateral=draw.film("LATERAL", anatomy) if two else None,
    )


class _Draw:
    def __init__(self, rng: np.random.Generator, view: View, spread: float) -> None:
        self.rng, self.view, self.spread = rng, view, spread
        self.taken: set[tuple[Side, Zone]] = set()  # zones that already have a finding

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def between(self, low: float, high: float) -> float:
        # Rounded, so that JSON has exactly the drawn values.
        return round(float(self.rng.uniform(low, high)), 4)

    def about(self, mean: float, spread: float) -> float:
        """Draws from a normal distribution, limited to two standard deviations."""
        return round(float(mean + self.spread * spread * np.clip(self.rng.standard_normal(), -2, 2)), 4)

    def pick(self, options: tuple[T, ...], p: tuple[float, ...] | None = None) -> T:
        return options[int(self.rng.choice(len(options), p=p))]

    def side(self) -> Side:
        return self.pick(SIDES)

    # Findings

    def findings(self, story: str) -> Findings:
        heart, large = self.heart(False), self.heart(True)
        found = heart
        if story == "failure":
            found = large if self.chance(0.85) else heart
            if self.chance(0.75):
                found = replace(found, edema=self.edema())
            if self.chance(0.6):
                found = self.with_effusions(found, both=0.7)
            if self.chance(0.3):
                found = self.with_device(found, "pacemaker")
        elif story == "pneumonia":
            found = self.with_consolidation(found)
            if self.chance(0.2):
                found = self.with_consolidation(found)
            if self.chance(0.3):
                found = self.with_effusions(found, both=0.1)
        elif story == "effusion":
            found = self.with_effusions(large if self.chance(0.2) else heart, both=0.3)
            if self.chance(0.45):
                found = self.with_atelectasis(found)
        elif story == "pneumothorax":
            found = self.with_pneumothorax(found)
            if self.chance(0.3):
                found = self.with_atelectasis(found)
        elif story == "nodule":
            found = self.with_nodule(found)
        elif story == "atelectasis":
            found = self.with_atelectasis(found)
            if self.chance(0.4):
                found = self.with_atelectasis(found)
        elif story == "large heart":
            found = large
            if self.chance(0.35):
                found = self.with_device(found, "pacemaker")
        elif story == "intensive care":
            found = self.intensive_care(large if self.chance(0.3) else heart)
        if story not in ("normal", "intensive care"):
            found = self.company(found)
        elif story == "normal" and self.chance(0.06):
            found = self.with_device(found, self.pick(("central line", "pacemaker")))
        return found

    def intensive_care(self, found: Findings) -> Findings:
        if self.chance(0.7):
            found = self.with_device(found, "endotracheal tube")
        if self.chance(0.7):
            found = self.with_device(found, "nasogastric tube")
        if self.chance(0.7) or not found.devices:
            found = self.with_device(found, "central line")
        if self.chance(0.3):
            found = replace(found, edema=self.edema())
        if self.chance(0.3):
            found = self.with_consolidation(found)
        if self.chance(0.4):
            found = self.with_effusions(found, both=0.5)
        if self.chance(0.45):
            found = self.with_atelectasis(found)
        if self.chance(0.12):
            found = self.with_pneumothorax(found)
        return found

    def company(self, found: Findings) -> Findings:
        """Adds findings that occur by chance."""
        if not found.cardiomegaly and self.chance(0.07):
            size = self.heart(True)
            found = replace(found, ctr=size.ctr, cardiomegaly=size.cardiomegaly)
        if not found.devices and self.chance(0.09):
            found = self.with_device(found, self.pick(("central line", "pacemaker")))
        if found.nodule is None and found.edema is None and self.chance(0.03):
            found = self.with_nodule(found)
        if not found.atelectases and self.chance(0.05):
            found = self.with_atelectasis(found)
        return found

    def heart(self, large: bool) -> Findings:
        more = 0.04 if self.view == "AP" else 0.0
        if not large:
            return Findings(ctr=round(self.between(0.395, 0.496) + more, 4))
        severity = self.pick(_SEVERITIES, (0.45, 0.35, 0.2))
        low, high = {"mild": (0.542, 0.575), "moderate": (0.58, 0.63), "severe": (0.635, 0.71)}[severity]
        return Findings(ctr=round(self.between(low, high) + more, 4), cardiomegaly=severity)

    def edema(self) -> Edema:
        severity = self.pick(_SEVERITIES, (0.4, 0.4, 0.2))
        low, high = {"mild": (0.28, 0.45), "moderate": (0.47, 0.68), "severe": (0.7, 0.95)}[severity]
        strength = self.between(low, high)
        return Edema(severity, strength, subtle=strength < 0.4)

    def with_effusions(self, found: Findings, both: float) -> Findings:
        if self.chance(both):
            sides: tuple[Side, ...] = SIDES
        else:
            sides = (self.side(),)
        effusions = list(found.effusions)
        for side in sides:
            if any(e.side == side for e in effusions) or (found.pneumothorax and found.pneumothorax.side == side):
                continue
            if (side, "lower") in self.taken:
                continue
            amount = self.pick(_AMOUNTS, (0.5, 0.35, 0.15))
            if any(e.amount == "large" for e in effusions) and amount == "large":
                amount = "moderate"
            low, high = {"small": (0.05, 0.2), "moderate": (0.3, 0.5), "large": (0.62, 0.85)}[amount]
            level = self.between(low, high)
            effusions.append(Effusion(side, amount, level, subtle=level < 0.1))
            self.taken.add((side, "lower"))
            if amount != "small":
                self.taken.add((side, "mid"))
            if amount == "large":
                self.taken.add((side, "upper"))
        return replace(found, effusions=tuple(effusions))

    def with_pneumothorax(self, found: Findings) -> Findings:
        free: tuple[Side, ...] = tuple(s for s in SIDES if not any((s, z) in self.taken for z in ZONES))
        if not free:
            return found
        side = self.pick(free)
        amount = self.pick(_AMOUNTS, (0.45, 0.35, 0.2))
        low, high = {"small": (1.0, 1.9), "moderate": (2.3, 3.8), "large": (4.6, 7.0)}[amount]
        gap = self.between(low, high)
        self.taken |= {(side, "upper"), (side, "mid")}
        return replace(found, pneumothorax=Pneumothorax(side, amount, gap, subtle=gap < 1.3))

    def with_consolidation(self, found: Findings) -> Findings:
        place = self.free_place((0.25, 0.25, 0.5))
        if place is None:
            return found
        side, zone = place
        density = self.between(0.45, 0.95)
        one = Consolidation(
            side, zone, self.between(2.6, 4.4), density, subtle=density < 0.58, depth=self.between(0.2, 0.8)
        )
        return replace(found, consolidations=(*found.consolidations, one))

    def with_nodule(self, found: Findings) -> Findings:
        place = self.free_place((0.4, 0.35, 0.25))
        if place is None:
            return found
        side, zone = place
        size = int(self.rng.integers(9, 30))
        across, along, depth = (self.between(0.2, 0.8) for _ in range(3))
        nodule = Nodule(side, zone, size, across, along, subtle=size < 13, depth=depth)
        return replace(found, nodule=nodule)

    def with_atelectasis(self, found: Findings) -> Findings:
        free: tuple[Side, ...] = tuple(s for s in SIDES if (s, "lower") not in self.taken)
        if not free:
            return found
        side = self.pick(free)
        self.taken.add((side, "lower"))
        strength = self.between(0.45, 1.0)
        shape = "linear" if self.chance(0.6) else "band"
        one = Atelectasis(side, shape, strength, subtle=strength < 0.58)  # type: ignore[arg-type]
        return replace(found, atelectases=(*found.atelectases, one))

    def with_device(self, found: Findings, kind: DeviceKind) -> Findings:
        side: Side | None = None
        if kind == "central line":
            side = self.pick(SIDES, (0.7, 0.3))
        elif kind == "pacemaker":
            side = self.pick(SIDES, (0.15, 0.85))
        misplaced = kind != "pacemaker" and self.chance(0.15)
        return replace(found, devices=(*found.devices, Device(kind, side, self.between(-1, 1), misplaced)))

    def free_place(self, weights: tuple[float, float, float]) -> tuple[Side, Zone] | None:
        """Draws a side and a zone without a finding."""
        places = [(s, z) for s in SIDES for z in ZONES if (s, z) not in self.taken]
        if not places:
            return None
        p = np.array([weights[ZONES.index(z)] for _, z in places])
        place = places[int(self.rng.choice(len(places), p=p / p.sum()))]
        self.taken.add(place)
        return place

    # Body and film

    def anatomy(self) -> Anatomy:
        female = self.chance(0.48)
        size = self.about(0.95 if female else 1.03, 0.06)
        supine = self.view == "AP"
        wide = self.about(13.8, 0.95) * size
        apex = self.about(-9.3, 0.6) * size
        height = (self.about(26.4, 2.0) - (2.6 if supine else 0)) * size
        right = apex + height - (self.about(4.4, 0.9) + (0.5 if supine else 0)) * size
        fat = self.between(0, 1) ** 2
        r = round
        return Anatomy(
            thorax_half_width=r(wide, 3),
            lung_height=r(height, 3),
            apex=r(apex, 3),
            dome={"right": r(right, 3), "left": r(right + self.about(1.0, 0.75), 3)},
            depth=r((self.about(20.5, 1.2) + 5 * fat) * size, 3),
            body_half_width=r(wide + 2.2 + 3.0 * fat + self.between(0, 0.8), 3),
            tilt=self.about(0, 0.05 if supine else 0.035),
            rotation=self.about(0, 0.8 if supine else 0.45),
            bend=self.about(0, 0.45),
            heart_slope=self.between(0, 1) if not supine else self.between(0.5, 1),
            knob=self.about(1.75, 0.25),
            unfolded=max(0.0, self.about(0.15, 0.3)) + (0.25 if supine else 0),
            lung_density=self.about(0.27, 0.035) + (0.03 if supine else 0),
            rib_phase=self.between(0, 1),
            rib_spacing=self.about(2.85, 0.2) * size,
            rib_density=self.about(1.05, 0.2),
            breast=self.between(0.8, 3.0) if female else 0.0,
            scapula_over_lung=self.between(1.5, 4.0) if supine else self.between(-1.5, 0.8),
            clavicle_rise=self.about(5.6, 0.9) if not supine else self.about(4.2, 1.0),
            bubble=self.between(1.2, 3.0) if self.chance(0.65) else 0.0,
            vessels=self.about(1.05, 0.25),
        )

    def distractors(self) -> Distractors:
        supine = self.view == "AP"
        return Distractors(
            skin_fold=self.side() if self.chance(0.16 if supine else 0.06) else None,
            skin_fold_at=self.between(0, 1),
            nipples=self.between(0.4, 0.9) if self.chance(0.14) else 0.0,
            granuloma=self.side() if self.chance(0.1) else None,
            calcified_nodes=self.side() if self.chance(0.08) else None,
            rib_callus=self.side() if self.chance(0.08) else None,
            callus_rib=int(self.rng.integers(3, 8)),
            cartilage=self.between(0.2, 1.0) if self.chance(0.4) else 0.0,
        )

    def film(self, view: View | Literal["LATERAL"], a: Anatomy) -> Film:
        supine, lateral = view == "AP", view == "LATERAL"
        border = (0.0, 0.0, 0.0, 0.0)
        if self.chance(0.35):
            border = tuple(self.between(0, 0.05) if self.chance(0.5) else 0.0 for _ in range(4))  # type: ignore[assignment]
        # Letters are at the side of the patient that they name, often with the technologist's initials.
        left = lateral or self.chance(0.75)
        initials = self.pick(("", "", "T", " MK", " JD", " PA" if view == "PA" else " EM"))
        marker = ("L" if left else "R") + initials if self.chance(0.8) else ""
        x = self.between(0.72, 0.9) - 0.05 * len(initials) if left else self.between(0.03, 0.2)
        return Film(
            view=view,
            # The whole lungs are on the film.
            field=max(self.about(37.0 if lateral else 40.0, 2.6), round(1.28 * a.lung_height, 4)),
            shift_x=self.about(0, 1.6 if supine else 1.3),
            shift_y=round(a.apex + 0.5 * a.lung_height + self.about(0.3, 1.3), 4),
            lung_grey=self.about(0.42 if lateral else 0.265, 0.05) + (0.05 if supine else 0),
            mediastinum_grey=self.about(0.82 if lateral else 0.77, 0.05),
            scatter=self.between(0.25, 0.5) + (0.15 if supine else 0),
            noise=self.between(0.6, 1.4) * (1.4 if supine else 1.0),
            blur=self.between(0.2, 0.5) + (0.2 if supine else 0),
            collimation=border,
            equalise=self.between(0.05, 0.35 if lateral else 0.5),
            marker=marker,
            marker_x=x,
            marker_y=self.between(0.05, 0.2),
            marker_turn=self.about(0, 0.2),
        )
