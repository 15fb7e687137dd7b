"""The policy of the rule-based labeler: what the labels mean, and how several mentions become one label.

The labeler is our own. It is neither CheXbert nor CheXpert's labeler, its labels are not theirs, and scores computed
with it must not be presented as CheXbert F1. It uses their 14 names so that tables can be compared.

Labels
    positive, uncertain, negative, or None if the report does not mention the observation. If there are several
    mentions, the strongest one counts: positive, then uncertain, then negative.

Certainty
    * Likely, probable, presumed, consistent with, compatible with, apparent: positive.
    * May, might, could, possible, questionable, suspected, suspicious for, suggesting, concerning for, cannot be
      excluded, not excluded, borderline, a differential ("X versus Y", "X or Y" without a negation): uncertain.
    * Mild, small, trace, chronic, stable, unchanged, improved, decreasing, resolving, "right greater than left": the
      finding is present, positive. "No change in X" and "no interval change in X" also mean that X is present.
    * Resolved, cleared, no longer seen, removed, "interval resolution of X": negative.
    * No large, definite, focal, acute, overt, displaced, new X: negative. A double negation ("not without X") is
      positive, "without definite X" is negative, "unlikely" is negative.

Not current
    * History of X, status post X, prior or previous X, treated X: None, unless the report says that X is still present
      ("previously seen X is unchanged" is positive, "previously seen X has resolved" is negative).
      No history of X: None.
    * Evaluate for X, rule out X, to exclude X, if X is suspected, evaluation for X is limited: None.
    * Prior, old, remote and healed fractures are still visible: Fracture positive.
    * "Postoperative changes" and "status post sternotomy" give no label; wires, clips and other material left in the
      body are Support Devices. A device that was removed is negative.

Normality
    * "Lungs are clear": Lung Opacity and Consolidation negative. "Pleural spaces are clear": Pleural Effusion and
      Pneumothorax negative. "Costophrenic angles are sharp": Pleural Effusion negative.
    * "Heart size is normal", also "upper limits of normal" and "top normal": Cardiomegaly negative. "Borderline heart
      size": uncertain. A "cardiomediastinal silhouette", normal or enlarged, labels both heart and mediastinum:
      Cardiomegaly and Enlarged Cardiomediastinum. "Stable" alone does not describe its size.
    * "Pulmonary vascularity is normal": Edema negative. "Bones are intact", "no acute bony abnormality": Fracture
      negative. "No acute cardiopulmonary abnormality" labels no single observation.

Definition of each observation
    * No observation implies another: Pneumonia, Edema, Atelectasis and Consolidation do not make Lung Opacity positive,
      Cardiomegaly does not make Enlarged Cardiomediastinum positive. Each must be mentioned itself.
    * Enlarged Cardiomediastinum: a wide, prominent or enlarged mediastinum. Not a tortuous aorta, not the hila.
    * Lung Lesion: nodule, nodular opacity, mass, tumor, metastasis, also when calcified. Not a granuloma (as in
      CheXpert's list of phrases), a mass outside the lung, or a nipple shadow.
    * Lung Opacity: opacity, density, infiltrate, airspace disease, prominent interstitial markings, interstitial
      disease, scarring and fibrosis of the lung (CheXpert's list puts fibrosis under Pleural Other), bronchial wall
      thickening. A nodular opacity is only a Lung Lesion. Airspace disease is not Consolidation.
    * Edema: pulmonary edema, vascular congestion, engorgement, redistribution or prominence, heart failure, fluid
      overload. Not edema of soft tissue. Heart failure does not make Cardiomegaly uncertain, as it does in CheXpert.
    * Pneumonia: pneumonia, infection, infectious process.
    * Atelectasis: atelectasis, and collapse of a lung or lobe. Not collapse of a vertebra, not volume loss alone.
    * Pleural Effusion: pleural effusion or fluid, hemothorax, hydropneumothorax (which is Pneumothorax too), empyema.
      Blunting of a costophrenic angle: uncertain. Not pericardial effusion.
    * Pleural Other: pleural thickening, plaque, scarring or calcification, apical cap, fibrothorax.
    * Fracture: fractures of any age of ribs, spine, sternum and shoulder girdle, but not of hands, hips or legs, or of
      a catheter or wire. A wedge or compression deformity counts only if it is called a fracture.
    * Support Devices: lines, tubes, catheters, ports, pacemakers, valves, stents, wires, clips, hardware, joint
      prostheses. Not breast implants.
    * No Finding: positive if no observation except Support Devices is positive or uncertain, and the report calls
      something negative or normal; otherwise None. Findings outside the 14 (scoliosis, granuloma) are ignored, as in
      CheXpert.
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
ABNORMAL: tuple[str, ...] = tuple(name for name in OBSERVATIONS if name != "No Finding")
FIVE: tuple[str, ...] = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")

_STRENGTH: dict[Label | None, int] = {None: 0, "negative": 1, "uncertain": 2, "positive": 3}


def stronger(one: Label | None, other: Label | None) -> Label | None:
    """Returns the stronger of two labels of one observation; the order is positive, uncertain, negative, None."""
    return one if _STRENGTH[one] >= _STRENGTH[other] else other


def no_finding(labels: dict[str, Label | None], normal: bool) -> Label | None:
    """Computes the label of No Finding.

    Args:
        labels: Labels of the other 13 observations.
        normal: Whether the report calls something normal.
    """
    found = [label for name, label in labels.items() if name not in ("No Finding", "Support Devices")]
    if any(label in ("positive", "uncertain") for label in found):
        return None
    return "positive" if normal or "negative" in found else None
