"""Writes reports of synthetic studies: findings and impression from the parameters of the image.

Present findings have side, place and size; subtle findings are hedged; some absent findings are denied, as in real
reports. There are no comparisons with earlier films.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emrrg_cli.phantom.parameters import SIDES, Case
from emrrg_cli.phantom.phrases import Phrase, Phrases

# Probability that the absence of a finding is mentioned, and its names.
_DENIED: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    ("consolidation", 0.75, ("focal consolidation", "airspace consolidation", "focal airspace disease")),
    ("edema", 0.25, ("pulmonary edema", "overt edema")),
    ("nodule", 0.12, ("pulmonary nodule", "suspicious nodule")),
    ("pleural_effusion", 0.9, ("pleural effusion", "effusion")),
    ("pneumothorax", 0.92, ("pneumothorax",)),
)
_NORMAL = (
    "No acute cardiopulmonary abnormality.",
    "No acute cardiopulmonary process.",
    "No acute disease.",
    "Normal chest radiograph.",
    "No radiographic evidence of acute cardiopulmonary disease.",
    "No acute findings in the chest.",
    "Unremarkable examination of the chest.",
)


@dataclass(frozen=True)
class Report:
    """A synthetic report; `text` is findings, then impression."""

    findings: str
    impression: str

    @property
    def text(self) -> str:
        """Both sections."""
        return f"{self.findings} {self.impression}"


def write_report(case: Case, rng: np.random.Generator) -> Report:
    """Writes one of many possible reports of a case; depends only on the case and the random generator."""
    return _Writer(case, rng).report()


class _Writer:
    def __init__(self, case: Case, rng: np.random.Generator) -> None:
        self.case, self.found, self.words = case, case.findings, Phrases(rng)
        self.pick, self.chance = self.words.pick, self.words.chance

    def report(self) -> Report:
        heart = [*self.heart(), *self.mediastinum()]
        lungs, pleura = self.lungs(), self.pleura()
        body = heart + lungs + pleura if self.chance(0.55) else lungs + pleura + heart
        body += self.denials() + [f"{text}." for text in self.words.distractors(self.case.distractors)] + self.bones()
        devices = [f"{self.words.device(d)}." for d in self.found.devices]
        body = devices + body if self.chance(0.6) else body + devices
        return Report(" ".join(self.technique() + body), " ".join(self.impression()))

    # Sentences

    def state(self, phrase: Phrase) -> str:
        """Returns a sentence that states a finding as present or possible."""
        it, noun = phrase.with_article(), phrase.text
        be = "are" if phrase.plural else "is"
        if phrase.subtle:
            return _sentence(
                self.pick(
                    (
                        f"possible {noun}",
                        f"{it} cannot be excluded",
                        f"there may be {it}",
                        f"{it} {be} suspected",
                        f"questionable {noun}",
                    )
                )
            )
        return _sentence(
            self.pick(
                (f"there {be} {it}", f"there {be} {it}", f"{it} {be} seen", f"{it} {be} present", f"{it} {be} noted")
            )
        )

    def technique(self) -> list[str]:
        if not self.chance(0.6 if self.case.lateral else 0.4):
            return []
        if self.case.lateral:
            return [
                self.pick(
                    ("PA and lateral views of the chest.", "Frontal and lateral views.", "Two views of the chest.")
                )
            ]
        if self.case.film.view == "AP":
            return [self.pick(("Portable AP view of the chest.", "Single AP view of the chest.", "AP radiograph."))]
        return [self.pick(("PA view of the chest.", "Single frontal view of the chest.", "PA radiograph."))]

    def heart(self) -> list[str]:
        if self.found.cardiomegaly:
            return [f"{self.words.large_heart(self.found.cardiomegaly)}."]
        if self.found.ctr - (0.04 if self.case.film.view == "AP" else 0) > 0.472:
            return [self.pick(("Heart size is at the upper limits of normal.", "The heart size is top normal."))]
        return [
            self.pick(
                (
                    "The heart size is normal.",
                    "Heart size is within normal limits.",
                    "The heart is normal in size.",
                    "The heart is not enlarged.",
                    "Cardiac silhouette is normal in size.",
                    "The cardiomediastinal silhouette is unremarkable.",
                    "No cardiomegaly.",
                )
            )
        ]

    def mediastinum(self) -> list[str]:
        sentences = []
        large = [e.side for e in self.found.effusions if e.level > 0.7]
        if large:
            away = SIDES[1 - SIDES.index(large[0])]
            sentences.append(f"The mediastinum is shifted to the {away}.")
        elif self.chance(0.4):
            sentences.append(
                self.pick(
                    (
                        "The mediastinal contours are normal.",
                        "The trachea is midline.",
                        "Mediastinum is unremarkable.",
                        "Hilar contours are normal.",
                    )
                )
            )
        return sentences

    def lungs(self) -> list[str]:
        found = self.found
        phrases = [self.words.consolidation(c) for c in found.consolidations]
        if found.edema:
            phrases.append(self.words.edema(found.edema))
        if found.atelectases:
            phrases.append(self.words.atelectases(found.atelectases))
        if found.nodule:
            phrases.append(self.words.nodule(found.nodule))
        if not phrases:
            clear = ("The lungs are clear.", "Lungs are clear bilaterally.", "The lungs are well expanded and clear.")
            return [self.pick(clear)] if self.chance(0.8) and not (found.effusions or found.pneumothorax) else []
        sentences = [self.state(phrase) for phrase in phrases]
        if found.consolidations and self.chance(0.3):
            cause = "pneumonia" if not found.consolidations[0].subtle else "early pneumonia"
            sentences.append(self.pick((f"This may represent {cause}.", f"Findings are compatible with {cause}.")))
        sides = {c.side for c in found.consolidations} | {a.side for a in found.atelectases}
        sides |= {e.side for e in found.effusions} | ({found.nodule.side} if found.nodule else set())
        sides |= {found.pneumothorax.side} if found.pneumothorax else set()
        if not found.edema:
            if len(sides) == 1 and self.chance(0.4):
                other = SIDES[1 - SIDES.index(next(iter(sides)))]
                sentences.append(f"The {other} lung is clear.")
            elif self.chance(0.25):
                sentences.append("The lungs are otherwise clear.")
        return sentences

    def pleura(self) -> list[str]:
        sentences = []
        found = self.found
        if found.effusions:
            single = found.effusions[0] if len(found.effusions) == 1 else None
            if single and single.amount == "small" and not single.subtle and self.chance(0.35):
                sentences.append(
                    f"Blunting of the {single.side} costophrenic angle is consistent with a small pleural effusion."
                )
            else:
                sentences.append(self.state(self.words.effusions(found.effusions)))
        if found.pneumothorax:
            sentences.append(self.state(self.words.pneumothorax(found.pneumothorax)))
            if found.pneumothorax.amount != "small" and self.chance(0.35):
                sentences.append(f"The pleural line is visible along the {found.pneumothorax.side} chest wall.")
        return sentences

    def denials(self) -> list[str]:
        present = self.found.labels()
        names = [self.pick(n) for label, p, n in _DENIED if label not in present and self.chance(p)]
        if len(names) > 3 or (len(names) == 3 and self.chance(0.25)):
            return [self.deny(names[:-2]), self.deny(names[-2:])]
        return [self.deny(names)] if names else []

    def deny(self, names: list[str]) -> str:
        joined = " or ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])}, or {names[-1]}"
        forms = [
            f"No {joined}.",
            f"There is no {joined}.",
            f"No evidence of {joined}.",
            f"No {joined} is seen.",
            f"Negative for {joined}.",
        ]
        if len(names) == 2:
            forms.append(f"Neither {names[0]} nor {names[1]} is identified.")
        if len(names) == 1:
            forms.append(f"{_sentence(names[0])[:-1]} is not seen.")
        return self.pick(forms)

    def bones(self) -> list[str]:
        if self.case.distractors.rib_callus or not self.chance(0.5):
            return []
        return [
            self.pick(
                (
                    "The osseous structures are intact.",
                    "No acute bony abnormality.",
                    "The bony thorax is unremarkable.",
                    "Visualized bones are intact.",
                    "No displaced rib fracture.",
                )
            )
        ]

    def impression(self) -> list[str]:
        found, lines = self.found, []
        if found.pneumothorax:
            lines.append(self.summary(self.words.pneumothorax(found.pneumothorax)))
        for consolidation in found.consolidations:
            phrase = self.words.consolidation(consolidation)
            tail = self.pick(("", "", ", suspicious for pneumonia", ", likely pneumonia"))
            lines.append(self.summary(Phrase(phrase.text + tail, phrase.plural, phrase.subtle)))
        if found.cardiomegaly and found.edema and self.chance(0.4):
            lines.append(self.summary(Phrase(f"cardiomegaly with {self.words.edema(found.edema).text}", subtle=False)))
        else:
            if found.cardiomegaly:
                lines.append(self.pick(("Cardiomegaly.", f"{found.cardiomegaly.capitalize()} cardiomegaly.")))
            if found.edema:
                lines.append(self.summary(self.words.edema(found.edema)))
        if found.effusions:
            lines.append(self.summary(self.words.effusions(found.effusions)))
        if found.nodule:
            advice = self.pick(("", ", CT is suggested", ", follow-up is suggested"))
            phrase = self.words.nodule(found.nodule)
            lines.append(self.summary(Phrase(phrase.text + advice, subtle=phrase.subtle)))
        if found.atelectases:
            lines.append(self.summary(self.words.atelectases(found.atelectases)))
        if not lines:
            return [self.pick(_NORMAL)]
        if not found.pneumothorax and self.chance(0.12):
            lines.append("No pneumothorax.")
        return lines

    def summary(self, phrase: Phrase) -> str:
        hedge = self.pick(("possible ", "questionable ", "suspected ")) if phrase.subtle else ""
        return _sentence(hedge + phrase.text)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
