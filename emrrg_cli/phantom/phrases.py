"""Noun phrases for findings in the style of radiology reports, several for each finding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emrrg_cli.phantom.parameters import (
    Amount,
    Atelectasis,
    Consolidation,
    Device,
    Distractors,
    Edema,
    Effusion,
    Nodule,
    Pneumothorax,
    Severity,
    Side,
    Zone,
)

_AMOUNT: dict[Amount, tuple[str, ...]] = {
    "small": ("small", "small", "minimal"),
    "moderate": ("moderate", "moderate-sized"),
    "large": ("large", "sizable"),
}
_SEVERITY: dict[Severity, tuple[str, ...]] = {
    "mild": ("mild", "mild", "slight"),
    "moderate": ("moderate",),
    "severe": ("severe", "marked"),
}
_ADVERB: dict[Severity, str] = {"mild": "mildly", "moderate": "moderately", "severe": "markedly"}
_PLACES: dict[tuple[Side, Zone], tuple[str, ...]] = {
    ("right", "upper"): ("right upper lobe", "right upper lung zone"),
    ("right", "mid"): ("right middle lobe", "right mid lung"),
    ("right", "lower"): ("right lower lobe", "right lung base"),
    ("left", "upper"): ("left upper lobe", "left upper lung zone"),
    ("left", "mid"): ("left mid lung", "lingula"),
    ("left", "lower"): ("left lower lobe", "left lung base"),
}


@dataclass(frozen=True)
class Phrase:
    """A noun phrase for a present finding."""

    text: str
    plural: bool = False
    subtle: bool = False
    countable: bool = True

    def with_article(self) -> str:
        """Returns the phrase with its article, such as `a small left pleural effusion`; plurals have no article."""
        if self.plural or not self.countable:
            return self.text
        # Eight and eleven also begin with a vowel.
        vowel = self.text[0] in "aeiou" or self.text.split()[0] in ("8", "11", "18")
        return f"{'an' if vowel else 'a'} {self.text}"


class Phrases:
    """Chooses phrases; every choice is a draw from `rng`."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def pick(self, options: Sequence[str]) -> str:
        """Draws one of the options with equal probability."""
        return options[int(self.rng.integers(len(options)))]

    def chance(self, p: float) -> bool:
        """Returns True with probability `p`."""
        return bool(self.rng.random() < p)

    def place(self, side: Side, zone: Zone) -> str:
        """Returns a place such as `right upper lobe`."""
        return self.pick(_PLACES[side, zone])

    def effusions(self, found: tuple[Effusion, ...]) -> Phrase:
        """Returns one phrase for effusions on one side or both."""
        subtle = all(e.subtle for e in found)
        if len(found) == 1:
            size = "trace" if subtle and self.chance(0.4) else self.pick(_AMOUNT[found[0].amount])
            return Phrase(f"{size} {found[0].side} pleural effusion", subtle=subtle)
        first, second = found
        if first.amount == second.amount:
            return Phrase(f"{self.pick(_AMOUNT[first.amount])} bilateral pleural effusions", True, subtle)
        more = max(found, key=lambda e: e.level).side
        if self.chance(0.5):
            return Phrase(f"bilateral pleural effusions {self.pick(('larger', 'greater'))} on the {more}", True, subtle)
        text = f"{first.amount} {first.side} and {second.amount} {second.side} pleural effusions"
        return Phrase(text, True, subtle)

    def pneumothorax(self, found: Pneumothorax) -> Phrase:
        """Returns size and side; a small pneumothorax is at the apex."""
        size = self.pick(_AMOUNT[found.amount])
        apical = "apical " if found.amount == "small" and self.chance(0.6) else ""
        return Phrase(f"{size} {found.side} {apical}pneumothorax", subtle=found.subtle)

    def consolidation(self, found: Consolidation) -> Phrase:
        """Returns density and place, and bronchograms if it is dense."""
        place = self.place(found.side, found.zone)
        if found.subtle:
            how = self.pick(("faint", "hazy", "ill-defined"))
        elif found.density > 0.75:
            how = self.pick(("dense", "confluent"))
        else:
            how = self.pick(("patchy", "focal"))
        tail = " with air bronchograms" if found.density > 0.75 and self.chance(0.4) else ""
        kind = int(self.rng.integers(4))
        if kind == 0:
            return Phrase(f"{how} {place} consolidation{tail}", subtle=found.subtle, countable=False)
        if kind == 1:
            return Phrase(f"{how} consolidation in the {place}{tail}", subtle=found.subtle, countable=False)
        if kind == 2:
            return Phrase(f"{how} airspace opacity in the {place}{tail}", subtle=found.subtle)
        return Phrase(f"{how} {place} airspace opacity{tail}", subtle=found.subtle)

    def nodule(self, found: Nodule) -> Phrase:
        """Returns size in mm and place."""
        place, size = self.place(found.side, found.zone), found.diameter_mm
        shape = self.pick(("", "round ", "well-defined ")) if not found.subtle else ""
        return Phrase(
            self.pick(
                (
                    f"{size} mm {shape}nodule in the {place}",
                    f"{shape}nodule in the {place} measuring {size} mm",
                    f"{size} mm {place} nodule",
                    f"{shape}{place} nodule measuring about {size} mm",
                )
            ),
            subtle=found.subtle,
        )

    def edema(self, found: Edema) -> Phrase:
        """Returns severity, with or without a description."""
        how = self.pick(_SEVERITY[found.severity])
        kind = "interstitial" if found.severity == "mild" and self.chance(0.5) else "pulmonary"
        return Phrase(
            self.pick(
                (
                    f"{how} {kind} edema",
                    f"{how} {kind} edema with indistinct perihilar vessels",
                    f"vascular congestion with {how} {kind} edema",
                    f"indistinct pulmonary vessels consistent with {how} {kind} edema",
                )
            ),
            subtle=found.subtle,
            countable=False,
        )

    def atelectases(self, found: tuple[Atelectasis, ...]) -> Phrase:
        """Returns shape and base, for one side or both."""
        subtle = all(a.subtle for a in found)
        bands = any(a.shape == "band" for a in found)
        shape = self.pick(("band-like", "broad")) if bands else self.pick(("linear", "plate-like", "subsegmental"))
        if len(found) == 2:
            where = self.pick(("at both bases", "in both lower lobes"))
            text = f"bibasilar {shape} atelectasis" if self.chance(0.5) else f"{shape} atelectasis {where}"
            return Phrase(text, subtle=subtle, countable=False)
        side = found[0].side
        text = self.pick((f"{shape} atelectasis at the {side} base", f"{shape} atelectasis in the {side} lower lobe"))
        if bands and self.chance(0.4):
            text += f" with elevation of the {side} hemidiaphragm"
        return Phrase(text, subtle=subtle, countable=False)

    def large_heart(self, severity: Severity) -> str:
        """Returns a sentence without its full stop."""
        how = self.pick(_SEVERITY[severity])
        return self.pick(
            (
                f"The heart is {_ADVERB[severity]} enlarged",
                f"The cardiac silhouette is {_ADVERB[severity]} enlarged",
                f"There is {how} cardiomegaly",
                f"{how.capitalize()} enlargement of the cardiac silhouette",
                f"{how.capitalize()} cardiomegaly is present",
            )
        )

    def device(self, found: Device) -> str:
        """Returns a sentence without its full stop: the device and the place of its tip."""
        if found.misplaced:
            return self.misplaced(found)
        if found.kind == "endotracheal tube":
            height = round(4.5 - 1.5 * found.wander)
            return self.pick(
                (
                    f"The endotracheal tube tip is {height} cm above the carina",
                    f"An endotracheal tube is in place with its tip {height} cm above the carina",
                    "An endotracheal tube terminates in the mid trachea",
                )
            )
        if found.kind == "nasogastric tube":
            return self.pick(
                (
                    "A nasogastric tube extends into the stomach",
                    "The nasogastric tube courses below the diaphragm",
                    "An enteric tube passes below the left hemidiaphragm",
                )
            )
        if found.kind == "central line":
            vessel = "internal jugular" if found.wander > 0 else "subclavian"
            return self.pick(
                (
                    f"A {found.side} {vessel} central venous catheter terminates in the superior vena cava",
                    f"A {found.side}-sided central line ends in the superior vena cava",
                    f"The tip of a {found.side} {vessel} central line projects over the superior vena cava",
                )
            )
        return self.pick(
            (
                f"A {found.side}-sided pacemaker is present with leads over the right atrium and right ventricle",
                f"A {found.side} chest wall dual-lead pacemaker is in place",
                f"There is a dual-lead pacemaker on the {found.side}",
            )
        )

    def misplaced(self, found: Device) -> str:
        """Returns a sentence without its full stop about a misplaced tube or line."""
        if found.kind == "endotracheal tube":
            return self.pick(
                (
                    "The endotracheal tube terminates in the right main bronchus and should be withdrawn",
                    "The tip of the endotracheal tube lies in the right main bronchus",
                )
            )
        if found.kind == "nasogastric tube":
            return self.pick(
                (
                    "The nasogastric tube ends in the esophagus and should be advanced",
                    "The tip of the enteric tube projects over the distal esophagus",
                )
            )
        return self.pick(
            (
                f"A {found.side}-sided central line extends into the right atrium",
                f"The tip of the {found.side} central venous catheter projects over the right atrium",
            )
        )

    def distractors(self, found: Distractors) -> list[str]:
        """Returns sentences without full stops about distractors; each is mentioned half of the time."""
        options: list[tuple[object, tuple[str, ...]]] = [
            (found.skin_fold, (f"A skin fold overlies the {found.skin_fold} chest",)),
            (found.nipples, ("Nipple shadows project over the lung bases", "Nipple shadows are seen bilaterally")),
            (found.granuloma, (f"Calcified granuloma in the {found.granuloma} lung",)),
            (found.calcified_nodes, (f"Calcified {found.calcified_nodes} hilar lymph nodes",)),
            (found.rib_callus, (f"Old healed {found.rib_callus} rib fracture",)),
        ]
        return [self.pick(texts) for present, texts in options if present and self.chance(0.5)]
