"""Shared fixtures: invented chest X-ray studies in R2Gen's layout, and where real data stands when it is there."""

from __future__ import annotations

import atexit
import gc
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

from tests.forks import fork_server, forked, light_fork_server, light_forked
from tests.varied import varied_copy

__all__ = ["fork_server", "forked", "light_fork_server", "light_forked"]

# Before rich and typer are imported: what the program prints does not depend on the terminal or the CI system.
for _name in ("COLUMNS", "LINES", "TERMINAL_WIDTH", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "TTY_COMPATIBLE",
              "GITHUB_ACTIONS"):  # fmt: skip
    os.environ.pop(_name, None)
# Before `datasets` is imported: tests run offline and leave no Arrow copies in the user's cache.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch is: on tensors this small threads cost more than they bring, twenty times so when the machine is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before triton is: its kernels run on CPU tensors, slowly. With a GPU, TRITON_INTERPRET=0 runs the tests on that.
os.environ.setdefault("TRITON_INTERPRET", "1")
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="emrrg-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

_LAYOUT = {"train": 16, "val": 4, "test": 4}
_FINDINGS = (
    ("The heart is enlarged.", "cardiomegaly"),
    ("There is a left pleural effusion.", "effusion"),
    ("A nodule is seen in the right upper lobe.", "nodule"),
    ("The lungs are clear.", None),
)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker per core, at most 8; none where single files are named, which are faster in this process."""
    if any(".py" in argument for argument in config.args):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def pytest_configure() -> None:
    """Processes of tests react to signals, also where the tests run under `nohup` or behind `&`, which ignore them."""
    handlers = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}
    for name, handler in handlers.items():
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker of pytest-xdist is left with a long one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """The modules that are imported by now stay: the garbage collector need not look through them again and again."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else libraries report leaks


@pytest.fixture(autouse=True, scope="session")
def unsynced_files() -> Iterator[None]:
    """Files of tests need not survive a power cut: waiting for the disk takes nearly half of a tiny training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(autouse=True)
def quick_pictures() -> Iterator[None]:
    """Writes a few bytes in place of plots, which take a third of a tiny training or evaluation.

    Folders and files that check plots override this. What fixtures of a wider scope make has real ones.
    """
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"a plot"))
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked `gpu` where torch sees no GPU, and starts the random numbers of each test anew."""
    _seed(0)
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """The same numbers also where another test has made the fixtures that a file or all tests share."""
    _seed(1)  # others than those of the fixtures, or a model and its input may be alike


def _seed(number: int) -> None:
    # Unseeded numbers are others in each run; those after a seed depend on the tests before, and so on the workers.
    random.seed(number)
    np.random.seed(number)
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(number)


MakeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """`make_once(name, build)`: the folder `name`, filled by `build(folder)` once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, build: Callable[[Path], object]) -> Path:
        folder, built = shared / name, shared / f"{name}.built"
        with FileLock(shared / f"{name}.lock"):
            if not built.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a failed attempt left
                folder.mkdir()
                build(folder)
                built.touch()
        return folder

    return make


@pytest.fixture
def no_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides Java, so that no METEOR is computed: it takes seconds."""
    for name in ("PATH", "JAVA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real radiographs and reports, used in development only; tests that ask for it skip without it."""
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("EMRRG_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set EMRRG_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def tiny_r2gen(make_once: MakeOnce) -> Path:
    """R2Gen's layout with 24 invented studies, 16/4/4, one or two grey images (160 x 140) each. Not to be changed."""
    return make_once("tiny_r2gen", _write_r2gen)


def _write_r2gen(root: Path) -> None:
    rng = np.random.default_rng(0)
    annotation: dict[str, list[dict[str, object]]] = {}
    number = 0
    for split, count in _LAYOUT.items():
        annotation[split] = []
        for _ in range(count):
            study_id = f"study{number:02d}"
            (root / "images" / study_id).mkdir(parents=True)
            sentence, finding = _FINDINGS[number % len(_FINDINGS)]
            paths = []
            for view in range(1 + number % 2):
                path = f"{study_id}/{view}.png"
                _draw_chest(rng, finding).save(root / "images" / path)
                paths.append(path)
            report = f"Study of the chest. {sentence} No pneumothorax."
            annotation[split].append({"id": study_id, "report": report, "image_path": paths, "split": split})
            number += 1
    (root / "annotation.json").write_text(json.dumps(annotation))


@pytest.fixture(scope="session")
def tiny_dataset(tiny_r2gen: Path, make_once: MakeOnce) -> Path:
    """`tiny_r2gen` as a dataset directory: 16/4/4 studies, source `r2gen`. Not to be changed."""
    from emrrg_cli.ingest.preprocess import preprocess
    from emrrg_cli.ingest.sources.r2gen import R2GenSource
    from emrrg_cli.recipe.preprocessing import PreprocessRecipe

    recipe = PreprocessRecipe(stage="preprocess", workers=1)
    return make_once("tiny", lambda folder: preprocess(R2GenSource(tiny_r2gen), folder / "dataset", recipe)) / "dataset"


@pytest.fixture(scope="session")
def context_dataset(tiny_r2gen: Path, make_once: MakeOnce) -> Path:
    """The studies of `tiny_r2gen` with indication, age, sex and views, from a table. Not to be changed."""
    return make_once("context", lambda folder: _write_context(tiny_r2gen, folder)) / "dataset"


def _write_context(root: Path, folder: Path) -> None:
    from emrrg_cli.app import main

    rows = ["file,text,split,id,reason,age,sex,view"]
    number = 0
    for split, studies in json.loads((root / "annotation.json").read_text()).items():
        for study in studies:
            reason = ("Dyspnoea.", "Cough and fever for three days.", "Fall", "XXXX")[number % 4]
            path, view = study["image_path"][0], ("PA", "LL", "LAO", "")[number // 2 % 4]
            rows.append(
                f"{path},{study['report']},{split},{study['id']},{reason},{40 + number},{'FM'[number % 2]},{view}"
            )
            number += 1
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    columns = {
        "image": "file",
        "report": "text",
        "split": "split",
        "study": "id",
        "indication": "reason",
        "view": "view",
    }
    options = [part for kind, name in columns.items() for part in (f"--{kind}-column", name)]
    options += ["--age-column", "age", "--sex-column", "sex", "--table", str(folder / "table.csv")]
    assert main(["preprocess", "folder", str(root), str(folder / "dataset"), *options]) == 0


@pytest.fixture(scope="session")
def labelled_dataset(tiny_r2gen: Path, make_once: MakeOnce) -> Path:
    """The first films of `tiny_r2gen`'s studies with labels of ChestX-ray14, every fourth without, and no reports."""
    return make_once("labelled", lambda folder: _write_labelled(tiny_r2gen, folder)) / "dataset"


def _write_labelled(root: Path, folder: Path) -> None:
    from emrrg_cli.app import main

    rows, number = ["image,split,found"], 0
    for split, studies in json.loads((root / "annotation.json").read_text()).items():
        for study in studies:
            rows.append(
                f"{study['image_path'][0]},{split},{('Cardiomegaly', 'Effusion', '', 'No Finding')[number % 4]}"
            )
            number += 1
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    options = ["--table", str(folder / "table.csv"), "--labels-column", "found", "--split-column", "split"]
    assert main(["preprocess", "folder", str(root), str(folder / "dataset"), *options]) == 0


@pytest.fixture(scope="session")
def tiny_overrides(tiny_dataset: Path) -> tuple[str, ...]:
    """Changes to the recipe `tiny/finetune` that make it train on `tiny_dataset` at milliseconds a step."""
    model = "model.encoder={d_model: 16, depth: 2, image_size: 32, d_state: 4, drop_path: 0.0}"
    llm = "model.llm.scratch={hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, vocab_size: 320}"
    return (f"data.root={tiny_dataset}", model, llm, "train.log_every=1", "generation.max_new_tokens=8")


@pytest.fixture(scope="session")
def tiny_run(tiny_overrides: tuple[str, ...], make_once: MakeOnce) -> Path:
    """A run directory trained for four steps. Not to be changed."""
    from emrrg_cli.app import main

    def train(folder: Path) -> None:
        assert main(["finetune", "tiny/finetune", *tiny_overrides, "--output", str(folder / "run")]) == 0

    return make_once("tiny_run", train) / "run"


@pytest.fixture(scope="session")
def varied_run(tiny_run: Path, make_once: MakeOnce) -> Path:
    """`tiny_run` with weights so large that most images get a text of their own. Not to be changed."""
    return make_once("varied_run", lambda folder: varied_copy(tiny_run, folder / "run")) / "run"


@pytest.fixture
def default_model(varied_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `varied_run` that stands in for the model of the package and states its limits."""
    from emrrg_cli import default_model

    run = tmp_path / "default-model"
    shutil.copytree(varied_run, run)
    (run / default_model.LIMITS).write_text(f"{default_model.SYNTHETIC_ONLY}\n")
    monkeypatch.setattr(default_model, "default_model_dir", lambda: run)
    return run


@pytest.fixture
def no_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package without a model."""
    from emrrg_cli import default_model

    monkeypatch.setattr(default_model, "default_model_dir", lambda: tmp_path / "none")


def _draw_chest(rng: np.random.Generator, finding: str | None) -> Image.Image:
    """Two dark lungs, a bright heart, one finding; blurred noise over all of it."""
    image = Image.new("L", (160, 140), 150)
    draw = ImageDraw.Draw(image)
    for left, right in ((20, 72), (88, 140)):
        draw.ellipse((left, 15, right, 125), fill=60)
    half = 34 if finding == "cardiomegaly" else 20
    draw.ellipse((85 - half, 70, 85 + half, 120), fill=190)
    if finding == "effusion":
        draw.rectangle((90, 95, 140, 125), fill=200)
    if finding == "nodule":
        draw.ellipse((40, 35, 54, 49), fill=180)
    noise = Image.fromarray(rng.integers(0, 256, (140, 160), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(1))
    return Image.blend(image.filter(ImageFilter.GaussianBlur(2)), noise, 0.15)


MakeDicom = Callable[..., bytes]


@pytest.fixture(scope="session")
def make_dicom() -> MakeDicom:
    """Makes the bytes of a DICOM file.

    `make(pixels, syntax=..., drop=(...), preamble=True, **elements)`: `pixels` is `[h, w]` or `[h, w, 3]`, bytes that
    are put in as they are, a list of bytes to encapsulate, or None. `elements` are set last, by keyword.
    """
    return _make


def _make(
    pixels: NDArray[Any] | bytes | list[bytes] | None,
    *,
    syntax: str | None = ExplicitVRLittleEndian,
    drop: tuple[str, ...] = (),
    preamble: bool = True,
    **elements: Any,
) -> bytes:
    data = Dataset()
    data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    data.SOPInstanceUID = data.StudyInstanceUID = generate_uid(entropy_srcs=["invented"])
    data.PatientID, data.Modality, data.BodyPartExamined, data.ViewPosition = "P1", "CR", "CHEST", "PA"
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    little = syntax != "1.2.840.10008.1.2.2"
    compressed = isinstance(pixels, list)
    if isinstance(pixels, np.ndarray):
        data.Rows, data.Columns = pixels.shape[:2]
        if pixels.ndim == 3:
            data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
        bits = 8 * pixels.itemsize
        data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
        data.PixelRepresentation = int(pixels.dtype.kind == "i")
        pixels = pixels.astype(pixels.dtype.newbyteorder("<" if little else ">")).tobytes()
    for keyword, value in elements.items():
        setattr(data, keyword, value)
        if keyword == "BitsStored" and "HighBit" not in elements:
            data.HighBit = value - 1
    for keyword in drop:
        delattr(data, keyword)
    if pixels is not None:
        wide = data.get("BitsAllocated", 8) > 8 and not compressed
        value = encapsulate(pixels) if isinstance(pixels, list) else pixels + b"\0" * (len(pixels) % 2)
        data.add_new(0x7FE00010, "OW" if wide or syntax == "1.2.840.10008.1.2" else "OB", value)
        data["PixelData"].is_undefined_length = compressed
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = data.SOPClassUID, "1.2"
    buffer = io.BytesIO()
    if syntax is not None:
        data.file_meta.TransferSyntaxUID = syntax
        data.save_as(buffer, enforce_file_format=preamble)
    else:
        if preamble:
            data.preamble = b"\0" * 128
        data.save_as(buffer, implicit_vr=False, little_endian=True)
    content = buffer.getvalue()
    return content if preamble else _without_meta(content)


def _without_meta(content: bytes) -> bytes:
    """The data set alone, as old archives wrote it."""
    return content[content.index(b"\x08\x00\x16\x00") :]


@pytest.fixture(scope="session")
def make_jpeg_dicom(make_dicom: MakeDicom) -> MakeDicom:
    """`make(pixels, cut=0, **elements)`: a JPEG baseline file; `cut` takes bytes off the end of the JPEG."""

    def make(pixels: NDArray[Any], cut: int = 0, **elements: Any) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        jpeg = buffer.getvalue()
        height, width = pixels.shape[:2]
        layout = {"Rows": height, "Columns": width, "BitsAllocated": 8, "BitsStored": 8, "PixelRepresentation": 0}
        data = jpeg[: len(jpeg) - cut]
        return make_dicom([data + b"\0" * (len(data) % 2)], syntax=JPEGBaseline8Bit, **(layout | elements))

    return make


@pytest.fixture(scope="session")
def chest(tiny_r2gen: Path) -> NDArray[np.uint8]:
    """A drawn frontal chest, uint8 `[140, 160]`, lungs dark."""
    return np.asarray(Image.open(tiny_r2gen / "images" / "study03" / "0.png"))
