"""The CheXbert loader on random checkpoints in the published layout of keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertTokenizerFast

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.evaluation.chexbert import HEADS, load_chexbert
from emrrg_cli.labeling import OBSERVATIONS

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the lungs are clear heart is large no effusion . left right ##s".split()  # noqa: SIM905
REPORTS = ["the heart is large .", "", "lungs are clear . " * 9, "no left effusion\n right  hearts", "unknown"]


def _literal(config: BertConfig) -> tuple[BertModel, list[nn.Linear]]:
    torch.manual_seed(0)
    bert = BertModel(config).eval()
    heads = [nn.Linear(config.hidden_size, 2 if name == "No Finding" else 4) for name in HEADS]
    for parameter in [*bert.parameters(), *(p for head in heads for p in head.parameters())]:
        nn.init.normal_(parameter, std=0.3)
    return bert, heads


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, BertModel, list[nn.Linear]]:
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    bert, heads = _literal(config)
    state: dict[str, Tensor] = {f"module.bert.{key}": value for key, value in bert.state_dict().items()}
    state["module.bert.embeddings.position_ids"] = torch.arange(32)[None]  # as older versions of transformers wrote it
    for number, head in enumerate(heads):
        state |= {f"module.linear_heads.{number}.{key}": value for key, value in head.state_dict().items()}
    torch.save({"model_state_dict": state}, tmp_path / "chexbert.pth")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path / "chexbert.pth", bert, heads


def test_logits_are_those_of_a_literal_implementation(checkpoint: Any) -> None:
    file, bert, heads = checkpoint
    labeler = load_chexbert(str(file), device="cpu", batch_size=2)
    got = labeler.logits(REPORTS)
    tokenizer = BertTokenizerFast.from_pretrained(str(file.parent), do_lower_case=True)
    words = ("[CLS]", "the", "heart", "##s", ".", "[SEP]")
    assert tokenizer.encode("The hearts .") == [WORDS.index(word) for word in words]
    for row, report in enumerate(REPORTS):
        tokens = tokenizer.encode(" ".join(report.split()), truncation=True, max_length=32)
        with torch.no_grad():
            first = bert(torch.tensor([tokens])).last_hidden_state[:, 0]  # one report, no padding
            for head, logits in zip(heads, got, strict=True):
                assert torch.allclose(logits[row], head(first)[0], atol=1e-4)


def test_labels_are_the_largest_logits_in_order(checkpoint: Any) -> None:
    labeler = load_chexbert(str(checkpoint[0].parent), device="cpu", batch_size=2)
    labels = labeler(REPORTS)
    logits = labeler.logits(REPORTS)
    for row, found in enumerate(labels):
        assert set(found) == set(OBSERVATIONS)
        for name, head in zip(HEADS, logits, strict=True):
            wanted = (None, "positive", "negative", "uncertain")[int(head[row].argmax())]
            assert found[name] == wanted
    assert labeler([REPORTS[3], REPORTS[0]]) == [labels[3], labels[0]]
    assert len({tuple(found.values()) for found in labels}) > 1


def test_the_published_size_fits() -> None:
    # bert-base-uncased, without loading it: the tensors of a checkpoint decide the configuration.
    from emrrg_cli.evaluation.chexbert import _config

    shapes = {
        "bert.embeddings.word_embeddings.weight": (30522, 768),
        "bert.embeddings.position_embeddings.weight": (512, 768),
        "bert.embeddings.token_type_embeddings.weight": (2, 768),
        "bert.encoder.layer.0.intermediate.dense.weight": (3072, 768),
    }
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config, published = _config(weights, 12, Path("x")), BertConfig()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        assert getattr(config, name) == getattr(published, name)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil"),))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop("module.linear_heads.3.bias"), r"1 tensors do not fit \(linear_heads\.3\.bias\)"),
        (lambda state: state.update({"module.more": torch.ones(1)}), r"1 tensors do not fit \(more\)"),
        (lambda state: state["module.linear_heads.0.weight"].fill_(float("nan")), "damaged: linear_heads.0.weight"),
        (lambda state: state.pop("module.bert.embeddings.word_embeddings.weight"), "is not a CheXbert checkpoint"),
        (
            lambda state: state.update({"module.linear_heads.0.weight": torch.ones(3, 5)}),
            "is not a CheXbert checkpoint",
        ),
        (lambda state: state.clear(), "is not a CheXbert checkpoint"),
    ],
)
def test_other_checkpoints_are_refused(checkpoint: Any, change: Any, told: str) -> None:
    file = checkpoint[0]
    content = torch.load(file, weights_only=True)
    change(content["model_state_dict"])
    torch.save(content, file)
    with pytest.raises(RunError, match=told):
        load_chexbert(str(file), device="cpu")


def test_files_that_are_not_checkpoints_are_refused(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = checkpoint[0]
    monkeypatch.chdir(file.parent)
    torch.save({"model_state_dict": _Evil()}, file)
    with pytest.raises(RunError, match="cannot be read as a checkpoint"):
        load_chexbert(str(file), device="cpu")
    assert not (file.parent / "evil").exists()
    file.write_bytes(b"no checkpoint")
    with pytest.raises(RunError, match="cannot be read as a checkpoint"):
        load_chexbert(str(file), device="cpu")
    file.unlink()
    with pytest.raises(UsageError, match="no CheXbert checkpoint at"):
        load_chexbert(str(file), device="cpu")
    with pytest.raises(UsageError, match=r"cannot get chexbert\.pth from nobody/nothing"):
        load_chexbert("nobody/nothing", device="cpu")


def test_a_missing_tokenizer_is_explained(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoint[0].parent / "vocab.txt").unlink()
    monkeypatch.setattr("emrrg_cli.evaluation.chexbert._TOKENIZER", "nobody/nothing")
    with pytest.raises(UsageError, match="is neither next to") as caught:
        load_chexbert(str(checkpoint[0]), device="cpu")
    assert caught.value.hint is not None
    assert "vocab.txt" in caught.value.hint
