"""Reading checkpoint files: both formats of PyTorch and safetensors; what is refused, and that nothing of it runs."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.models.published.checkpoint import read_checkpoint

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.5, dtype=torch.bfloat16)}


def _same(found: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(TENSORS) and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_every_format_holds_the_same(tmp_path: Path) -> None:
    file = tmp_path / "file.pth"
    for zipped in (True, False):
        torch.save({"model": TENSORS, "epoch": 3, "step": 70}, file, _use_new_zipfile_serialization=zipped)
        checkpoint = read_checkpoint(file)
        assert _same(checkpoint.tensors)
        assert (checkpoint.container, checkpoint.kept, checkpoint.dropped) == ("model", {"epoch": 3, "step": 70}, [])
        torch.save(TENSORS, file, _use_new_zipfile_serialization=zipped)
        assert _same(read_checkpoint(file).tensors)
        assert read_checkpoint(file).container is None
    save_file(TENSORS, file)  # known by its content, not its name
    assert _same(read_checkpoint(file).tensors)
    torch.save({"state_dict": collections.OrderedDict(TENSORS), "epoch": True}, file)
    checkpoint = read_checkpoint(file)
    assert _same(checkpoint.tensors)
    assert (checkpoint.container, checkpoint.kept, checkpoint.dropped) == ("state_dict", {}, ["epoch"])
    torch.save({"model": {name: torch.nn.Parameter(tensor) for name, tensor in TENSORS.items()}}, file)
    assert _same(read_checkpoint(file).tensors)


class AttributeDict(dict[str, Any]):
    """As Lightning's: a dictionary, filled item by item when it is unpickled."""


def _named(cls: type, module: str, name: str | None = None) -> type:
    # Pickled under the name of a class that is not installed here.
    cls.__module__, cls.__qualname__ = module, name or cls.__name__
    return cls


@pytest.mark.parametrize("zipped", [True, False])
def test_training_settings_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    import types

    for path in ("lightning_fabric", "lightning_fabric.utilities", "lightning_fabric.utilities.data"):
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    module = sys.modules["lightning_fabric.utilities.data"]
    module.AttributeDict = _named(AttributeDict, module.__name__)  # type: ignore[attr-defined]
    settings = AttributeDict(lr=1e-4, where=Path("/x"), sub=argparse.Namespace(y=[1, (2, None)]))
    settings.note = "kept in __dict__"  # type: ignore[attr-defined]
    file = tmp_path / "file.pth"
    content = {
        "model": TENSORS,
        "config": settings,
        "args": argparse.Namespace(a=argparse.Namespace(b=2)),
        "best": np.float64(0.5),
        "when": datetime.datetime.now(datetime.UTC),
        "counts": collections.defaultdict(list, {"x": [1]}),
        "epoch": np.int64(3),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}},
        "scaler": {"scale": 65536.0},
    }
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, module.__name__)
    checkpoint = read_checkpoint(file)
    assert _same(checkpoint.tensors)
    assert set(checkpoint.dropped) == set(content) - {"model"}


# -- what would run ----------------------------------------------------------------------------------------------


