"""What the labels mean: the written policy of the rule-based labeler, and how mentions become one label.

The labeler is our own. It is neither CheXbert nor CheXpert's labeler, its labels are not theirs, and scores computed
with it must not be presented as CheXbert F1. It uses their 14 names so that tables can stand side by side.

Answers
    positive, uncertain, negative, or None where the report does not speak of the observation. Over several mentions
    the strongest one counts: positive, then uncertain, then negative.

Certainty
    * Likely, probable, presumed, consistent with, compatible with, apparent: positive.
    * May, might, could, possible, questionable, suspected, suspicious for, suggesting, concerning for, cannot be
      excluded, not excluded, borderline, a differential ("X versus Y", "X or Y" without a negation): uncertain.
    * Mild, small, trace, chronic, stable, unchanged, improved, decreasing, resolving, "right greater than left": the
      finding is there, positive. "No change in X" and "no interval change in X" also say that X is there.
    * Resolved, cleared, no longer seen, removed, "interval resolution of X": negative.
    * No large, definite, focal, acute, overt, displaced, new X: negative. A double negation ("not without X") is
      positive, "without definite X" is negative, "unlikely" is negative.

Not current
    * History of X, status post X, prior or previous X, treated X: None, unless X is said to be still there
      ("previously seen X is unchanged" is positive, "previously seen X has resolved" is negative).
    * Evaluate for X, rule out X, to exclude X, if X is suspected, evaluation for X is limited: None.
    * Prior, old, remote and healed fractures are still visible: Fracture positive.
    * "Postoperative changes" and "status post sternotomy" say nothing; wires, clips and other material left in the
      body are Support Devices. A device that was removed is negative.

Normality
    * "Lungs are clear": Lung Opacity and Consolidation negative. "Pleural spaces are clear": Pleural Effusion and
      Pneumothorax negative. "Costophrenic angles are sharp": Pleural Effusion negative.
    * "Heart size is normal", also "upper limits of normal" and "top normal": Cardiomegaly negative. "Borderline heart
      size": uncertain. A "cardiomediastinal silhouette", normal or enlarged, speaks of the heart and of the
      mediastinum: Cardiomegaly and Enlarged Cardiomediastinum. "Stable" alone says nothing of its size.
    * "Pulmonary vascularity is normal": Edema negative. "Bones are intact", "no acute bony abnormality": Fracture
      negative. "No acute cardiopulmonary abnormality" speaks of no single observation.

What belongs to which observation
    * No observation implies another: Pneumonia, Edema, Atelectasis and Consolidation do not make Lung Opacity positive,
      Cardiomegaly does not make Enlarged Cardiomediastinum positive. Each needs words of its own.
    * Enlarged Cardiomediastinum: a wide, prominent or enlarged mediastinum. Not a tortuous aorta, not the hila.
    * Lung Lesion: nodule, nodular opacity, mass, tumor, metastasis, also when calcified. A granuloma is none (as in
      CheXpert's list of phrases), nor is a mass outside the lung, nor a nipple shadow.
    * Lung Opacity: opacity, density, infiltrate, airspace disease, prominent interstitial markings, interstitial
      disease, scarring and fibrosis of the lung (CheXpert's list puts fibrosis under Pleural Other), bronchial wall
      thickening. A nodular opacity is a Lung Lesion only. Airspace disease is no Consolidation.
    * Edema: pulmonary edema, vascular congestion, engorgement, redistribution or prominence, heart failure, fluid
      overload. Not edema of soft tissue. Heart failure does not make Cardiomegaly uncertain, as it does in CheXpert.
    * Pneumonia: pneumonia, infection, infectious process.
    * Atelectasis: atelectasis, and collapse of a lung or lobe. Not collapse of a vertebra, not volume loss alone.
    * Pleural Effusion: pleural effusion or fluid, hemothorax, hydropneumothorax (which is Pneumothorax too), empyema.
      Blunting of a costophrenic angle: uncertain. Pericardial effusion is none.
    * Pleural Other: pleural thickening, plaque, scarring or calcification, apical cap, fibrothorax.
    * Fracture: fractures of any age of ribs, spine, sternum and shoulder girdle, not of hands, hips or legs, nor of a
      catheter or wire. A wedge or compression deformity is none unless it is called a fracture.
    * Support Devices: lines, tubes, catheters, ports, pacemakers, valves, stents, wires, clips, hardware, joint
      prostheses. Breast implants are none.
    * No Finding: positive when no observation but Support Devices is positive or uncertain and something in the report
      is negative or said to be normal; otherwise None. Findings outside the 14 (scoliosis, granuloma) do not matter,
      as in CheXpert.
"""

from __future__ import annotations

from typing import Literal

Label = Literal["positive", "negative", "uncertain"]

OBSERVATIONS: tuple[str, ...] = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Lesion",
    "Lung Opacity",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
FIVE: tuple[str, ...] = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")

_STRENGTH: dict[Label | None, int] = {None: 0, "negative": 1, "uncertain": 2, "positive": 3}


def stronger(one: Label | None, other: Label | None) -> Label | None:
    """The label that counts when a report mentions an observation twice: positive, uncertain, negative, None."""
    return one if _STRENGTH[one] >= _STRENGTH[other] else other


def no_finding(labels: dict[str, Label | None], normal: bool) -> Label | None:
    """Label of No Finding.

    Args:
        labels: Labels of the other 13 observations.
        normal: Whether the report calls something normal.
    """
    found = [label for name, label in labels.items() if name not in ("No Finding", "Support Devices")]
    if any(label in ("positive", "uncertain") for label in found):
        return None
    return "positive" if normal or "negative" in found else None
