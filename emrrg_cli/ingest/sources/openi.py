"""Reads the XML reports of Open-i's Indiana University collection from their archive or a folder."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from emrrg_cli.console import printable
from emrrg_cli.errors import RunError
from emrrg_cli.ingest.sources.text_files import open_regular

_MAX_NAME = 2**16  # bytes
_READ_WHOLE = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
               tarfile.SOLARIS_XHDTYPE)  # fmt: skip
_MAX_BYTES = 2**20  # of one report; reports of the release have 4 to 11 KB
_UID = re.compile(r"CXR(\d+)")


@dataclass(frozen=True)
class OpeniReport:
    """One report.

    Attributes:
        uid: Number of the study, without `CXR`.
        findings, impression, indication, comparison: Sections; "" if missing.
        mesh: Manual MeSH terms, such as `Opacity/lung/upper lobe/right`.
        mesh_automatic: Automatic MeSH terms.
        images: Names of the images, such as `CXR1000_IM-0003-1001`.
    """

    uid: str
    findings: str
    impression: str
    indication: str
    comparison: str
    mesh: tuple[str, ...]
    mesh_automatic: tuple[str, ...]
    images: tuple[str, ...]


@dataclass(frozen=True)
class BadReport:
    """A file without a usable report."""

    name: str
    reason: str
    detail: str = ""


def read_openi(path: Path) -> Iterator[OpeniReport | BadReport]:
    """Yields the reports in the order of the archive or of the file names. Nothing is unpacked to disk.

    Args:
        path: `NLMCXR_reports.tgz`, or a folder with `*.xml`.

    Raises:
        RunError: The file is not an archive or is cut short.
    """
    for name, data in _folder(path) if path.is_dir() else _archive(path):
        yield BadReport(name, "report cannot be read", data) if isinstance(data, str) else parse_report(name, data)


def parse_report(name: str, data: bytes) -> OpeniReport | BadReport:
    """Parses one XML file.

    Args:
        name: Name of the file for messages.
        data: Content of the file.

    Returns:
        The report, or why there is none: broken XML, a document type declaration (entities are never expanded), or no
        uid.
    """
    try:
        root = ElementTree.fromstring(data, ElementTree.XMLParser(target=_WithoutDoctype()))
    except _DoctypeError:
        return BadReport(name, "report is not plain XML", "it declares a document type, which may hold entities")
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:  # also an unknown encoding
        return BadReport(name, "report is not valid XML", printable(str(error)))
    uid = root.find("uId")
    match = _UID.fullmatch(uid.get("id", "").strip() if uid is not None else "")
    if match is None:
        return BadReport(name, "no study id", "no uId such as CXR1000")
    sections = {element.get("Label", "").upper(): _text(element) for element in root.iter("AbstractText")}
    return OpeniReport(
        uid=match[1],
        findings=sections.get("FINDINGS", ""),
        impression=sections.get("IMPRESSION", ""),
        indication=sections.get("INDICATION", ""),
        comparison=sections.get("COMPARISON", ""),
        mesh=_texts(root, "MeSH/major"),
        mesh_automatic=_texts(root, "MeSH/automatic"),
        images=tuple(
            dict.fromkeys(name for image in root.iter("parentImage") if (name := image.get("id", "").strip()))
        ),
    )


class _DoctypeError(Exception):
    pass


class _WithoutDoctype(ElementTree.TreeBuilder):
    """Stops at a document type declaration before its entities are read, because they can expand without limit."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise _DoctypeError


def _text(element: ElementTree.Element) -> str:
    return "".join(element.itertext()).strip().replace("\0", "")


def _texts(root: ElementTree.Element, path: str) -> tuple[str, ...]:
    return tuple(text for element in root.findall(path) if (text := _text(element)))


def _folder(path: Path) -> Iterator[tuple[str, bytes | str]]:
    for file in sorted(path.glob("*.xml")):
        if file.name.startswith("."):
            continue
        try:
            with open_regular(file) as content:
                data = content.read(_MAX_BYTES + 1)
        except OSError as error:
            yield printable(file.name), error.strerror or str(error)
            continue
        yield printable(file.name), data if len(data) <= _MAX_BYTES else _too_large(file.stat().st_size)


class _BoundedHeader(tarfile.TarInfo):
    """An archive header that limits long names and extra headers, which tarfile reads whole into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _BoundedHeader:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _READ_WHOLE and header.size > _MAX_NAME:
            raise tarfile.ReadError(f"a name of {header.size:,} bytes")
        return header


def _archive(path: Path) -> Iterator[tuple[str, bytes | str]]:
    hint = "Download it again: https://openi.nlm.nih.gov/faq#collection"
    try:
        # As a stream: members are read in order, and nothing is written to disk.
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_BoundedHeader) as archive:
            for member in archive:
                name = Path(member.name).name
                if not member.isfile() or not name.endswith(".xml") or name.startswith("."):
                    continue
                if member.size > _MAX_BYTES:
                    yield printable(name), _too_large(member.size)
                elif content := archive.extractfile(member):
                    yield printable(name), content.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise RunError(f"{path} is not a whole archive: {error}", hint=hint) from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}", hint=hint) from None


def _too_large(size: int) -> str:
    return f"it has {size:,} bytes, more than {_MAX_BYTES:,}"
