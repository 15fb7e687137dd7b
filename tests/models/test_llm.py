"""The language model: tokenizer, the small Llama, loading, and how a run recognises its LLM."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.models import llm as llm_module
from emrrg_cli.models.llm import (
    build_scratch_llm,
    llm_record,
    load_llm,
    load_tokenizer,
    train_tokenizer,
)
from emrrg_cli.models.text_encoder import load_text_encoder, load_text_tokenizer
from emrrg_cli.planning.llms import llm_config
from emrrg_cli.recipe.finetuning import LLMSettings, ModelSettings, ScratchLLMSettings
from emrrg_cli.vocabulary import PUBLISHED_PROMPT

MakeLLM = Callable[..., Any]


@pytest.fixture
def llm_dir(make_llm: MakeLLM, tokenizer: Any, tmp_path: Path) -> Path:
    """A tiny LLM in a directory, as people keep one."""
    directory = tmp_path / "llm"
    make_llm().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_the_prompt_is_the_published_one() -> None:
    assert (
        ModelSettings().prompt
        == PUBLISHED_PROMPT
        == (
            "Human: <Img><ImageHere></Img> Generate a comprehensive and detailed diagnosis report "
            "for this chest xray image. \nAssistant:"
        )
    )


@pytest.mark.parametrize(
    "text",
    [
        "the lungs are clear . heart size is normal .",
        " .",
        "size : 3 x 4 cm ,  two  spaces\nand a line",
        "unseen words: zygapophyseal, 37°C, façade, 肺",
        "Human: <Img></Img>",
    ],
)
def test_no_text_is_out_of_the_vocabulary(text: str, tokenizer: Any) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokens) == text
    assert max(tokens) < len(tokenizer)
    assert not set(tokens) & set(tokenizer.all_special_ids)


def test_special_tokens_and_size(texts: list[str]) -> None:
    tokenizer = train_tokenizer(texts, 300)
    assert len(tokenizer) == 300
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    larger = train_tokenizer(texts, 340)
    assert len(larger.encode(texts[0])) < len(tokenizer.encode(texts[0]))
    assert train_tokenizer(texts, 340).encode(texts[1]) == larger.encode(texts[1])


def test_a_saved_tokenizer_reads_the_same(tokenizer: Any, texts: list[str], tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    read = load_tokenizer(str(tmp_path))
    for text in [*texts, *PUBLISHED_PROMPT.split("<ImageHere>"), "37°C </s> x"]:
        assert read.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    assert (read.pad_token_id, read.bos_token_id, read.eos_token_id) == (0, 1, 2)
    tokens = tokenizer.encode(" . a . ", add_special_tokens=False)
    assert read.decode([1, *tokens, 2, 0], skip_special_tokens=True) == tokenizer.decode(tokens) == " . a . "


def test_a_tokenizer_without_an_end_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(RunError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path))


def test_the_scratch_llm_is_as_the_recipe_says(tokenizer: Any) -> None:
    llm: Any = build_scratch_llm(ScratchLLMSettings(hidden_size=48, layers=3, heads=4, kv_heads=2), tokenizer)
    assert llm.get_input_embeddings().weight.shape == (len(tokenizer), 48)
    assert len(llm.model.layers) == 3
    attention, mlp = llm.model.layers[0].self_attn, llm.model.layers[0].mlp
    assert attention.q_proj.weight.shape == (48, 48)
    assert attention.k_proj.weight.shape == (24, 48)
    assert mlp.up_proj.weight.shape == (128, 48)
    assert llm.lm_head.weight is llm.get_input_embeddings().weight
    assert llm.config._attn_implementation == "sdpa"
    assert (llm.config.pad_token_id, llm.config.bos_token_id, llm.config.eos_token_id) == (0, 1, 2)


def test_decoding_defaults_of_the_llm_are_dropped(make_llm: MakeLLM, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    llm = make_llm()
    llm.generation_config = GenerationConfig(do_sample=True, temperature=0.3, top_p=0.5, max_length=7, num_beams=4)
    llm.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.3
    loaded: Any = load_llm(str(tmp_path), None, torch.float32)
    assert loaded.generation_config.to_diff_dict() == GenerationConfig().to_diff_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_keeps_the_weights(dtype: torch.dtype, llm_dir: Path, make_llm: MakeLLM) -> None:
    loaded, saved = load_llm(str(llm_dir), None, dtype), make_llm()
    for (name, one), (other_name, other) in zip(loaded.named_parameters(), saved.named_parameters(), strict=True):
        assert name == other_name
        assert one.dtype == dtype
        assert torch.equal(one, other.to(dtype))
    assert loaded.config._attn_implementation == "sdpa"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(RunError, match="the LLM 'nobody/nothing' is not a local directory and") as raised:
        load_llm("nobody/nothing", None, torch.float32)
    assert "model.llm.name=PATH" in str(raised.value)
    with pytest.raises(RunError, match="the tokenizer 'nobody/nothing' is not a local"):
        load_tokenizer("nobody/nothing")
    for load in (lambda name: load_llm(name, None, torch.float32), load_tokenizer):
        with pytest.raises(RunError, match="/no/such/place: no such directory"):
            load("/no/such/place")


def test_directories_without_an_llm_are_refused(llm_dir: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RunError, match=re.escape(f"{empty}: no tokenizer could be loaded from this directory")):
        load_tokenizer(str(empty))
    with pytest.raises(RunError, match=re.escape(f"{empty}: no LLM could be loaded from this directory")):
        load_llm(str(empty), None, torch.float32)
    (llm_dir / "tokenizer.json").write_text("{}")
    with pytest.raises(RunError, match="no tokenizer could be loaded"):
        load_tokenizer(str(llm_dir))
    weights = llm_dir / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (b"not weights", whole[: len(whole) // 2]):
        weights.write_bytes(broken)
        with pytest.raises(RunError, match="no LLM could be loaded"):
            load_llm(str(llm_dir), None, torch.float32)


def test_an_llm_without_some_of_its_weights_is_refused(llm_dir: Path) -> None:
    """Transformers would fill them with noise, and the reports would be noise."""
    file = llm_dir / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(RunError, match=f"this LlamaForCausalLM is incomplete: {re.escape(name)} is missing"):
        load_llm(str(llm_dir), None, torch.float32)


# -- how a run knows its LLM again ----------------------------------------------------------------------------------


def _record(directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    settings = LLMSettings(name=str(directory))
    return llm_record(settings, load_llm(str(directory), None, dtype))


def test_the_record_names_the_llm(llm_dir: Path) -> None:
    record = _record(llm_dir)
    assert record["name"] == str(llm_dir)
    assert record["revision"] is record["commit"] is None
    assert json.loads(json.dumps(record)) == record
    assert _record(llm_dir) == record


def test_precision_and_place_do_not_make_another_llm(llm_dir: Path, tmp_path: Path) -> None:
    """What was trained in bf16 on a GPU is used in fp32 on a laptop, from another directory."""
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(llm_dir, moved)
    first, second = _record(llm_dir, torch.bfloat16), _record(moved, torch.float32)
    assert first.pop("name") != second.pop("name")
    assert first == second


def test_another_configuration_is_another_llm(llm_dir: Path) -> None:
    before = _record(llm_dir)
    config = json.loads((llm_dir / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5e5
    (llm_dir / "config.json").write_text(json.dumps(config | {"transformers_version": "5.0.0"}))
    after = _record(llm_dir)
    assert after["config_sha256"] != before["config_sha256"]
    assert after["weights_fingerprint"] == before["weights_fingerprint"]


def test_other_weights_are_another_llm(llm_dir: Path, make_llm: MakeLLM) -> None:
    before = _record(llm_dir)
    make_llm(seed=1).save_pretrained(llm_dir)
    after = _record(llm_dir)
    assert after["config_sha256"] == before["config_sha256"]
    assert after["weights_fingerprint"] != before["weights_fingerprint"]


def test_the_fingerprint_covers_the_whole_file(tmp_path: Path) -> None:
    """A fine-tuned LLM may share its header, embeddings and norms, which stand at the ends of the file."""
    assert llm_module._weights_fingerprint("some/hub-name") is None
    size = 200 * llm_module._SAMPLE_BYTES
    file = tmp_path / "model.safetensors"

    def fingerprint(changed: range) -> str | None:
        data = bytearray(size)
        data[changed.start : changed.stop] = b"\1" * len(changed)
        file.write_bytes(data)
        return llm_module._weights_fingerprint(str(tmp_path))

    part = size // 8
    found = [fingerprint(range(0)), *(fingerprint(range(i * part, (i + 1) * part)) for i in range(8))]
    assert len(set(found)) == 9
    assert fingerprint(range(size - 1, size)) != found[0]
    file.write_bytes(bytes(size - 1))
    assert llm_module._weights_fingerprint(str(tmp_path)) not in found
    file.rename(tmp_path / "renamed.safetensors")
    (tmp_path / "notes.txt").write_text("anything")
    assert llm_module._weights_fingerprint(str(tmp_path)) not in found


def test_quantization_without_bitsandbytes_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="4bit needs bitsandbytes"):
        load_llm(str(tmp_path), None, torch.float32, "4bit")


def test_other_weights_in_a_torch_file_are_another_llm(llm_dir: Path, make_llm: MakeLLM) -> None:
    (llm_dir / "model.safetensors").unlink()
    file = llm_dir / "pytorch_model.bin"
    torch.save(make_llm().state_dict(), file)
    before = llm_module._weights_fingerprint(str(llm_dir))
    torch.save(make_llm(seed=1).state_dict(), file)
    assert llm_module._weights_fingerprint(str(llm_dir)) != before


# -- code that comes with a model -----------------------------------------------------------------------------------


def test_code_of_a_directory_is_never_run(
    llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where somebody would answer `y` to transformers' question, there is no question."""
    ran = tmp_path / "ran"
    (llm_dir / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoModel": "own.Own"}
    for name, update in (
        ("config.json", {"auto_map": own, "model_type": "own"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}),
    ):
        content = json.loads((llm_dir / name).read_text())
        (llm_dir / name).write_text(json.dumps(content | update))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    for load in (
        lambda: load_llm(str(llm_dir), None, torch.float32),
        lambda: load_tokenizer(str(llm_dir)),
        lambda: load_text_encoder(str(llm_dir), None, 8),
        lambda: load_text_tokenizer(str(llm_dir)),
        lambda: llm_config(ModelSettings(llm=LLMSettings(name=str(llm_dir)))),
    ):
        with contextlib.suppress(RunError):  # a tokenizer that transformers knows is read without the code
            load()
    assert not ran.exists()
    assert "[y/N]" not in "".join(capfd.readouterr())


def test_loading_shows_no_progress_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    tokenizer = train_tokenizer(["the heart is enlarged ."], 300)
    settings = ScratchLLMSettings(hidden_size=32, layers=2, heads=2, kv_heads=1, vocab_size=300)
    build_scratch_llm(settings, tokenizer).save_pretrained(tmp_path)
    capfd.readouterr()
    before = logging.is_progress_bar_enabled()
    try:
        logging.enable_progress_bar()
        load_llm(str(tmp_path), None, torch.float32)
        assert logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar() if before else logging.disable_progress_bar()
    assert capfd.readouterr().err == ""
