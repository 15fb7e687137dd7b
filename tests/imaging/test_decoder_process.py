"""Decoders that crash, hang or ask for too much, in the process where that costs one file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from imagecodecs import jpegls_encode

from emrrg_cli.imaging import decoder_process
from emrrg_cli.imaging.base import ImageError
from emrrg_cli.imaging.decoder_process import decode_apart

FILM = np.arange(4096, dtype=np.uint16).reshape(64, 64)

# Run in the other process in place of `main`: a decoder that does what the data say.
_MISBEHAVE = """
import sys, json
sys.path[:] = json.loads(sys.stdin.buffer.readline())
import os, time
from emrrg_cli.imaging import codecs, decoder_worker
import numpy as np

def misbehave(data, max_pixels):
    what = data.decode()
    if what == "abort":
        os.abort()
    if what == "loop":
        while True:
            pass
    if what == "sleep":
        time.sleep(60)
    if what == "memory":
        return np.ones(2**33, np.uint8)
    if what == "print":
        os.write(1, b"noise on stdout")
    if what == "kill" and not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").close()
        os.kill(os.getpid(), 9)
    return np.full((2, 3), 7, np.uint8)

codecs.CODECS["jpeg"] = misbehave
decoder_worker.main()
"""


@pytest.fixture
def misbehaving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    start = _MISBEHAVE.replace("sys.argv[1]", repr(str(tmp_path / "was-killed")))
    decoder_process._end_all()
    monkeypatch.setattr(decoder_process, "_START", start)
    monkeypatch.setattr(decoder_process, "_SECONDS", 1)
    monkeypatch.setattr(decoder_process, "_BY_THE_CLOCK", 300)  # it has to start on a busy machine, too
    yield
    decoder_process._end_all()


def _ask(what: str) -> np.ndarray:
    return decode_apart("jpeg", what.encode(), "film.dcm", 6, 100)


@pytest.mark.usefixtures("misbehaving")
@pytest.mark.parametrize(
    ("what", "detail"),
    [
        ("abort", "the decoder crashed: SIGABRT"),
        ("loop", "the decoder did not finish within 1 seconds"),
        ("memory", "the decoder needs more memory than such an image should"),
    ],
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
def test_a_crashing_decoder_affects_only_one_file(what: str, detail: str) -> None:
    with pytest.raises(ImageError) as error:
        _ask(what)
    assert (error.value.where, error.value.reason, error.value.detail) == ("film.dcm", "broken image", detail)
    assert (_ask("nothing") == 7).all()


@pytest.mark.usefixtures("misbehaving")
def test_a_decoder_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_process, "_BY_THE_CLOCK", 1)
    with pytest.raises(ImageError, match="did not finish"):
        _ask("sleep")


@pytest.mark.usefixtures("misbehaving")
def test_output_of_a_library_is_not_a_result() -> None:
    assert (_ask("print") == 7).all()


@pytest.mark.usefixtures("misbehaving")
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_decoder_is_started_again() -> None:
    assert (_ask("kill") == 7).all()


def test_one_process_serves_many_images() -> None:
    decoder_process._end_all()
    data = jpegls_encode(FILM)
    for _ in range(3):
        np.testing.assert_array_equal(decode_apart("jpeg-ls", data, "", FILM.size, FILM.size), FILM)
    assert len(decoder_process._idle) == 1


def test_threads_get_a_process_each() -> None:
    data = jpegls_encode(FILM)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: decode_apart("jpeg-ls", data, "", FILM.size, FILM.size), range(12)))
    assert all((answer == FILM).all() for answer in answers)
    assert len(decoder_process._idle) <= 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_starts_its_own() -> None:
    data = jpegls_encode(FILM)
    decode_apart("jpeg-ls", data, "", FILM.size, FILM.size)
    child = os.fork()
    if child == 0:
        try:
            same = not decoder_process._idle and (decode_apart("jpeg-ls", data, "", 4096, 4096) == FILM).all()
            decoder_process._end_all()
        except BaseException:
            same = False
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(decode_apart("jpeg-ls", data, "", FILM.size, FILM.size), FILM)


def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    (tmp_path / "film.jls").write_bytes(jpegls_encode(FILM))
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom emrrg_cli import read_image\nprint(read_image(sys.argv[1]).size)\n")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "film.jls")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "(64, 64)\n", "")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL") or not Path("/proc").is_dir(), reason="looks into /proc")
def test_the_process_ends_with_its_parent() -> None:
    code = (
        "import sys, time\nfrom emrrg_cli.imaging import decoder_process as d\nfrom imagecodecs import jpegls_encode\n"
        "import numpy as np\nd.decode_apart('jpeg-ls', jpegls_encode(np.zeros((8, 8), np.uint8)), '', 64, 64)\n"
        "print(d._idle[0]._process.pid, flush=True)\ntime.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    asking = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert asking.stdout is not None
    decoder = int(asking.stdout.readline())
    asking.kill()
    asking.wait()
    asking.stdout.close()
    for _ in range(2000):
        try:
            state = Path(f"/proc/{decoder}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the decoder still runs")
