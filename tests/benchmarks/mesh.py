"""Converts Open-i's manual MeSH terms of IU X-Ray to observations, to test the labeler.

The annotators indexed the positive statements of a report, from findings and impression together. A term is
`heading/qualifier/...`; terms are separated by `;`. Absent and merely possible findings mostly have no term.

Cardiomegaly: Cardiomegaly (borderline too), Cardiac Shadow with "enlarged".
Pleural Effusion: Pleural Effusion, Hydropneumothorax, Hemothorax, Hemopneumothorax, Hydrothorax, Pleural Empyema;
    Costophrenic Angle or Sulcus with "blunted", since the labeler calls that uncertain.
Pneumothorax: Pneumothorax, Hydropneumothorax, Hemopneumothorax.
Atelectasis: Pulmonary Atelectasis.
Edema: Pulmonary Edema, Pulmonary Congestion, Heart Failure.
Fracture: Fractures, Bone (healed too).

Source: Demner-Fushman et al., "Preparing a collection of radiology examinations for distribution and retrieval" (2016).
"""

from __future__ import annotations

NOT_INDEXED = "No Indexing"

_HEADINGS: dict[str, tuple[str, ...]] = {
    "Cardiomegaly": ("Cardiomegaly",),
    "Pleural Effusion": (
        "Pleural Effusion",
        "Hydropneumothorax",
        "Hemothorax",
        "Hemopneumothorax",
        "Hydrothorax",
        "Empyema, Pleural",
    ),
    "Pneumothorax": ("Pneumothorax", "Hydropneumothorax", "Hemopneumothorax"),
    "Atelectasis": ("Pulmonary Atelectasis",),
    "Edema": ("Pulmonary Edema", "Pulmonary Congestion", "Heart Failure"),
    "Fracture": ("Fractures, Bone",),
}
# (heading, qualifier) -> observation
_QUALIFIED: dict[tuple[str, str], str] = {
    ("Cardiac Shadow", "enlarged"): "Cardiomegaly",
    ("Costophrenic Angle", "blunted"): "Pleural Effusion",
    ("Sulcus", "blunted"): "Pleural Effusion",
}
_BY_HEADING: dict[str, tuple[str, ...]] = {
    heading: tuple(name for name, headings in _HEADINGS.items() if heading in headings)
    for heading in {heading for headings in _HEADINGS.values() for heading in headings}
}

MESH_OBSERVATIONS: tuple[str, ...] = tuple(_HEADINGS)


def observations_from_mesh(terms: str) -> frozenset[str]:
    """Returns the `MESH_OBSERVATIONS` of a study from its MeSH terms.

    Args:
        terms: Terms in Open-i's format, such as `Cardiomegaly/mild;Pulmonary Atelectasis/base/left`.
    """
    found: set[str] = set()
    for term in terms.split(";"):
        heading, *qualifiers = (part.strip() for part in term.split("/"))
        found.update(_BY_HEADING.get(heading, ()))
        found.update(_QUALIFIED[heading, qualifier] for qualifier in qualifiers if (heading, qualifier) in _QUALIFIED)
    return frozenset(found)
