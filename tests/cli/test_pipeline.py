"""The commands one after the other, as a user runs them, and the same from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from emrrg_cli.app import main


@pytest.mark.slow
def test_from_raw_images_to_reports(
    tiny_r2gen: Path,
    tiny_overrides: tuple[str, ...],
    tmp_path: Path,
    no_java: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["preprocess", "r2gen", str(tiny_r2gen), "data", "--workers", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["studies_written"] == 24

    own = [change for change in tiny_overrides if not change.startswith("data.root=")]
    lora = "model.adapter={targets: [X, dt], rank: 2, alpha: 2.0}"
    assert main(["finetune", "tiny/finetune", "data.root=data", *own, lora]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "4 (schedule ended)" in printed.err
    run = tmp_path / "runs" / "tiny-finetune"
    assert (run / "model" / "adapters" / "encoder" / "adapter_config.json").is_file()

    evaluation = ["evaluate", "--model", "runs/tiny-finetune", "data.limit=2"]
    assert main([*evaluation, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["scores"]) == {"BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "ROUGE_L", "METEOR", "CIDEr"}
    predictions = [json.loads(line) for line in (run / "evaluation/test/predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == result["studies"] == 2

    folder = tiny_r2gen / "images" / "study20"  # the first study of the test split, with one view
    assert main(["generate", str(folder), "--model", "runs/tiny-finetune", "--output", "reports", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    assert report["path"] == str(folder / "0.png")
    assert report["report"] == predictions[0]["hypothesis"]

    # The same again from Python.
    from emrrg_cli import load_generator

    assert load_generator(run).generate([folder / "0.png", [folder / "0.png"]]) == [report["report"]] * 2

    assert main(["finetune", "tiny/finetune", "data.root=data", *own, lora]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["finetune", "tiny/finetune", "data.root=data", *own, lora, "--resume"]) == 0


@pytest.mark.slow
def test_the_python_names_load_torch_at_their_first_use() -> None:
    code = """
import sys, emrrg_cli
assert "torch" not in sys.modules and "pydantic" not in sys.modules
assert {"load_generator", "score", "clean_report", "Generator"} <= set(dir(emrrg_cli))
assert emrrg_cli.clean_report("The  Heart is NORMAL.", style="r2gen-iu") == "the  heart is normal ."
scores = emrrg_cli.score(["the heart is normal ."], ["the heart is normal ."], tokenizer="whitespace", meteor=False)
assert scores["BLEU_4"] > 0.99 and scores["METEOR"] is None
assert "torch" not in sys.modules
emrrg_cli.load_generator
assert "torch" in sys.modules
try:
    emrrg_cli.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "module 'emrrg_cli' has no attribute 'nothing'\n"
