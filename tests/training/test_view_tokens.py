"""`model.view_tokens`: views of a data set, of files and of headers, from training to reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from emrrg_cli.app import main
from emrrg_cli.checksums import write_checksums
from emrrg_cli.datasets.directory import open_dataset
from emrrg_cli.datasets.report_dataset import ReportDataset, collate, projections_of
from emrrg_cli.errors import UsageError
from emrrg_cli.recipe.common import DataSettings
from tests.varied import varied_copy


@pytest.fixture(scope="module")
def told_run(context_dataset: Path, tiny_overrides: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was told of views, with weights so large that its reports depend on them. Not to be changed."""
    folder = tmp_path_factory.mktemp("views")
    options = [*tiny_overrides[1:], f"data.root={context_dataset}", "model.view_tokens=true", "train.trackers=[]"]
    options += ["train.select=loss", "train.epochs=1"]
    assert main(["finetune", "tiny/finetune", *options, "--output", str(folder / "run")]) == 0
    varied_copy(folder / "run", folder / "varied")
    file = folder / "varied" / "model" / "bridge.safetensors"
    tensors = load_file(file)
    assert tensors["view_embedding"].abs().max() > 0  # trained
    tensors["view_embedding"] = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)) * 20
    save_file(tensors, file, {"format": "pt"})
    write_checksums(folder / "varied" / "model")
    return folder / "varied"


def test_projections_of_studies(context_dataset: Path) -> None:
    assert projections_of(["PA", "LATERAL", "LAO", None, "unknown"], 6) == (1, 2, 0, 0, 0, 0)
    assert projections_of(None, 2) == (0, 0)
    assert projections_of(["PA", "LATERAL"], 1) == (1,)
    dataset = ReportDataset(open_dataset(context_dataset)["train"], DataSettings(), 16)
    batch = collate([dataset[0], dataset[2], dataset[4]])
    assert batch.projections is not None
    assert batch.projections.tolist() == [1, 2, 0]
    assert dataset.knows_views


def test_a_data_set_without_views_is_refused(finetune: Any, tiny_dataset: Path) -> None:
    assert not ReportDataset(open_dataset(tiny_dataset)["train"], DataSettings(), 16).knows_views
    with pytest.raises(UsageError, match=r"model\.view_tokens: .*tiny.* does not say whether"):
        finetune("run", "model.view_tokens=true")


@pytest.mark.slow
def test_generate_and_evaluate_use_known_views(
    told_run: Path, context_dataset: Path, tmp_path: Path, no_java: None, chest: Any, make_dicom: Callable[..., bytes]
) -> None:
    model = ["-m", str(told_run)]
    assert main(["evaluate", *model, "--split", "train", "-o", str(tmp_path / "scores")]) == 0
    assert main(["generate", str(context_dataset), *model, "--split", "train", "-o", str(tmp_path / "out")]) == 0
    scored = [json.loads(line) for line in (tmp_path / "scores" / "predictions.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (tmp_path / "out" / "reports.jsonl").read_text().splitlines()]
    assert {row["study"]: row["report"] for row in rows} == {row["study_id"]: row["hypothesis"] for row in scored}

    films = tmp_path / "films"
    films.mkdir()
    for name in ("plain", "view1_frontal", "view2_lateral"):
        Image.fromarray(chest).save(films / f"{name}.png")
    for name, view in (("pa", "PA"), ("ll", "LL")):
        (films / f"{name}.dcm").write_bytes(make_dicom(chest, ViewPosition=view))
    assert main(["generate", str(films), *model, "-o", str(tmp_path / "new"), "--study-by", "file"]) == 0
    found = {Path(row["path"]).stem: row for row in map(json.loads, (tmp_path / "new" / "reports.jsonl").open())}
    views = {name: row["views"] for name, row in found.items()}
    assert views == {"plain": [None], "view1_frontal": ["FRONTAL"], "view2_lateral": ["LATERAL"], "pa": ["PA"],
                     "ll": ["LATERAL"]}  # fmt: skip
    reports = {name: row["report"] for name, row in found.items()}
    assert reports["view1_frontal"] == reports["pa"] != reports["view2_lateral"] == reports["ll"]
    assert reports["plain"] not in (reports["pa"], reports["ll"])
    from emrrg_cli.decoding.reports import load_generator

    given = [films / "plain.png", str(films / "view1_frontal.png"), [films / "view2_lateral.png"],
             (films / "pa.dcm").read_bytes(), films / "ll.dcm"]  # fmt: skip
    wanted = [reports[name] for name in ("plain", "view1_frontal", "view2_lateral", "pa", "ll")]
    assert load_generator(told_run, device="cpu").generate(given) == wanted


@pytest.mark.slow
def test_films_are_compared_without_their_views(told_run: Path) -> None:
    from emrrg_cli.decoding.reports import load_generator
    from emrrg_cli.models.film_distance import describe

    seen: list[torch.Tensor] = []

    class Recorder:
        def of_studies(self, films: tuple[torch.Tensor, torch.Tensor], views: torch.Tensor) -> list[Any]:
            seen.append(films[0])
            return [None] * len(views)

    generator = load_generator(told_run, device="cpu")
    generator.writer.film_distance = Recorder()  # type: ignore[assignment]
    pixels = torch.randint(0, 256, (1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    assert len(generator.generate_pixels([pixels])) == 1
    with torch.no_grad():
        images = (pixels[:, None].float() / 255 - generator.model.mean) / generator.model.std
        assert torch.equal(seen[0], describe(generator.model.encoder(images), pixels)[0])
        assert not torch.equal(seen[0], describe(generator.model.encode(pixels), pixels)[0])
