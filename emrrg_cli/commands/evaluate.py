"""`emrrg evaluate`: writes reports for a split and scores them, or scores a file of predictions."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emrrg_cli.commands.options import (
    FILE_OPTIONS,
    FILES_PANEL,
    HypothesisColumn,
    IdColumn,
    Json,
    NumProcesses,
    Overrides,
    ReferenceColumn,
    refuse_given,
)
from emrrg_cli.errors import UsageError

if TYPE_CHECKING:
    from emrrg_cli.evaluation.assess import Options

_OF_RUNS = ("data", "split", "recipe", "image_controls", "reference_labels", "num_processes")


def evaluate(
    context: typer.Context,
    overrides: Overrides = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Run directory of `emrrg finetune`.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Dataset directory; default: that of the run.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Split of the dataset directory.")] = "test",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Directory for scores and predictions; default: evaluation/SPLIT in the run, SPLIT-2 for other "
            "settings; with --predictions none.",
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Evaluation recipe whose settings replace those of the run.")
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(
            "--train", help="Dataset directory with the training reports, for controls; default: --data; none for FILE."
        ),
    ] = None,
    image_controls: Annotated[
        bool, typer.Option("--image-controls", help="Also write reports for blank films and films of other studies.")
    ] = False,
    reference_labels: Annotated[
        bool, typer.Option("--reference-labels", help="Take the labels of the references from the dataset.")
    ] = False,
    chexbert: Annotated[
        str | None, typer.Option("--chexbert", help="Also label with CheXbert: chexbert.pth or a hub repository.")
    ] = None,
    bertscore: Annotated[
        str | None, typer.Option("--bertscore", help="Also compute BERTScore with this model; needs bert-score.")
    ] = None,
    no_meteor: Annotated[bool, typer.Option("--no-meteor", help="Skip METEOR, the slowest score.")] = False,
    merge: Annotated[
        list[Path] | None,
        typer.Option("--merge", help="JSON file of other tools' scores to add to table and page; repeatable."),
    ] = None,
    num_processes: NumProcesses = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier evaluation in --output.")] = False,
    as_json: Json = False,
    predictions: Annotated[
        Path | None,
        typer.Option(
            "--predictions",
            metavar="FILE",
            help="Score this file (.jsonl, .csv, .json).",
            rich_help_panel=FILES_PANEL,
        ),
    ] = None,
    references: Annotated[
        Path | None,
        typer.Option("--references", help="File of references, if FILE has none.", rich_help_panel=FILES_PANEL),
    ] = None,
    id_column: IdColumn = None,
    hypothesis_column: HypothesisColumn = None,
    reference_column: ReferenceColumn = None,
    rexrank: Annotated[
        Path | None,
        typer.Option("--write-rexrank", help="Also write the reports as ReXrank's JSON.", rich_help_panel=FILES_PANEL),
    ] = None,
) -> None:
    """Write reports for a split and score them, or score a file.

    Scores are BLEU-1 to BLEU-4, ROUGE-L, METEOR (needs Java), CIDEr and the agreement of clinical findings. Controls
    are scored too: the same reports shuffled between studies, the most frequent and the most typical training report.

    Example: emrrg evaluate --model runs/iu --data data/iu_xray generation.num_beams=1

    Example: emrrg evaluate --predictions theirs.csv --references ours.jsonl
    """
    if (model is None) == (predictions is None):
        run = next((word for word in overrides or [] if "=" not in word), "RUN")  # perhaps typed without --model
        raise UsageError(
            "give either --model or --predictions",
            hint=f"`emrrg evaluate --model {shlex.quote(run)}` or `emrrg evaluate --predictions FILE`.",
        )
    refuse_given(
        context, _OF_RUNS if model is None else FILE_OPTIONS, "with --predictions" if model is None else "with --model"
    )
    if rexrank is not None and rexrank.exists() and not overwrite:
        raise UsageError(f"{rexrank} exists already", hint="Give --overwrite, or another --write-rexrank.")
    if predictions is not None:
        from emrrg_cli.evaluation.predictions import Columns

        if overrides:
            raise UsageError(f"settings cannot be changed with --predictions: {overrides[0]} has no effect")
        _check_files(chexbert, merge, output, rexrank)
        columns = Columns(id_column, hypothesis_column, reference_column)
        options = _options(chexbert, bertscore, no_meteor, merge)
        _show(
            _evaluate_file(predictions, references, columns, train, output, options, overwrite, rexrank),
            str(predictions),
            as_json,
        )
        return
    assert model is not None
    from emrrg_cli.commands.options import start_processes
    from emrrg_cli.recipe.load import load_run_recipe
    from emrrg_cli.recipe.paths import check_roots_exist, require_trained
    from emrrg_cli.training.launch import inside_launcher, processes_expected

    settings = load_run_recipe(model, recipe, overrides or [], "evaluate")
    if data is not None:
        settings.data.root = str(data)
    require_trained(model)
    check_roots_exist(settings, required=False)
    _check_files(chexbert, merge, output, rexrank)
    if not inside_launcher() and start_processes(context, num_processes):
        return
    from emrrg_cli.evaluation.run import RunOptions, run_evaluation

    options = _options(chexbert, bertscore, no_meteor, merge)
    found = run_evaluation(
        settings,
        model,
        split,
        output,
        expected_processes=processes_expected(num_processes),
        options=RunOptions(overwrite, image_controls, reference_labels, train, options),
    )
    if found is None:  # not the main process
        return
    if rexrank is not None:
        _write_rexrank(Path(found["output"]) / "predictions.jsonl", rexrank)
    _show(found, f"{found['split']} split of {settings.data.root}", as_json)


def _check_files(chexbert: str | None, merge: list[Path] | None, output: Path | None, rexrank: Path | None) -> None:
    """Checks before torch is imported that the input files exist and the output can be written."""
    from emrrg_cli.files.output_paths import check_writable

    for path in merge or []:
        if not path.is_file():
            raise UsageError(f"{path}: no such file", hint="--merge takes a JSON file of scores.")
    named_as_path = chexbert is not None and (chexbert.endswith(".pth") or chexbert.startswith((".", "/", "~")))
    if chexbert is not None and named_as_path and not Path(chexbert).expanduser().exists():
        raise UsageError(f"no CheXbert checkpoint at {chexbert}", hint="--chexbert takes chexbert.pth or its folder.")
    if output is not None:
        check_writable(output)
    if rexrank is not None:
        if rexrank.is_dir():
            raise UsageError(
                f"{rexrank} is a folder", hint="--write-rexrank takes the name of a file, such as ours.json."
            )
        check_writable(rexrank.parent)


def _options(chexbert: str | None, bertscore: str | None, no_meteor: bool, merge: list[Path] | None) -> Options:
    from emrrg_cli.evaluation.assess import Options
    from emrrg_cli.evaluation.merged_scores import read_merged

    merged: dict[str, float] = {}
    for file in merge or []:
        found = read_merged(file)
        if twice := sorted(merged.keys() & found):
            raise UsageError(
                f"{file}: the score {twice[0]} is also in another --merge file", hint="Rename one of them."
            )
        merged |= found
    labelers = {}
    if chexbert is not None:
        from emrrg_cli.evaluation.chexbert import load_chexbert

        labelers["chexbert"] = load_chexbert(chexbert)
    return Options(meteor=not no_meteor, merged=merged, labelers=labelers, bertscore=bertscore)


def _evaluate_file(
    predictions: Path,
    references: Path | None,
    columns: Any,
    train: Path | None,
    output: Path | None,
    options: Options,
    overwrite: bool,
    rexrank: Path | None,
) -> dict[str, Any]:
    from dataclasses import replace

    from emrrg_cli.evaluation.file_evaluation import evaluate_file, training_reports
    from emrrg_cli.evaluation.predictions import read_predictions, write_rexrank

    read = read_predictions(predictions, references, columns)
    if train is not None:
        reports, form = training_reports(train, read)
        options = replace(options, train_reports=reports)
        read = replace(read, remarks=[*read.remarks, form])
    result = evaluate_file(read, output, options, overwrite=overwrite)
    if rexrank is not None:
        write_rexrank(rexrank, read)
    return result


def _write_rexrank(file: Path, target: Path) -> None:
    from emrrg_cli.evaluation.predictions import read_predictions, write_rexrank

    write_rexrank(target, read_predictions(file))


def _show(result: dict[str, Any], what: str, as_json: bool) -> None:
    from emrrg_cli.console import counted, err, out, printable
    from emrrg_cli.reporting.evaluation_tables import evaluation_tables
    from emrrg_cli.reporting.tables import DISCLAIMER

    if as_json:
        out.print_json(data=result)
        err.print(DISCLAIMER)
        return
    for table in evaluation_tables(result, f"{printable(what)}, {counted(result['studies'], 'study')}", out.width):
        out.print(table)
    out.print(result["protocol_line"], markup=False, soft_wrap=True)
    style = None if result["image_matters"] else "bold red"
    out.print(result["image"], markup=False, soft_wrap=True, style=style)
    if result["studies"] == 1:
        err.print("CIDEr is 0 for one study: it weights words by how rare they are among the references.")
    if result["scores"]["METEOR"] is None:
        reason = result["left_out"].get("METEOR", "")
        java = "it needs Java (`emrrg doctor` shows details)"
        err.print(f"METEOR was skipped: {java if 'Java' in reason else reason}.", markup=False, soft_wrap=True)
    if result.get("seconds"):
        rate = f"{result['reports_per_second']:.2f} per second"
        err.print(f"Reports were written in {result['seconds']:.1f} s, {rate}.")
    if result["output"]:
        err.print(f"Scores and predictions: {result['output']}", markup=False, soft_wrap=True)
    err.print(DISCLAIMER)
