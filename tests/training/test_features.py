"""Settings of training that are off by default: what each does in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from emrrg_cli.datasets.finding_targets import FINDINGS
from emrrg_cli.decoding.reports import load_generator
from emrrg_cli.decoding.writer import Studies
from emrrg_cli.errors import UsageError


@pytest.mark.slow
def test_a_scaled_rate_changes_only_its_part_of_the_model(finetune: Any) -> None:
    first = finetune("first", "train.max_steps=1")
    slow = finetune("slow", "train.max_steps=1", "train.lr_scale.encoder=1e-12")
    moved = [name for name, tensor in first.weights.items() if not torch.equal(tensor, slow.weights[name])]
    assert moved
    assert all(name.startswith("encoder.") for name in moved)


@pytest.mark.slow
def test_smoothing_and_dropout_are_only_for_training(finetune: Any) -> None:
    options = ("train.max_steps=1", "train.lr=1e-30")
    plain = finetune("plain", *options)
    for name, setting in (("smooth", "train.label_smoothing=0.3"), ("drop", "model.llm.scratch.dropout=0.5")):
        run = finetune(name, *options, setting)
        assert run.series("validation/loss") == pytest.approx(plain.series("validation/loss"), rel=1e-6)
        assert run.series("train/loss") != pytest.approx(plain.series("train/loss"), rel=1e-5)


@pytest.mark.slow
def test_only_training_images_are_changed(finetune: Any) -> None:
    options = ("train.epochs=1", "train.lr=1e-30")  # so that the weights stand still
    plain = finetune("plain", *options)
    changed = finetune("changed", *options, "data.augment.rotate=20", "data.augment.brightness=0.4")
    assert changed.series("validation/loss") == pytest.approx(plain.series("validation/loss"), rel=1e-5)
    assert changed.series("train/loss") != plain.series("train/loss")


@pytest.mark.slow
def test_a_run_trains_saves_and_loads_the_head(finetune: Any) -> None:
    from emrrg_cli.models.build import load_model
    from emrrg_cli.recipe.load import load_recipe

    plain = finetune("plain", "train.epochs=1")
    run = finetune("run", "train.epochs=1", "model.findings=true", "train.findings_weight=2")
    half = finetune("half", "train.epochs=1", "model.findings=true", "train.findings_weight=1")
    assert "bridge.safetensors:findings.evidence.weight" in run.exported
    assert "bridge.safetensors:findings.evidence.weight" not in plain.exported
    # The loss is that of the reports and the weighted one of the findings, each at the first step.
    words, one, two = (made.series("train/loss")[0] for made in (plain, half, run))
    assert two - one == pytest.approx(one - words, rel=1e-4)
    assert one - words > 0.1
    recipe = load_recipe(str(run.directory / "recipe.yaml"), [], stage="finetune")
    model = load_model(run.directory, recipe.model, torch.float32)
    assert torch.equal(model.findings.evidence.weight, run.exported["bridge.safetensors:findings.evidence.weight"])


@pytest.mark.slow
def test_the_findings_head_starts_from_stage_2(finetune: Any, tmp_path: Path, capfd: Any) -> None:
    from safetensors.torch import save_file

    from emrrg_cli.models.build import build_encoder
    from emrrg_cli.models.encoder_files import save_encoder
    from emrrg_cli.models.findings_head import FindingsHead
    from emrrg_cli.recipe.load import load_recipe

    options = ("train.max_steps=1", "train.lr=1e-30", "model.findings=true")
    recipe = load_recipe(str(finetune("plain", *options).directory / "recipe.yaml"), [], stage="finetune")
    encoder, stage_2 = build_encoder(recipe.model.encoder), tmp_path / "stage-2" / "model"
    stage_2.mkdir(parents=True)
    save_encoder(stage_2, encoder)
    head = {
        name: torch.randn_like(t) for name, t in FindingsHead(recipe.model.encoder.d_model, 14).state_dict().items()
    }
    save_file(head, stage_2 / "findings.safetensors")
    run = finetune("run", *options, f"model.encoder.weights={stage_2}")
    assert "the findings head starts from the head of stage 2" in capfd.readouterr().err
    for name, tensor in head.items():
        assert torch.allclose(run.exported[f"bridge.safetensors:findings.{name}"], tensor, atol=1e-6)
    with pytest.raises(UsageError, match=r"head of stage 2 has 14 findings, and model\.findings_set has 23"):
        finetune("other", *options, f"model.encoder.weights={stage_2}", "model.findings_set=extended")


@pytest.mark.slow
def test_reports_follow_the_extended_set(finetune: Any) -> None:
    told = ("model.findings=true", "model.findings_set=extended", "model.findings_prompt=true")
    run = finetune("run", *told, "model.findings_prompt_labels=true", "train.max_steps=1")
    assert run.exported["bridge.safetensors:findings.evidence.bias"].shape == (23,)
    generator = load_generator(run.directory, device="cpu")
    size = generator.recipe.model.encoder.image_size
    study = Studies([0], [0], torch.zeros(1, size, size, dtype=torch.uint8), torch.ones(1, dtype=torch.long))
    (written,) = (done for some in generator.write(iter([study])) for done in some)
    assert list(written.findings) == list(FINDINGS)


@pytest.mark.slow
def test_balance_lengthens_the_epoch_by_studies_with_findings(finetune: Any, tiny_dataset: Any) -> None:
    from emrrg_cli.datasets.balance import BalancedStudies
    from emrrg_cli.datasets.directory import open_dataset
    from emrrg_cli.datasets.report_dataset import ReportDataset
    from emrrg_cli.recipe.common import DataSettings

    studies = ReportDataset(open_dataset(tiny_dataset)["train"], DataSettings(), 32)
    longer = BalancedStudies(studies, 8.0).epoch_length
    assert longer > len(studies)
    run = finetune("run", "train.epochs=1", "train.batch_size=1", "data.balance=8")
    assert run.last_step() == longer


@pytest.mark.slow
def test_findings_can_choose_the_best_model(finetune: Any) -> None:
    options = ("train.epochs=1", "train.select=score", "generation.max_new_tokens=4")
    run = finetune("run", *options, "train.score_weights={F1_rules: 2.0}")
    (score,) = run.series("validation/score")
    assert 0 <= score <= 2
    assert score == 2 * run.series("validation/F1_rules")[0]


@pytest.mark.slow
def test_a_run_with_findings_in_the_prompt_writes_after_loading(finetune: Any) -> None:
    from emrrg_cli.decoding.reports import load_generator
    from emrrg_cli.decoding.writer import Studies
    from emrrg_cli.errors import UsageError

    labels = ("model.findings_prompt_labels=true", "model.findings_threshold=0.3", "train.findings_balance=1")
    run = finetune("run", "train.epochs=1", "model.findings=true", "model.findings_prompt=true", *labels)
    generator = load_generator(run.directory, overrides=["generation.max_new_tokens=5"])
    assert generator.model.findings_prompt.threshold == 0.3
    assert len(generator.generate_pixels([torch.zeros(1, 32, 32, dtype=torch.uint8)])) == 1
    film = torch.zeros(1, 32, 32, dtype=torch.uint8)
    written = next(iter(generator.write([Studies(["film"], [0], film, torch.tensor([1]))])))[0]
    tokens = generator.model.encode_films(film)
    expected = generator.model.findings(tokens, torch.tensor([1])).sigmoid()[0].tolist()
    assert list(written.findings.values()) == pytest.approx(expected, abs=1e-5)
    assert list(written.findings)[:2] == ["No Finding", "Enlarged Cardiomediastinum"]
    with pytest.raises(UsageError, match="findings_prompt needs the findings head"):
        finetune("bad", "model.findings_prompt=true")
    with pytest.raises(UsageError, match="need findings_prompt: true"):
        finetune("bad", "model.findings=true", "model.findings_threshold=0.3")
