"""Pages in headless Chromium, where one is installed: what a script finds on them, and what is printed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

_QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=4000",
]
_ACTIONS = """
<script>
addEventListener("load", () => {
  const found = {};
%s
  found.requests = performance.getEntriesByType("resource").map((r) => r.name).filter((n) => !n.startsWith("data:"));
  document.title = "RESULT" + JSON.stringify(found) + "END";
});
</script></body>
"""


def find_on_page(text: str, folder: Path, script: str, *options: str) -> dict[str, Any]:
    """Opens a page from a file and runs a script that puts what it finds into `found`.

    Args:
        text: the page.
        folder: for the page and the browser's profile.
        options: of Chromium.

    Returns:
        `found`, with `requests`: addresses that the page asked for. Anything on the console fails the test.
    """
    page = folder / "shown.html"
    page.write_text(text.replace("</body>", _ACTIONS % script))
    done = _run(folder, *options, "--dump-dom", page.as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr
    answer = re.search(r"<title>RESULT(.*?)END</title>", done.stdout, re.DOTALL)
    assert answer is not None, done.stdout[:2000] + done.stderr
    found: dict[str, Any] = json.loads(html.unescape(answer[1]))
    return found


def print_page(page: Path, folder: Path) -> tuple[bytes, int]:
    """The page as a PDF, and how many sheets it has."""
    pdf = folder / "printed.pdf"
    done = _run(folder, f"--print-to-pdf={pdf}", page.as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr
    content = pdf.read_bytes()
    return content, max(int(count) for count in re.findall(rb"/Count (\d+)", content))


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [BROWSER, *_QUIET, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)
