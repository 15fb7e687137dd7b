"""`align` as a whole: what a run directory holds, gradients over processes and chunks, continuation, failure."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from emrrg_cli.app import main
from emrrg_cli.datasets.align_dataset import collate_pairs
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.models.arm.encoder import ArmEncoder
from emrrg_cli.models.build_alignment import load_alignment
from emrrg_cli.recipe.load import load_recipe
from emrrg_cli.runtime import make_accelerator
from emrrg_cli.training.align import embed_pairs, open_pairs, run_align

TINY = (
    "data.section=report",
    "data.max_text_tokens=24",
    "model.encoder={d_model: 16, depth: 2, image_size: 32, d_state: 4, drop_path: 0.0}",
    "model.text.scratch={hidden_size: 16, layers: 2, heads: 2, vocab_size: 320, dropout: 0.0}",
    "model.dim=24",
    "train.batch_size=8",
    "train.epochs=2",
    "train.warmup_epochs=0",
    "train.validate_every_epochs=1",
    "train.log_every=1",
    "train.trackers=[]",
)
NOISY = ("model.encoder.depth=3", "model.encoder.drop_path=0.9", "model.text.scratch.dropout=0.3", "train.epochs=3")


@pytest.fixture
def align(tiny_dataset: Path, tmp_path: Path, run_of: Any) -> Callable[..., Any]:
    """Runs `align` in this process on 16 studies with 4 to validate on."""

    def run(name: str, *overrides: str, resume: bool = False) -> Any:
        recipe = load_recipe("phantom/align", [f"data.root={tiny_dataset}", *TINY, *overrides], stage="align")
        return run_of(tmp_path / name, run_align(recipe, tmp_path / name, resume=resume, expected_processes=0))

    return run


@pytest.fixture
def in_two(tiny_dataset: Path, tmp_path: Path, run_of: Any, forked: Any) -> Callable[..., Any]:
    """Runs `align` in a group of two processes."""

    def run(name: str, *overrides: str) -> Any:
        arguments = ["align", "phantom/align", f"data.root={tiny_dataset}", *TINY, *overrides]
        done = forked(*arguments, "--output", str(tmp_path / name), "--num-processes", "2", processes=2)
        assert [process.returncode for process in done] == [0, 0], done
        return run_of(tmp_path / name)

    return run


def gradients(run: Any) -> list[torch.Tensor]:
    """Of every trained parameter in the first step, out of Adam's first moment."""
    state = torch.load(run.checkpoint / "state.pt", weights_only=True)["optimizer"]
    beta = state["param_groups"][0]["betas"][0]
    return [entry["exp_avg"] / (1 - beta) for _, entry in sorted(state["state"].items())]


