"""Writing reports from Python: `load_generator` on a run directory, and whole splits."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import emrrg_cli
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.report_dataset import ReportDataset
from emrrg_cli.decoding.reports import Generator, load_generator, study_pixels, write_split
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.imaging.base import ImageError
from emrrg_cli.recipe.finetuning import FinetuneRecipe, GenerationSettings
from emrrg_cli.recipe.load import dump_recipe
from emrrg_cli.runtime import choose_device

RECIPE = {
    "stage": "finetune",
    "model": {
        "encoder": {"size": None, "d_model": 32, "depth": 2, "d_state": 4, "image_size": 48},
        "adapter": {"targets": ["X"], "rank": 4},
        "llm": {"name": "scratch", "scratch": {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2}},
        "hybrid": {"every": 2},
    },
    "generation": {"batch_size": 2, "num_beams": 2, "max_new_tokens": 8},
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose reports depend on the image. Not to be changed."""
    from emrrg_cli.models.build import assemble, build_encoder, fresh_llm, save_static, save_trained
    from emrrg_cli.models.llm import train_tokenizer

    directory = tmp_path_factory.mktemp("runs") / "run"
    directory.mkdir()
    recipe = FinetuneRecipe.model_validate(RECIPE)
    (directory / "recipe.yaml").write_text(dump_recipe(recipe))
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the lungs are clear .", "the heart is enlarged ."] * 2, 300)
    encoder, llm = build_encoder(recipe.model.encoder), fresh_llm(recipe.model, tokenizer, torch.float32)
    save_static(directory, recipe.model, encoder, llm, tokenizer)
    model = assemble(recipe.model, encoder, llm, tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
            if name.endswith("warmup"):
                parameter.fill_(2)
            if ".lora_B." in name:
                parameter *= 3
    save_trained(directory, recipe.model, model)
    return directory


@pytest.fixture(scope="module")
def generator(run_dir: Path) -> Generator:
    return load_generator(run_dir, device="cpu")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Three noisy images of different sizes, as files."""
    rng = np.random.default_rng(0)
    files = []
    for number, size in enumerate([(60, 50), (48, 48), (90, 120)]):
        files.append(tmp_path / f"{number}.png")
        pixels = rng.integers(0, 256, size, dtype=np.uint8) // (number + 1)
        Image.fromarray(pixels).save(files[-1])
    return files


def test_paths_strings_and_opened_images_are_the_same(generator: Generator, images: list[Path]) -> None:
    by_path = generator.generate(images)
    assert len(by_path) == 3
    assert len(set(by_path)) == 3
    assert generator.generate([str(image) for image in images]) == by_path
    assert generator.generate([Image.open(image) for image in images]) == by_path
    assert generator.generate([[image] for image in images]) == by_path
    assert generator.generate([(image,) for image in images]) == by_path


def test_a_study_of_several_views(generator: Generator, images: list[Path]) -> None:
    views = generator.generate([images[:2], images[2], [str(images[1]), Image.open(images[0])]])
    assert views[1] == generator.generate([images[2]])[0]
    assert views[0] == views[2]  # the views are averaged
    assert views[0] == generator.generate([images[:2]])[0]
    assert views[0] != views[1]


def test_reports_do_not_depend_on_the_batch(run_dir: Path, generator: Generator, images: list[Path]) -> None:
    studies = [images[0], images[1:], images[2], images]
    one_by_one = load_generator(run_dir, device="cpu", overrides=["generation.batch_size=1"])
    together = load_generator(run_dir, device="cpu", overrides=["generation.batch_size=99"])
    assert one_by_one.generate(studies) == together.generate(studies) == generator.generate(studies)
    assert generator.generate([]) == []


def test_the_model_is_ready_to_use(run_dir: Path, generator: Generator) -> None:
    assert emrrg_cli.load_generator is load_generator
    assert generator.precision == "fp32"
    assert not generator.model.training
    assert not any("lora" in name for name, _ in generator.model.named_parameters())  # merged
    assert generator.recipe.generation.num_beams == 2
    assert load_generator(str(run_dir)).device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_overrides_have_an_effect(run_dir: Path, images: list[Path]) -> None:
    short = load_generator(run_dir, device="cpu", overrides=["generation.max_new_tokens=1", "generation.num_beams=1"])
    assert short.recipe.generation.max_new_tokens == 1
    tokens = [short.model.tokenizer.encode(report) for report in short.generate(images)]
    assert all(len(row) <= 1 for row in tokens)
    with pytest.raises(UsageError, match="num_beamz"):
        load_generator(run_dir, overrides=["generation.num_beamz=1"])


def test_sampling_is_repeatable(run_dir: Path, images: list[Path]) -> None:
    options = ["generation.do_sample=true", "generation.num_beams=1", "generation.temperature=3.0"]
    one = load_generator(run_dir, device="cpu", overrides=options)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert one.generate(images) == one.generate(images)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's own draws go on as if nothing had happened
    other = load_generator(run_dir, device="cpu", overrides=[*options, "generation.seed=1"])
    assert other.generate(images) != one.generate(images)


def test_images_that_cannot_be_read_are_named(generator: Generator, images: list[Path], tmp_path: Path) -> None:
    absent = tmp_path / "absent.png"
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ImageError, match=r"absent\.png: missing image"), pytest.warns(UserWarning, match=r"text\.png"):
        generator.generate([[absent], [tmp_path / "text.png"]])
    with pytest.raises(ImageError, match=r"text\.png: not an image"):
        study_pixels([images[0], tmp_path / "text.png"], 32)


def test_an_unreadable_image_costs_no_other_report(generator: Generator, images: list[Path], tmp_path: Path) -> None:
    absent = tmp_path / "absent.png"
    wanted = generator.generate(images)
    with pytest.warns(UserWarning, match="missing image|not an image") as told:
        found = generator.generate([absent, images[0], images[1], [absent, images[2]], b"no image"])
    assert found == ["", *wanted, ""]
    assert [str(one.message).split(": ", 1)[0] for one in told] == ["study 0", "study 3", "study 4"]
    assert f"{absent}: missing image" in str(told[1].message)


def test_images_are_read_batch_by_batch(generator: Generator, images: list[Path], tmp_path: Path) -> None:
    written: list[str] = []
    read_ahead: list[int] = []

    def studies() -> Any:
        for number in range(12):
            read_ahead.append(number - len(written))
            yield images[number % 3]

    write = generator.writer.write

    def counted(batches: Any) -> Any:
        for done in write(batches):
            written.extend(study.text for study in done)
            yield done

    generator.writer.write = counted  # type: ignore[method-assign]
    try:
        reports = generator.generate(studies())
    finally:
        generator.writer.write = write  # type: ignore[method-assign]
    assert reports == generator.generate(images) * 4
    assert max(read_ahead) < 6  # a batch has 2


def test_a_wrong_study_is_found_before_the_first_report(generator: Generator, images: list[Path]) -> None:
    read = []
    studies: Any = [*images, 5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emrrg_cli.decoding.reports.read_image", read.append)
        with pytest.raises(UsageError, match="neither bytes nor a PIL image must be a path, not int"):
            generator.generate(studies)
    assert read == []


def test_other_inputs_than_a_list_of_studies_are_refused(generator: Generator, images: list[Path]) -> None:
    with pytest.raises(UsageError, match="a study has no images"):
        generator.generate([images[0], []])
    one: Any
    for one in (str(images[0]), images[0], Image.open(images[0]), {"a": images[0]}, {images[0]}, None):
        with pytest.raises(UsageError, match="takes a list of studies"):
            generator.generate(one)


def test_studies_may_be_a_column_or_a_generator(generator: Generator, images: list[Path]) -> None:
    wanted = generator.generate(images[:2])
    assert generator.generate(np.array([str(image) for image in images[:2]])) == wanted
    assert generator.generate(image for image in images[:2]) == wanted


def test_pixels_of_a_study(images: list[Path]) -> None:
    pixels = study_pixels(images[:2], 32)
    assert pixels.shape == (2, 32, 32)
    assert pixels.dtype == torch.uint8
    assert torch.equal(study_pixels(images[1], 48)[0], torch.from_numpy(np.asarray(Image.open(images[1])).copy()))


def test_many_images_of_a_study_are_bounded_as_in_generate(
    run_dir: Path, generator: Generator, images: list[Path]
) -> None:
    many = [images[0]] * 16 + [images[1]] * 3
    with pytest.warns(UserWarning, match=r"only 16 of 19 images of study .*png are used; data.max_views=N allows more"):
        assert generator.generate([many]) == generator.generate([many[:16]])
    one = load_generator(run_dir, device="cpu", overrides=["data.max_views=1"])
    assert one.generate([many[15:17]]) == generator.generate([images[0]])
    assert study_pixels(many, 32, 18).shape == (18, 32, 32)


def test_directories_that_are_not_runs_are_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a run directory: it has no recipe\.yaml"):
        load_generator(tmp_path)
    with pytest.raises(UsageError, match="no such run directory"):
        load_generator(tmp_path / "absent")
    begun = tmp_path / "begun"
    shutil.copytree(run_dir, begun)
    shutil.rmtree(begun / "model")
    with pytest.raises(RunError, match="has no trained model yet"):
        load_generator(begun)
    recipe = (begun / "recipe.yaml").read_text()
    (begun / "recipe.yaml").write_text(recipe + "surprise: 1\n")
    with pytest.raises(UsageError, match="surprise"):
        load_generator(begun)


def test_a_run_that_was_moved_still_works(
    run_dir: Path, generator: Generator, images: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(run_dir, tmp_path / "elsewhere")
    assert load_generator(tmp_path / "elsewhere", device="cpu").generate(images) == generator.generate(images)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:-3", "meta"])
def test_missing_devices_are_refused(name: str, run_dir: Path) -> None:
    with pytest.raises(UsageError, match="device"):
        load_generator(run_dir, device=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_no_gpu_here(name: str) -> None:
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is one")
    with pytest.raises(UsageError, match=f"there is no device '{name}' here"):
        choose_device(name)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


# -- a split --------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def _settings(**options: Any) -> GenerationSettings:
    return GenerationSettings(**({"num_beams": 1, "max_new_tokens": 8, "batch_size": 3} | options))


@pytest.mark.slow
def test_a_split_is_written_in_order(generator: Generator, tiny_dataset: Path, accelerator: Any) -> None:
    recipe = generator.recipe
    dataset = ReportDataset(open_dataset(tiny_dataset)["train"], recipe.data, 48)
    done: list[int] = []
    reports = write_split(generator.model, dataset, _settings(), accelerator, advance=done.append)
    assert len(reports) == 16
    assert sum(done) == 16  # they leave the running batch one by one
    pixels = [dataset[i].pixels for i in range(16)]
    alone = [generator.model.generate(p, torch.tensor([len(p)]), _config()) for p in pixels]
    assert reports == [report for (report,) in alone]
    assert len(set(reports)) > 8
    for other in (_settings(batch_size=1), _settings(batch_size=16)):
        assert write_split(generator.model, dataset, other, accelerator) == reports
    some = write_split(generator.model, dataset, _settings(), accelerator, indices=[9, 2], workers=1)
    assert some == [reports[9], reports[2]]
    assert write_split(generator.model, dataset, _settings(), accelerator, indices=[]) == []


def _config() -> Any:
    from emrrg_cli.decoding.reference import generation_config

    return generation_config(_settings())()


def test_a_split_is_shared_among_processes(
    generator: Generator, tiny_dataset: Path, accelerator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes one after the other; what they gather comes in the order of the processes."""
    dataset = ReportDataset(open_dataset(tiny_dataset)["train"], generator.recipe.data, 48)
    expected = write_split(generator.model, dataset, _settings(), accelerator, indices=range(7))
    parts: list[list[Any]] = []

    def gather(written: list[Any]) -> list[Any]:
        parts.append(written)
        if len(parts) == 1:
            raise InterruptedError
        return [pair for part in parts for pair in part]

    monkeypatch.setattr("accelerate.utils.gather_object", gather)

    def run(rank: int) -> list[str]:
        process = SimpleNamespace(
            process_index=rank, num_processes=2, device=torch.device("cpu"), autocast=accelerator.autocast
        )
        return write_split(generator.model, dataset, _settings(), process, indices=range(7))

    with pytest.raises(InterruptedError):
        run(0)
    assert run(1) == expected
    assert [len(part) for part in parts] == [4, 3]


def test_batches_of_sampled_reports_differ(run_dir: Path) -> None:
    options = ["generation.do_sample=true", "generation.num_beams=1", "generation.temperature=3.0"]
    one_by_one = load_generator(run_dir, device="cpu", overrides=[*options, "generation.batch_size=1"])
    reports = one_by_one.generate([Image.new("L", (32, 32), 90)] * 4)
    assert len(set(reports)) > 1
    assert one_by_one.generate([Image.new("L", (32, 32), 90)] * 4) == reports


def test_sampling_a_split_follows_the_seed(generator: Generator, tiny_dataset: Path, accelerator: Any) -> None:
    dataset = ReportDataset(open_dataset(tiny_dataset)["test"], generator.recipe.data, 48)
    settings = _settings(do_sample=True, temperature=3.0)
    one = write_split(generator.model, dataset, settings, accelerator)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert write_split(generator.model, dataset, settings, accelerator) == one
    assert torch.equal(torch.get_rng_state(), before)
    other = _settings(do_sample=True, temperature=3.0, seed=1)
    assert write_split(generator.model, dataset, other, accelerator) != one


# -- context ----------------------------------------------------------------------------------------------------------

CONTEXTS: list[Any] = [
    {"indication": "Cough."},
    {},
    {"indication": "XXXX-year-old with shortness of breath, and a long history of smoking", "age": "058Y"},
    {"age": 7},
    {"indication": "the lungs are clear", "age": "no age"},
]


@pytest.mark.slow
def test_both_engines_write_the_same_with_contexts(run_dir: Path, images: list[Path]) -> None:
    studies = [images[0], images[1:], images[2], images, images[1]]
    written = []
    for engine, size in (("own", 2), ("own", 1), ("own", 9), ("transformers", 9), ("transformers", 1)):
        options = ["data.context=[indication, age]", f"generation.engine={engine}", f"generation.batch_size={size}"]
        generator = load_generator(run_dir, device="cpu", overrides=options)
        written.append(generator.generate(studies, CONTEXTS))
    assert all(reports == written[0] for reports in written)
    bare = generator.generate(studies)
    assert bare[1] == written[0][1]
    assert bare[2] != written[0][2]
    assert generator.generate(studies, [{}] * 5) == bare
    # What says nothing once it is cleaned is not in the prompt.
    assert generator.generate([images[0]], [{"indication": "XXXX."}]) == bare[:1]


def test_a_context_that_the_model_does_not_read(run_dir: Path, generator: Generator, images: list[Path]) -> None:
    with pytest.raises(UsageError, match="does not read sex: it was trained without any context"):
        generator.generate(images[:1], [{"sex": "F"}])
    reads = load_generator(run_dir, device="cpu", overrides=["data.context=[age]"])
    with pytest.raises(UsageError, match="does not read indication, sex: it reads age"):
        reads.generate(images[:1], [{"sex": "F", "indication": "cough"}])
    with pytest.raises(UsageError, match="the context age must be a text or a number, not list"):
        reads.generate(images[:1], [{"age": [4]}])
    with pytest.raises(UsageError, match="there are 2 studies and 1 contexts"):
        reads.generate(images[:2], [{"age": 4}])


def test_without_a_path_the_default_model_is_loaded(default_model: Path, tiny_r2gen: Path) -> None:
    image = next((tiny_r2gen / "images").rglob("*.png"))
    written = load_generator(device="cpu").generate([image])
    assert written == load_generator(default_model, device="cpu").generate([image])


@pytest.mark.usefixtures("no_default_model")
def test_without_path_and_default_model_a_run_is_needed() -> None:
    with pytest.raises(UsageError, match="has no default model") as raised:
        load_generator()
    assert raised.value.hint == "Name the run directory: load_generator(RUN)."