class _Calls:
    """Pickled as a call: of `function` on `arguments`, when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _attacks(witness: Path) -> dict[str, Any]:
    touch = f"touch {witness}"
    code = f"open({str(witness)!r}, 'w').close()"
    return {
        "posix.system": _Calls(os.system, touch),
        "builtins.exec": _Calls(exec, code),
        "builtins.eval": _Calls(eval, code),
        "Popen": _Calls(subprocess.Popen, ["touch", str(witness)]),
        "builtins.getattr": _Calls(getattr, argparse.Namespace, "__init__"),
        "builtins.open": _Calls(open, str(witness), "w"),
    }


@pytest.mark.parametrize(
    "attack",
    ["posix.system", "builtins.exec", "builtins.eval", "Popen", "builtins.getattr", "builtins.open"],
)
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle 2", "pickle 4", "beside", "inside settings"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, attack: str, how: str) -> None:
    witness, file = tmp_path / "witness", tmp_path / "evil.pth"
    payload = _attacks(witness)[attack]
    if how in ("zip", "legacy"):
        torch.save({"model": {"a": payload}}, file, _use_new_zipfile_serialization=how == "zip")
    elif how == "beside":
        torch.save({"model": TENSORS, "args": payload}, file)
    elif how == "inside settings":
        torch.save({"model": TENSORS, "args": argparse.Namespace(deep=[{"x": payload}])}, file)
    else:
        file.write_bytes(pickle.dumps({"model": payload}, protocol=int(how[-1])))
    with pytest.raises(
        RunError, match=r"evil\.pth: refused, and nothing in it was run: reading it would call"
    ) as refused:
        read_checkpoint(file)
    assert attack.removeprefix("builtins.") in refused.value.message
    assert not witness.exists()


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """Plain unpickling runs them, or the tests above would show nothing."""
    for name, payload in _attacks(tmp_path / "witness").items():
        if name in ("posix.system", "builtins.exec", "builtins.eval", "builtins.open"):
            pickle.loads(pickle.dumps(payload))
            assert (tmp_path / "witness").exists()
            (tmp_path / "witness").unlink()


def test_a_stand_in_has_no_methods_for_a_pickle(tmp_path: Path) -> None:
    """Settings are made of what they were, and nothing is kept or called, however they are put together."""

    class Sly:
        def __reduce__(self) -> Any:
            return argparse.Namespace, (), {"__class__": "x", "__setstate__": print, "__reduce__": 1}

    file = tmp_path / "sly.pth"
    torch.save({"model": TENSORS, "args": {"x": argparse.Namespace(), "y": Path("/")}}, file)
    assert read_checkpoint(file).dropped == ["args"]
    torch.save({"model": TENSORS, "args": Sly()}, file)
    with pytest.raises(RunError, match="print"):
        read_checkpoint(file)


def test_a_whole_model_as_an_object_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(RunError, match=r"refused.*torch\.nn\.modules\.linear\.Linear"):
        read_checkpoint(tmp_path / "whole.pth")


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(RunError, match="TorchScript program"):
        read_checkpoint(tmp_path / "script.pt")


# -- what is no checkpoint ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_cut_anywhere_is_one_message(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "cut.pth"
    tensors = {"a": torch.randn(64, 64), "b": torch.randn(64, 64)}
    if kind == "safetensors":
        save_file(tensors, file)
    else:
        torch.save({"model": tensors}, file, _use_new_zipfile_serialization=kind == "zip")
    whole = file.read_bytes()
    for size in (1, 7, 100, 500, len(whole) // 2, len(whole) - 40, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(RunError, match=r"cut\.pth: (this|not)") as refused:
            read_checkpoint(file)
        assert "\n" not in refused.value.message
        assert len(refused.value.message) < 400


def test_damaged_bytes_are_one_message(tmp_path: Path) -> None:
    file = tmp_path / "damaged.pth"
    torch.save({"model": TENSORS}, file)
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, b"\x80\x02" + b"\x00" * 50 if name.endswith("data.pkl") else data)
    with pytest.raises(RunError, match="damaged or cut off"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "this file is empty"),
        (b"<!doctype html><html>not found</html>", "neither a PyTorch checkpoint nor a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (b"PK\x03\x04 and nothing", "damaged or cut off: its end is missing"),
        (pickle.dumps([1, 2], protocol=2), "damaged or cut off"),
        (pickle.dumps({"a": 1}, protocol=4), "neither a PyTorch checkpoint"),
    ],
)
def test_other_files_are_refused_with_their_kind(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(RunError, match=told):
        read_checkpoint(tmp_path / "file.pth")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (torch.zeros(3), "contains a Tensor, not the tensors of a model by name"),
        ({"model": {"a": 3}}, "a is a int, not a tensor"),
        ({"net": TENSORS, "epoch": 3}, "net is a dict, not a tensor"),
        ({"model": {"a": torch.eye(3).to_sparse()}}, "a is sparse or quantised"),
    ],
)
def test_other_contents_are_refused_with_their_kind(tmp_path: Path, content: Any, told: str) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(RunError, match=told):
        read_checkpoint(tmp_path / "file.pth")


def test_no_file() -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_checkpoint(Path("nowhere.pth"))


def test_a_changed_byte_in_a_tensor_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "file.pth"
    torch.save({"model": {"a": torch.full((1000,), 1.5)}}, file)
    content = bytearray(file.read_bytes())
    at = content.index(torch.full((100,), 1.5).numpy().tobytes()) + 200
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"damaged or cut off: .*data/0 in it is not what was written"):
        read_checkpoint(file)


def test_a_model_in_several_files_is_read_by_its_index(tmp_path: Path) -> None:
    parts = {f"model-0000{i}-of-00002.safetensors": name for i, name in enumerate(TENSORS, start=1)}
    for part, name in parts.items():
        save_file({name: TENSORS[name]}, tmp_path / part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: part for part, name in parts.items()}}))
    assert _same(read_checkpoint(index).tensors)
    with pytest.raises(UsageError, match="is one of several files of a model") as caught:
        read_checkpoint(tmp_path / "model-00001-of-00002.safetensors")
    assert caught.value.hint == "Name their index, model.safetensors.index.json."
    for content in ("{", "[]", '{"weight_map": {"a": "../a.safetensors"}}'):
        index.write_text(content)
        with pytest.raises(RunError, match="this index of a model in several files cannot be read"):
            read_checkpoint(index)
    index.write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(RunError, match=r"gone\.safetensors: not a readable safetensors file: No such file"):
        read_checkpoint(index)
