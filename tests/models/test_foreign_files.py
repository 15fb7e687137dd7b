"""Model directories and checkpoints of other people: nothing waits, nothing grows, nothing outside is read."""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from emrrg_cli.errors import EmrrgError
from emrrg_cli.evaluation.chexbert import load_chexbert
from emrrg_cli.models.foreign_files import check_archive
from emrrg_cli.models.llm import build_scratch_llm, load_llm, load_tokenizer, train_tokenizer
from emrrg_cli.models.published.checkpoint import read_checkpoint
from emrrg_cli.models.published.run import _llm_here
from emrrg_cli.models.text_encoder import load_text_encoder, load_text_tokenizer
from emrrg_cli.planning.llms import llm_config
from emrrg_cli.recipe.finetuning import LLMSettings, ModelSettings, ScratchLLMSettings

pytestmark = pytest.mark.skipif(os.name != "posix", reason="special files")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small causal LM with its tokenizer. Not to be changed."""
    directory = tmp_path_factory.mktemp("llm")
    tokenizer = train_tokenizer(["the heart is enlarged ."], 300)
    settings = ScratchLLMSettings(hidden_size=32, layers=2, heads=2, kv_heads=1, vocab_size=300)
    tokenizer.save_pretrained(directory)
    build_scratch_llm(settings, tokenizer).save_pretrained(directory)
    return directory


_READERS: dict[str, Callable[[str], Any]] = {
    "tokenizer": load_tokenizer,
    "LLM": lambda name: load_llm(name, None, torch.float32),
    "text tokenizer": load_text_tokenizer,
    "text encoder": lambda name: load_text_encoder(name, None, 8),
    "plan": lambda name: llm_config(ModelSettings(llm=LLMSettings(name=name))),
    "convert": _llm_here,
}


def _link_to_a_device(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/dev/zero")
    return "tokenizer.json is not a regular file"


def _pipe(folder: Path) -> str:
    os.mkfifo(folder / "special_tokens_map.json")
    return "special_tokens_map.json is not a regular file"


def _large_text(folder: Path) -> str:
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)  # takes no space on the disk
    return "tokenizer.json is larger than 256 MB"


def _large_header(folder: Path) -> str:
    (folder / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{")
    return "its header claims 1,099,511,627,776 bytes"


def _deep(folder: Path) -> str:
    (folder / "config.json").write_text("[" * 200_000)
    return "config.json is nested too deeply"


def _many_layers(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    return "num_hidden_layers is 1,000,000,000, more than 2,000"


def _code_of_the_hub(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_attn_implementation": "somebody/kernel"}))
    return "_attn_implementation names code to download"


def _index_leads_out(folder: Path) -> str:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "/dev/zero"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "model.safetensors.index.json names files outside its directory"


def _adapters(folder: Path) -> str:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": "(a+)+$"}))
    return "it contains adapters of PEFT, not a complete model"


def _compressed(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    _deflated({"lm_head.weight": torch.zeros(2**20)}, folder / "pytorch_model.bin")
    return "data.pkl in it is compressed"


def _deflated(content: Any, file: Path) -> None:
    """As `torch.save`, but compressed."""
    plain = file.with_suffix(".plain")
    torch.save(content, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    plain.unlink()


_DAMAGE = (_link_to_a_device, _pipe, _large_text, _large_header, _deep, _many_layers, _code_of_the_hub,
           _index_leads_out, _adapters, _compressed)  # fmt: skip


@pytest.mark.parametrize("damage", _DAMAGE, ids=lambda damage: damage.__name__.strip("_"))
@pytest.mark.parametrize("reader", _READERS)
def test_a_hostile_model_directory_is_refused(
    llm: Path, tmp_path: Path, reader: str, damage: Callable[[Path], str]
) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(llm, folder)
    message = damage(folder)
    with pytest.raises(EmrrgError) as caught:
        _READERS[reader](str(folder))
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_links_to_regular_files_are_read(llm: Path, tmp_path: Path) -> None:
    for file in llm.iterdir():  # as in the cache of the hub
        (tmp_path / file.name).symlink_to(file)
    assert len(load_tokenizer(str(tmp_path))) == len(load_tokenizer(str(llm)))
    assert load_llm(str(tmp_path), None, torch.float32).config.num_hidden_layers == 2


@pytest.mark.parametrize("read", [read_checkpoint, load_chexbert])
def test_a_compressed_checkpoint_is_refused(tmp_path: Path, read: Callable[..., Any]) -> None:
    file = tmp_path / "chexbert.pth"
    _deflated({"model": {"x": torch.zeros(2**24)}}, file)
    assert file.stat().st_size < 2**17  # of 64 MB
    with pytest.raises(EmrrgError, match="is compressed, which"):
        read(file) if read is read_checkpoint else read(str(file))


def test_what_torch_saves_is_accepted(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({"x": torch.zeros(3)}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        check_archive(tmp_path / "x.pth")


def test_a_damaged_list_of_members_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    torch.save({"model": {f"x{number}": torch.zeros(3) for number in range(8)}}, file)
    whole = file.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[draw.randrange(len(whole) - 1200, len(whole))] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            read_checkpoint(file)
        except EmrrgError:
            refused += 1
    assert refused > 100
