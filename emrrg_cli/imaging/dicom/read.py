"""Reads DICOM radiographs as 8-bit grey images, for `read_image`.

Each format has one decoder, so that a file gives the same pixels everywhere: uncompressed and RLE by
pydicom; JPEG baseline by Pillow; all other JPEG, JPEG-LS and JPEG 2000 by imagecodecs, in a separate process.
"""

from __future__ import annotations

from typing import IO

from PIL import Image

from emrrg_cli.imaging.base import ImageError, short_message
from emrrg_cli.imaging.dicom.facts import facts_of, no_warnings
from emrrg_cli.imaging.dicom.file import MAX_HEADER, inflated, read_header
from emrrg_cli.imaging.dicom.pixels import PixelReader
from emrrg_cli.imaging.notes import add_notes


def read_dicom(stream: IO[bytes], where: str, size: int, max_pixels: int) -> Image.Image:
    """Reads the image of a DICOM file; `dicom.grey` describes how values become grey.

    - One frame. Separate overlays are not drawn; text in the pixels stays.
    - Before decoding, rows times columns in the header is checked against `max_pixels`, and the size in compressed data
      against rows and columns.
    - Without a transfer syntax, uncompressed pixels are read with the encoding of the header.
    - If compressed data contradict the number of bits in the header, the data count.
    - Colour becomes luma.
    - A JPEG without its last rows is completed, like any JPEG file (`mend`).

    Args:
        stream: The file, at its start.
        where: Name of the file for messages.
        size: Size of the stream in bytes.
        max_pixels: As for `read_image`.

    Returns:
        Mode `L`, with notes (`image_notes`).

    Raises:
        ImageError: not an image, broken image, truncated image, too many pixels, file too large, no pixel data,
            multi-frame DICOM, DICOM compression not supported.
    """
    if size > (limit := 8 * max_pixels + MAX_HEADER):
        raise ImageError(where, "file too large", f"{size:,} bytes, limit {limit:,}")
    with no_warnings():
        try:
            stream, size = inflated(stream, where, size, limit)
            file = read_header(stream, where, size)
            facts = facts_of(file.header)
            reader = PixelReader(stream, where, size, file, max_pixels)
            image = Image.fromarray(reader.grey())
        except ImageError:
            raise
        except Exception as error:  # parsers and decoders raise errors of many types
            raise ImageError(where, "broken image", short_message(error)) from None
    add_notes(image, *facts.notes, *reader.notes, frontal_chest=facts.is_chest and not facts.is_lateral)
    return image
