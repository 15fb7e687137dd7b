"""Names the kind of a file by its first bytes, for files that no reader accepts."""

from __future__ import annotations

from emrrg_cli.imaging.base import NOT_AN_IMAGE, TRUNCATED, ImageError

_READ = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
}
_NOT_READ = {
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"8BPS": "PSD",
    b"\0\0\1\0": "ICO",
    b"v/1\1": "OpenEXR",
    b"SIMPLE  =": "FITS",
    b"NRRD000": "NRRD",
}
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF"}


def refusal(error: ImageError, head: bytes, size: int) -> ImageError:
    """Returns the error for a file whose header Pillow refused with `error`: a clearer one if the first bytes allow it.

    Args:
        error: The error of Pillow; its `where` is kept.
        head: The first bytes, at least 12 if the file has them.
        size: Size of the file in bytes.
    """
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP" and size < 8 + int.from_bytes(head[4:8], "little"):
        return ImageError(error.where, TRUNCATED, "the file ends within its WebP data")
    if error.reason != NOT_AN_IMAGE:
        return error
    if kind := next((name for start, name in _READ.items() if head.startswith(start)), None):
        return ImageError(error.where, "broken image", f"its {kind} header is damaged or cut short")
    kind = next((name for start, name in _NOT_READ.items() if head.startswith(start)), None)
    if head[4:8] == b"ftyp":
        kind = _BRANDS.get(head[8:12])
    return ImageError(error.where, "image format not supported", kind) if kind else error
