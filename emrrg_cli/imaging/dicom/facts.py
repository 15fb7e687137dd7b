"""Facts from a DICOM header, for notes to people and for grouping files."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydicom.dataset import Dataset

from emrrg_cli.console import printable
from emrrg_cli.imaging.base import DICOM_SUFFIXES, ImageError, is_dicom, open_stream
from emrrg_cli.imaging.dicom.file import MAX_HEADER, first_value, inflated, read_header, text
from emrrg_cli.imaging.views import view_name
from emrrg_cli.vocabulary import LATERAL_VIEW

_CHEST = ("CHEST", "THOR", "TORAX", "LUNG", "HEART", "RIB", "STERN", "CLAVIC")
_REASONS = ("ReasonForTheRequestedProcedure", "ReasonForStudy", "AdmittingDiagnosesDescription")
_RADIOGRAPHS = ("", "CR", "DX", "DR", "RG", "RF", "XA", "OT", "SC", "HC")


@dataclass(frozen=True)
class DicomFacts:
    """Facts from a header; empty if it does not have them.

    Attributes:
        study_uid: Study Instance UID, by which files are grouped.
        patient_id: Patient ID.
        view: `PA`, `AP`, `LATERAL`, or another View Position (`view_name`).
        body_part: Body Part Examined, upper case.
        modality: `CR`, `DX`, ...
        photometric: Photometric Interpretation.
        burned_in: Whether the header says that text is part of the pixels.
        orientation: Patient Orientation of rows and columns, such as `L\\F`.
        age: Patient's Age, such as `045Y`.
        sex: Patient's Sex, such as `F`.
        indication: Reason for the Requested Procedure or for the Study, or Admitting Diagnoses: the first that exists.
    """

    study_uid: str
    patient_id: str
    view: str
    body_part: str
    modality: str
    photometric: str
    burned_in: bool
    orientation: str
    age: str = ""
    sex: str = ""
    indication: str = ""

    @property
    def is_chest(self) -> bool:
        """False if the header names another part of the body."""
        return not self.body_part or any(word in self.body_part for word in _CHEST)

    @property
    def is_lateral(self) -> bool:
        """Whether the view is lateral."""
        return self.view == LATERAL_VIEW

    @property
    def notes(self) -> tuple[str, ...]:
        """Returns warnings for people who read a report on this image."""
        notes = []
        if not self.is_chest:
            notes.append(f"not chest: body part {self.body_part}")
        if self.modality not in _RADIOGRAPHS:
            notes.append(f"not a radiograph: modality {self.modality}")
        if self.burned_in:
            notes.append("annotation burned into the pixels")
        row, _, column = self.orientation.partition("\\")
        # On a correct chest film, the patient's left is at the right, and the feet are below.
        if self.is_chest and column and (not column.startswith("F") or (row.startswith("R") and not self.is_lateral)):
            notes.append(f"may be turned or mirrored: patient orientation {self.orientation}")
        return tuple(printable(note) for note in notes)


def study_name(facts: DicomFacts | None, patients: dict[str, str]) -> str:
    """Returns the name of the study of a file: its Study Instance UID, which is empty if there is none.

    Some anonymized files have one UID for all patients, who must not become one study: the name of all patients but the
    first has their Patient ID too.

    Args:
        patients: the first patient of each UID; this function extends it.
    """
    if facts is None or not facts.study_uid:
        return ""
    uid, patient = printable(facts.study_uid), printable(facts.patient_id)
    first = patients[uid] = patients.get(uid) or patient
    return uid if patient in ("", first) else f"{uid} {patient}"


def find_dicom_facts(source: Path | bytes) -> DicomFacts | None:
    """Returns the facts of a file or its bytes; None if it is not readable DICOM, which decoding reports later."""
    try:
        with _opened(source) as (stream, _):
            found = is_dicom(stream) or (isinstance(source, Path) and source.suffix.lower() in DICOM_SUFFIXES)
        return read_dicom_facts(source) if found else None
    except (ImageError, OSError):
        return None


def _opened(source: Path | bytes) -> contextlib.AbstractContextManager[tuple[IO[bytes], int]]:
    if isinstance(source, bytes):
        return contextlib.nullcontext((io.BytesIO(source), len(source)))
    return open_stream(source, str(source))


def read_dicom_facts(source: Path | bytes) -> DicomFacts:
    """Reads only the header.

    Raises:
        ImageError: The file cannot be opened, is not DICOM, or its header is broken.
    """
    where = "<bytes>" if isinstance(source, bytes) else str(source)
    with _opened(source) as (stream, size), no_warnings():
        try:
            stream, size = inflated(stream, where, size, MAX_HEADER)
        except ImageError as error:
            if error.reason != "file too large":
                raise
            stream, size = inflated(stream, where, size, MAX_HEADER, cut=True)
        return facts_of(read_header(stream, where, size).header)


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Hides warnings of pydicom about values that violate the standard: a file is read, or refused with a reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def facts_of(header: Dataset) -> DicomFacts:
    """Returns the facts of a header that has been read."""
    view = text(header, "ViewPosition")
    request = first_value(header, "RequestAttributesSequence")
    request = request if isinstance(request, Dataset) else Dataset()
    try:
        orientation = "\\".join(str(value).upper() for value in header.get("PatientOrientation") or ())
    except Exception:  # an unreadable value counts as missing
        orientation = ""
    return DicomFacts(
        study_uid=text(header, "StudyInstanceUID"),
        patient_id=text(header, "PatientID"),
        view=view_name(view) if view else "",
        body_part=text(header, "BodyPartExamined").upper(),
        modality=text(header, "Modality").upper(),
        photometric=text(header, "PhotometricInterpretation").upper(),
        burned_in=text(header, "BurnedInAnnotation").upper() == "YES",
        orientation=orientation,
        age=text(header, "PatientAge"),
        sex=text(header, "PatientSex"),
        indication=next(filter(None, (text(part, name) for name in _REASONS for part in (header, request))), ""),
    )
