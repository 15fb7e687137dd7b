"""Renders the page templates: HTML with every value escaped and without external resources."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from PIL import Image

from emrrg_cli.datasets.report_text import readable_report
from emrrg_cli.reporting.tables import DISCLAIMER

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("emrrg_cli.reporting")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["readable"] = readable_report
    return made


def render(template: str, **values: Any) -> str:
    """Renders a template in `templates/` with values; `disclaimer` and `picture` are always available."""
    return _environment().get_template(template).render(disclaimer=DISCLAIMER, picture=picture, **values)


def render_parts(template: str, **values: Any) -> Iterator[str]:
    """Yields the rendered page in parts; values may be iterators."""
    made = _environment().get_template(template).stream(disclaimer=DISCLAIMER, picture=picture, **values)
    made.enable_buffering(64)
    yield from made


def picture(image: Image.Image, side: int = 480, quality: int = 88) -> str:
    """Converts an image to a data URL with a JPEG."""
    small = image.convert("L")
    small.thumbnail((side, side))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