def largest(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest entry of all."""
    assert len(a) == len(b)
    scale = max(float(tensor.abs().max()) for tensor in b)
    return max(float((one - other).abs().max()) for one, other in zip(a, b, strict=True)) / scale


# -- the run directory -------------------------------------------------------------------------------------------


def test_a_run_from_the_command_line(tiny_dataset: Path, tmp_path: Path, run_of: Any, capsys: Any) -> None:
    run = tmp_path / "run"
    arguments = ["align", "phantom/align", f"data.root={tiny_dataset}", *TINY, "--output", str(run)]
    assert main(arguments) == 0
    told = capsys.readouterr().err
    assert f"Next:  emrrg finetune RECIPE model.encoder.weights={shlex.quote(str(run))}" in told
    assert {entry.name for entry in run.iterdir()} == {
        *("recipe.yaml", "environment.json", "history.jsonl", "curve.png", "tokenizer", "model", "checkpoints"),
        "checksums.json",
    }
    names = {str(file.relative_to(run / "model")) for file in (run / "model").rglob("*") if file.is_file()}
    assert names == {
        *("encoder.safetensors", "encoder.json", "alignment.safetensors", "alignment.json"),
        *("text_encoder/config.json", "text_encoder/model.safetensors"),
        "checksums.json",
    }
    sizes = json.loads((run / "model" / "encoder.json").read_text())
    assert sizes == {"format": 1, "kind": "encoder", "d_model": 16, "depth": 2, "d_state": 4, "image_size": 32}
    head = load_file(run / "model" / "alignment.safetensors")
    assert {name: list(tensor.shape) for name, tensor in head.items()} == {
        "vision_proj.weight": [24, 16],
        "vision_proj.bias": [24],
        "text_proj.weight": [24, 16],
        "text_proj.bias": [24],
        "logit_scale": [],
    }
    rows = run_of(run).history
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    recalls = {f"validation/{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    validation = [row for row in rows if "validation/loss" in row]
    assert [row["step"] for row in validation] == [2, 4]
    expected = {"step", "epoch", "validation/loss", "validation/score", "validation/logit_scale"} | recalls
    assert set(validation[0]) == expected
    assert validation[0]["validation/score"] == pytest.approx(sum(validation[0][name] for name in recalls) / 6)
    assert validation[0]["validation/image_to_text_R@10"] == 1.0  # of 4 studies


def test_a_trained_model_loads_and_starts_the_next_stage(align: Any, tiny_dataset: Path) -> None:
    run = align("run", "train.select=loss", "train.validate_every_epochs=2")
    assert "validation/score" not in run.history[-1]
    model = load_alignment(run.directory)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (model.max_text_tokens, model.pooling) == (24, "mean")
    named = dict(model.named_parameters())
    for name, tensor in run.weights.items():
        assert torch.equal(named[name], tensor), name
    encoder = ArmEncoder(16, 2, image_size=32, d_state=4)
    encoder.load_state_dict(load_file(run.directory / "model" / "encoder.safetensors"))

    # The figures of the validation are those of the model that was read back.
    recipe = load_recipe(str(run.directory / "recipe.yaml"), stage="align")
    pairs = open_pairs(recipe.data, "validation", 32)
    assert pairs is not None
    images, texts = embed_pairs(model, pairs, range(4), 3, make_accelerator("fp32", 0))
    batch = collate_pairs([pairs[i] for i in range(4)], model.tokenizer, 24)
    assert torch.allclose(images, model._image_embeddings(model.encode(batch.pixels), batch.views), atol=1e-6)
    logits = model.logit_scale.exp() * images @ texts.T
    loss = -(logits.log_softmax(0).diag() + logits.log_softmax(1).diag()).mean() / 2
    assert run.history[-1]["validation/loss"] == pytest.approx(float(loss), rel=1e-4)

    from emrrg_cli.training.finetune import run_finetune

    model_settings = "model.encoder={d_model: 16, depth: 2, image_size: 32, d_state: 4, drop_path: 0.0}"
    llm = "model.llm.scratch={hidden_size: 32, layers: 1, heads: 2, kv_heads: 1, vocab_size: 320}"
    start = f"model.encoder.weights={run.directory}"
    options = [f"data.root={tiny_dataset}", model_settings, llm, start, "train.max_steps=1", "train.trackers=[]"]
    finetune = load_recipe("tiny/finetune", [*options, "model.adapter.targets=none", "train.select=loss"])
    run_finetune(finetune, run.directory.parent / "next", resume=False, expected_processes=0)  # type: ignore[arg-type]
    frozen = load_file(run.directory.parent / "next" / "encoder.safetensors")
    assert all(torch.equal(frozen[name], tensor) for name, tensor in encoder.state_dict().items())


@pytest.mark.slow
def test_a_tower_from_a_directory_trained_or_frozen(align: Any, tmp_path: Path) -> None:
    first = align("first", "train.max_steps=1")
    tower = tmp_path / "tower"
    shutil.copytree(first.directory / "model" / "text_encoder", tower)
    shutil.copytree(first.directory / "tokenizer", tower, dirs_exist_ok=True)
    before = load_file(tower / "model.safetensors")

    def exported(run: Any) -> dict[str, torch.Tensor]:
        return load_file(run.directory / "model" / "text_encoder" / "model.safetensors")

    name = f"model.text.name={tower}"
    trained = align("trained", name, "model.text.pooling=last")
    assert any(not torch.equal(exported(trained)[key], tensor) for key, tensor in before.items())
    whole = align("frozen", name, "model.text.frozen=true", *NOISY[:2])
    assert all(torch.equal(exported(whole)[key], tensor) for key, tensor in before.items())
    assert not any(key.startswith("text_encoder") for key in whole.weights)
    assert "text_proj.weight" in whole.weights
    # A run with a frozen tower goes on with its own copy, whatever became of the original.
    options = (name, "model.text.frozen=true", *NOISY[:2])
    align("parts", *options, "train.stop_after_steps=2")
    shutil.rmtree(tower)
    parts = align("parts", *options, resume=True)
    assert all(torch.equal(parts.exported[key], tensor) for key, tensor in whole.exported.items())


# -- gradients ---------------------------------------------------------------------------------------------------

ONE_STEP = ("train.max_steps=1", "train.clip_norm=null", "train.batch_size=16")


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_the_joined_batch(align: Any, in_two: Any) -> None:
    alone = align("alone", *ONE_STEP)
    expected = gradients(alone)
    assert len(expected) == len(alone.weights)
    assert max(float(tensor.abs().max()) for tensor in expected) > 1e-3
    both = in_two("both", *ONE_STEP)
    assert largest(gradients(both), expected) < 1e-5
    # Three chunks a process: the gradients are cached, and the processes meet at the last one.
    chunks = in_two("chunks", *ONE_STEP, "train.micro_batch_size=3")
    assert largest(gradients(chunks), expected) < 1e-5
    for run in (both, chunks):
        for key in ("train/loss", "validation/loss", "validation/score"):
            assert run.series(key) == pytest.approx(alone.series(key), rel=1e-5)
    # A loss over each process's own half would be log 8 to begin with, not log 16.
    assert 2.4 < alone.series("train/loss")[0] < 3.2


@pytest.mark.slow
def test_chunks_have_the_gradient_of_the_whole_batch(align: Any) -> None:
    expected = align("whole", *ONE_STEP)
    for size in (1, 5):
        chunks = align(f"by{size}", *ONE_STEP, f"train.micro_batch_size={size}")
        assert largest(gradients(chunks), gradients(expected)) < 1e-5
        assert chunks.series("train/loss") == pytest.approx(expected.series("train/loss"), rel=1e-5)


def test_equal_reports_in_validation_choose_no_model(align: Any, capsys: Any) -> None:
    run = align("run", "data.max_text_tokens=2")  # nothing is left of the reports but the first and the last token
    told = capsys.readouterr().err
    assert told.count("the validation split has only one different report, so it is not used") == 1
    assert not run.series("validation/score")
    last, exported = run.weights, run.exported
    assert torch.equal(exported["alignment.safetensors:logit_scale"], last["logit_scale"])
    align("run", "data.max_text_tokens=2", resume=True)
    told = capsys.readouterr().err
    assert "this run is already finished" in told
    assert "is not used" not in told


# -- mixing, continuation ----------------------------------------------------------------------------------------


def test_several_data_sets_are_mixed_by_their_weights(tiny_dataset: Path, align: Any, capsys: Any) -> None:
    sets = f"[{{root: '{tiny_dataset}', weight: 0.5}}, {{root: '{tiny_dataset}', weight: 2, cleaning: none}}]"
    run = align("run", "data.root=null", f"data.sets={sets}")
    assert [row["epoch"] for row in run.history if "train/loss" in row] == [step / 5 for step in range(1, 11)]
    told = capsys.readouterr().err
    assert f"{tiny_dataset}: 16 studies, weight 0.5, 8 in an epoch\n{tiny_dataset}: 16 studies, weight 2, 32 in" in told
    # The two validation splits are one and the same: of each report there are at least two.
    assert told.count("validation on 8 pairs with") == 1
    assert "recall@1 (R@1) is 0.1250 by chance" in told


@pytest.mark.slow
@pytest.mark.parametrize("size", ["null", "3"])
def test_a_run_stopped_and_resumed_is_the_uninterrupted_one(align: Any, tiny_dataset: Path, size: str) -> None:
    sets = f"data.sets=[{{root: '{tiny_dataset}', weight: 0.75}}, {{root: '{tiny_dataset}', weight: 0.5}}]"
    options = (*NOISY, "data.root=null", sets, f"train.micro_batch_size={size}", "train.validate_every_epochs=2")
    whole = align("whole", *options)
    align("part", *options, "train.checkpoint_every_steps=1", "train.stop_after_steps=3")
    torch.manual_seed(99)
    part = align("part", *options, resume=True)
    assert part.last_step() == whole.last_step() == 6
    for name, tensor in whole.exported.items():
        assert torch.equal(part.exported[name], tensor), name
    assert part.history == whole.history
    if size == "null":  # the noise that is drawn matters
        quiet = align("quiet", *options, "model.text.scratch.dropout=0.0")
        assert any(not torch.equal(quiet.weights[name], tensor) for name, tensor in whole.weights.items())


@pytest.mark.slow
def test_it_learns(align: Any) -> None:
    run = align("run", "train.epochs=24", "train.lr=5e-3", "train.validate_every_epochs=24")
    losses = run.series("train/loss")
    # Of 8 pairs with four different reports, two of each on average, a fifth can tell no more than the report.
    assert losses[0] > 1.9
    assert losses[-1] < 1.2


# -- failure -----------------------------------------------------------------------------------------------------


def test_unusable_data_is_one_message(align: Any, tiny_dataset: Path, tmp_path: Path) -> None:
    for overrides, error, told in (
        (("data.root=null",), UsageError, "data.root is not set"),
        (("data.section=impression",), RunError, f"{tiny_dataset}: no study of the train split has text for"),
        (("data.limit=7",), UsageError, r"7 usable examples, fewer than train.batch_size=8"),
        ((f"data.root={tmp_path / 'none'}",), UsageError, "no such dataset directory"),
        (("model.text.name=no/such-tower",), RunError, "'no/such-tower' is not a local directory and"),
        (("model.encoder.weights=nowhere",), UsageError, "nowhere: no such file or directory"),
    ):
        with pytest.raises(error, match=told):
            align("run", *overrides)
        assert not (tmp_path / "run").exists()
    copy = tmp_path / "copy"
    shutil.copytree(tiny_dataset, copy, ignore=shutil.ignore_patterns("train-*", "manifest.json"))
    with pytest.raises(RunError, match="has no split named train"):
        align("run", f"data.root={copy}")


def test_a_batch_that_does_not_fit_is_refused_before_loading(align: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emrrg_cli.training.align._tokenizer", None)
    with pytest.raises(UsageError, match=r"7 usable examples, fewer than train\.batch_size=8"):
        align("run", "data.limit=7")


def test_an_offline_hub_name_is_one_message(tiny_dataset: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["align", "phantom/align", f"data.root={tiny_dataset}", *TINY, "-o", str(tmp_path / "run")]
    assert main([*arguments, "model.text.name=emilyalsentzer/Bio_ClinicalBERT-nowhere"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: the tokenizer 'emilyalsentzer/Bio_ClinicalBERT-nowhere' is not a local directory")
    assert "model.text.name=PATH" in told


def test_studies_without_text_are_left_out_and_counted(with_column: Any, align: Any, capsys: Any) -> None:
    copy = with_column("report", lambda reports: [None, " ", "", *reports[3:]])
    run = align("run", f"data.root={copy}", "train.epochs=1")
    assert run.summary.steps == 1  # 13 studies, batches of 8
    told = " ".join(capsys.readouterr().err.split())
    assert f"{copy}: 3 of 16 train studies have no text for data.section=report and are left out" in told


def test_without_a_validation_split_the_last_model_is_kept(align: Any, tiny_dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_dataset, copy, ignore=shutil.ignore_patterns("validation-*", "manifest.json"))
    run = align("run", f"data.root={copy}")
    assert run.summary.best is None
    assert load_alignment(run.directory).vision_proj.out_features == 24
    with pytest.raises(RunError, match="there is no trained stage 2 model here"):
        load_alignment(tmp_path)


@pytest.mark.slow
def test_the_head_on_findings_is_trained_and_kept(align: Any) -> None:
    plain = align("plain", "train.max_steps=1")
    one = align("one", "train.max_steps=1", "model.findings=true", "train.findings_weight=1")
    two = align("two", "train.max_steps=1", "model.findings=true", "train.findings_weight=2")
    words, half, whole = (run.series("train/loss")[0] for run in (plain, one, two))
    assert whole - half == pytest.approx(half - words, rel=1e-4)
    assert half - words > 0.1
    assert "findings.safetensors:evidence.weight" in one.exported
    # Gradient caching sees the same images, changed in the same way, and the same findings.
    options = ("train.max_steps=1", "model.findings=true", "data.augment.rotate=10")
    split = align("split", *options, "train.micro_batch_size=2")
    assert split.series("train/loss")[0] > 0
    assert any("findings" in name for name in split.weights)


# -- films with labels and no report ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_films_with_labels_train_the_head_on_findings(align: Any, tiny_dataset: Path, labelled_dataset: Path) -> None:
    both = f"data.sets=[{{root: '{tiny_dataset}'}}, {{root: '{labelled_dataset}', labels_only: true}}]"
    options = ("data.root=null", "model.findings=true", "train.epochs=2", "train.batch_size=7")
    whole = align("whole", both, *options)
    assert whole.last_step() == 2 * ((16 + 12) // 7)
    # The validation is of pairs alone.
    assert [row["validation/image_to_text_R@1"] for row in whole.history if "validation/loss" in row]
    align("part", both, *options, "train.stop_after_steps=3", "train.checkpoint_every_steps=1")
    resumed = align("part", both, *options, "train.checkpoint_every_steps=1", resume=True)
    for name, tensor in whole.weights.items():
        assert torch.equal(resumed.weights[name], tensor), name
    chunks = align("chunks", both, *options, "train.micro_batch_size=3", "train.max_steps=1")
    first = align("first", both, *options, "train.max_steps=1")
    assert largest(gradients(chunks), gradients(first)) < 1e-4
    assert chunks.series("train/loss") == pytest.approx(first.series("train/loss"), rel=1e-5)


def test_labels_only_needs_a_head_and_reports_beside_it(align: Any, tiny_dataset: Path, labelled_dataset: Path) -> None:
    films = f"{{root: '{labelled_dataset}', labels_only: true}}"
    with pytest.raises(UsageError, match="labels_only, which needs the findings head"):
        align("a", "data.root=null", f"data.sets=[{{root: '{tiny_dataset}'}}, {films}]", "model.findings=false")
    with pytest.raises(UsageError, match="sets has only labels_only data sets"):
        align("b", "data.root=null", f"data.sets=[{films}]", "model.findings=true")


@pytest.mark.slow
def test_two_processes_share_films_with_labels(
    align: Any, in_two: Any, tiny_dataset: Path, labelled_dataset: Path
) -> None:
    both = f"data.sets=[{{root: '{tiny_dataset}'}}, {{root: '{labelled_dataset}', labels_only: true}}]"
    options = ("data.root=null", both, "model.findings=true", *ONE_STEP, "train.batch_size=10")
    alone = align("alone", *options)
    for name, chunks in (("both", ()), ("chunks", ("train.micro_batch_size=3",))):
        run = in_two(name, *options, *chunks)
        assert largest(gradients(run), gradients(alone)) < 1e-5
        assert run.series("train/loss") == pytest.approx(alone.series("train/loss"), rel=1e-5)
