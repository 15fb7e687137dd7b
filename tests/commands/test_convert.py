"""`emrrg convert` from the command line: what it prints, and one message for what it does not take."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emrrg_cli.app import main
from emrrg_cli.models.arm.encoder import ArmEncoder
from emrrg_cli.models.encoder_files import save_encoder


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A file with an encoder alone, in the published layout."""
    torch.manual_seed(0)
    (tmp_path / "ours").mkdir()
    save_encoder(tmp_path / "ours", ArmEncoder(16, 2, 32, 4))
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "file.pth"), "--to", "published"]) == 0
    return tmp_path / "file.pth"


def test_the_next_command_can_be_pasted(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my model; $(x)"
    assert main(["convert", str(published), str(out)]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert shlex.split(last)[-1] == f"model.encoder.weights={out}"


def test_a_round_trip(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["convert", str(published), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    first, *_, last = printed.err.splitlines()
    assert first.startswith(f"{published}: the encoder of stages 2 and 3, width 16, depth 2, state 4, 32 px: ")
    assert first.endswith("0 left out, 0 initialised (--verbose names them)")
    assert last == f"Next:  emrrg finetune RECIPE model.encoder.weights={shlex.quote(str(tmp_path / 'out'))}"
    ours, again = (load_file(tmp_path / name / "encoder.safetensors") for name in ("ours", "out"))
    assert ours.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in ours.items())


def test_verbose_names_every_tensor(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["convert", str(published), str(tmp_path / "out"), "--verbose"]) == 0
    told = capsys.readouterr().err
    mixer = "layers.1.mixer"
    assert (
        f"  used      visual_encoder.{mixer}.in_proj.weight -> encoder.{mixer}.X.weight, encoder.{mixer}.Z.weight\n"
        in told
    )
    assert f"  used      visual_encoder.{mixer}.A_c_b_log -> encoder.{mixer}.A_log\n" in told
    assert told.count("  used      ") == len(torch.load(published, weights_only=True)["model"])


def test_a_refused_file_is_one_message(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> object:
            return os.system, (f"touch {tmp_path / 'witness'}",)

    torch.save({"model": {"x": Evil()}}, tmp_path / "evil.pth")
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "resnet.pth")
    (tmp_path / "cut.pth").write_bytes(published.read_bytes()[:-100])
    out = str(tmp_path / "out")
    cases = [
        (["evil.pth", out], 1, "refused, and nothing in it was run: reading it would call posix.system"),
        (["resnet.pth", out], 1, "this is a checkpoint of another network: its tensors are conv1.weight"),
        (["cut.pth", out], 1, "this checkpoint is damaged or cut off"),
        (["nowhere.pth", out], 2, "no such file"),
        (["file.pth", out, "--base", str(tmp_path / "file.pth")], 2, "--base is for stage 3"),
        (["ours", out, "--to", "published", "--llm", "x"], 2, "--llm cannot be used with --to published"),
        (["ours", out], 2, "is a directory, not a checkpoint file"),
        (["file.pth", str(tmp_path / "ours")], 2, "already exists and is not empty"),
    ]
    for (name, *rest), code, told in cases:
        capsys.readouterr()
        assert main(["convert", str(tmp_path / name), *rest]) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert told in printed.err
        assert printed.err.count("\n") <= 2  # the message, and what to do
        assert not (tmp_path / "out").exists()
    assert not (tmp_path / "witness").exists()


def test_a_place_that_cannot_be_written_is_named(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    assert main(["convert", str(published), str(tmp_path / "file/out")]) == 2
    assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)  # root may write everywhere
    for arguments in ([str(published), "out"], [str(tmp_path / "ours"), "out.pth", "--to", "published"]):
        monkeypatch.chdir(tmp_path)
        assert main(["convert", *arguments]) == 1
        assert f"{tmp_path} is read-only for you" in capsys.readouterr().err
