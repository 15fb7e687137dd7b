"""The parameters of a synthetic study. Lengths are in cm unless the name says mm; sides are the patient's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Side = Literal["right", "left"]
SIDES: tuple[Side, ...] = ("right", "left")
Zone = Literal["upper", "mid", "lower"]
ZONES: tuple[Zone, ...] = ("upper", "mid", "lower")
View = Literal["PA", "AP"]
Amount = Literal["small", "moderate", "large"]
Severity = Literal["mild", "moderate", "severe"]
DeviceKind = Literal["endotracheal tube", "central line", "pacemaker", "nasogastric tube"]

# Increased whenever the same seed gives different films or reports.
DRAWING = 2

LABELS: tuple[str, ...] = (
    "atelectasis",
    "cardiomegaly",
    "consolidation",
    "edema",
    "nodule",
    "pleural_effusion",
    "pneumothorax",
    "support_device",
)

# Cardiothoracic ratio above which a heart is called enlarged. AP films magnify it. `sampling` avoids values near the
# limit, so that a label never depends on the third decimal.
CTR_LIMIT: dict[View, float] = {"PA": 0.52, "AP": 0.56}


def sign(side: Side) -> float:
    """Returns the direction of a side in image coordinates: the patient's right is at the left of the film (-1)."""
    return -1.0 if side == "right" else 1.0


@dataclass(frozen=True)
class Effusion:
    """Pleural fluid. `level` grows from 0 (blunted angle) to 1 (fluid to the upper chest)."""

    side: Side
    amount: Amount
    level: float
    subtle: bool


@dataclass(frozen=True)
class Pneumothorax:
    """Air in the pleural space. `gap` is the distance of the pleural line from the lateral chest wall."""

    side: Side
    amount: Amount
    gap: float
    subtle: bool


@dataclass(frozen=True)
class Consolidation:
    """Airspace opacity; `radius` of the area, `density` 0 to 1 (1: no air is left), `depth` as a nodule's."""

    side: Side
    zone: Zone
    radius: float
    density: float
    subtle: bool
    depth: float = 0.5


@dataclass(frozen=True)
class Nodule:
    """A ball of soft tissue at (`across`, `along`, `depth`): fractions of the zone's width, height, front to back."""

    side: Side
    zone: Zone
    diameter_mm: int
    across: float
    along: float
    subtle: bool
    depth: float = 0.5


@dataclass(frozen=True)
class Edema:
    """Fluid in both lungs, from the hila outwards. `strength` 0 to 1."""

    severity: Severity
    strength: float
    subtle: bool


@dataclass(frozen=True)
class Atelectasis:
    """Collapsed lung at a base: a plate (`linear`) or a broader band that pulls the diaphragm up."""

    side: Side
    shape: Literal["linear", "band"]
    strength: float
    subtle: bool


@dataclass(frozen=True)
class Device:
    """A tube, line or pacemaker. `side` is where a central line or a pacemaker enters; None for tubes in the midline.

    A misplaced endotracheal tube ends in the right main bronchus, a nasogastric tube in the oesophagus, a central line
    in the right atrium.
    """

    kind: DeviceKind
    side: Side | None
    wander: float
    misplaced: bool = False


@dataclass(frozen=True)
class Findings:
    """The findings that a report of the study must mention."""

    ctr: float
    cardiomegaly: Severity | None = None
    effusions: tuple[Effusion, ...] = ()
    pneumothorax: Pneumothorax | None = None
    consolidations: tuple[Consolidation, ...] = ()
    nodule: Nodule | None = None
    edema: Edema | None = None
    atelectases: tuple[Atelectasis, ...] = ()
    devices: tuple[Device, ...] = ()

    def labels(self) -> set[str]:
        """Returns the `LABELS` that are present; empty for a normal study without devices."""
        present: dict[str, object] = {
            "atelectasis": self.atelectases,
            "cardiomegaly": self.cardiomegaly,
            "consolidation": self.consolidations,
            "edema": self.edema,
            "nodule": self.nodule,
            "pleural_effusion": self.effusions,
            "pneumothorax": self.pneumothorax,
            "support_device": self.devices,
        }
        return {label for label, value in present.items() if value}


@dataclass(frozen=True)
class Distractors:
    """Structures on a film that look like findings. None, 0 and empty mean absent."""

    skin_fold: Side | None = None  # an edge like a pleural line, with vessels beyond it
    skin_fold_at: float = 0.5  # 0 near the mediastinum to 1 at the chest wall
    nipples: float = 0.0  # thickness, cm
    granuloma: Side | None = None  # a small calcified node in the lung
    calcified_nodes: Side | None = None  # in a hilum
    rib_callus: Side | None = None  # an old fracture
    callus_rib: int = 5
    cartilage: float = 0.0  # calcified fraction of the first ribs' cartilage, 0 to 1


@dataclass(frozen=True)
class Anatomy:
    """A healthy thorax in its position at the detector."""

    thorax_half_width: float  # inner, at the widest
    lung_height: float  # apex to costophrenic angle
    apex: float  # y of the lung apex
    dome: dict[Side, float]  # y of the top of each hemidiaphragm
    depth: float  # of the trunk, front to back
    body_half_width: float
    tilt: float  # radians, in the plane of the film
    rotation: float  # shift of the mediastinum relative to the chest wall
    bend: float  # curve of the spine
    heart_slope: float  # 0 upright to 1 horizontal
    knob: float  # radius of the aortic arch
    unfolded: float  # widening of the upper mediastinum
    lung_density: float  # relative to soft tissue
    rib_phase: float
    rib_spacing: float
    rib_density: float
    breast: float  # thickness; 0: none
    scapula_over_lung: float
    clavicle_rise: float
    bubble: float  # radius of the gastric air bubble; 0: none
    vessels: float  # prominence

    @property
    def angle(self) -> float:
        """y of the costophrenic angles."""
        return self.apex + self.lung_height


@dataclass(frozen=True)
class Film:
    """Exposure and processing of a film."""

    view: View | Literal["LATERAL"]
    field: float  # side of the square film
    shift_x: float
    shift_y: float
    lung_grey: float  # 0 to 1
    mediastinum_grey: float
    scatter: float
    noise: float
    blur: float  # mm
    collimation: tuple[float, float, float, float]  # border at left, top, right, bottom, fraction of the side
    equalise: float  # reduction of large-scale density differences, 0 to 1
    marker: str  # lead letters; empty: none
    marker_x: float  # position of the letters, fraction of the side
    marker_y: float
    marker_turn: float  # radians


@dataclass(frozen=True)
class Case:
    """One synthetic study: anatomy, findings, the frontal film and, if there is one, the lateral film."""

    anatomy: Anatomy
    film: Film
    findings: Findings
    texture_seed: int = 0
    distractors: Distractors = Distractors()
    lateral: Film | None = None

    @property
    def films(self) -> tuple[Film, ...]:
        """The frontal film, then the lateral film if there is one."""
        return (self.film,) if self.lateral is None else (self.film, self.lateral)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self)
