"""Labels reports with the published CheXbert checkpoint: BERT with a linear head for each observation.

The checkpoint is not part of this package. The user names a local file or a hub repository.

Source: Smit et al., "CheXbert: Combining Automatic Labelers and Expert Annotations" (EMNLP 2020).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emrrg_cli.console import progress_bar
from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.models.foreign_files import check_archive, check_model_directory
from emrrg_cli.models.weights import not_finite
from emrrg_cli.runtime import choose_device

# The heads of the checkpoint, in order.
HEADS = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices", "No Finding",
)  # fmt: skip
ANSWERS = (None, "positive", "negative", "uncertain")  # classes of a head; the last head has only the first two

_FILE = "chexbert.pth"
_TOKENIZER = "bert-base-uncased"
_MAX_TOKENS = 512
_MAX_BYTES = 4 * 2**30
_MAX_LAYERS, _MAX_WIDTH, _MAX_VOCABULARY = 48, 4096, 500_000
_HINT = "Give the authors' chexbert.pth, or the name of a hub repository that contains it."


class CheXbert(nn.Module):
    """Maps tokens `[b, t]` to the logits of 14 heads, which read the last hidden state of the first token."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import BertModel

        self.bert = BertModel(config)
        self.linear_heads = nn.ModuleList(
            nn.Linear(config.hidden_size, len(ANSWERS) if name != "No Finding" else 2) for name in HEADS
        )

    def forward(self, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        """Returns the logits of each head: `[b, 4]`, for the last head `[b, 2]`. `mask` `[b, t]` is 0 for padding."""
        first = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state[:, 0]  # [b, d]
        return [head(first) for head in self.linear_heads]


class CheXbertLabeler:
    """Labels reports: `labeler(reports)` returns a dictionary of 14 observations for each report."""

    def __init__(self, model: CheXbert, tokenizer: Any, device: torch.device, batch_size: int = 32) -> None:
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.device = device
        self.batch_size = batch_size

    def __call__(self, reports: Sequence[str]) -> list[dict[str, str | None]]:
        distinct = sorted(dict.fromkeys(reports), key=len)  # reports of similar length share a batch
        answers: dict[str, dict[str, str | None]] = {}
        with progress_bar("CheXbert", len(distinct)) as advance:
            for start in range(0, len(distinct), self.batch_size):
                batch = distinct[start : start + self.batch_size]
                chosen = torch.stack([logits.argmax(dim=1) for logits in self.logits(batch)], dim=1).tolist()
                for report, row in zip(batch, chosen, strict=True):
                    answers[report] = {name: ANSWERS[answer] for name, answer in zip(HEADS, row, strict=True)}
                advance(len(batch))
        return [answers[report] for report in reports]

    @torch.no_grad()
    def logits(self, reports: Sequence[str]) -> list[Tensor]:
        """Returns the logits of each head for one batch of reports."""
        texts = [" ".join(report.split()) for report in reports]
        tokens = self.tokenizer(texts, truncation=True, max_length=self._limit(), padding=True, return_tensors="pt")
        return self.model(tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device))  # type: ignore[no-any-return]

    def _limit(self) -> int:
        return int(min(_MAX_TOKENS, self.model.bert.config.max_position_embeddings))


def load_chexbert(source: str, *, device: str = "auto", batch_size: int = 32) -> CheXbertLabeler:
    """Loads a labeler from a checkpoint.

    Args:
        source: `chexbert.pth`, or a directory or hub repository that contains it. A tokenizer in the same directory
            (`vocab.txt` or `tokenizer.json`) is used if there is one; otherwise that of bert-base-uncased.
        device: Device name, or `auto`.
        batch_size: Number of reports per forward pass.

    Raises:
        UsageError: The file, the repository or the tokenizer does not exist.
        RunError: The file is damaged, or is not a CheXbert checkpoint.
    """
    file = _find(source)
    weights = _read(file)
    layers = 1 + max((int(found[1]) for key in weights if (found := _LAYER.match(key))), default=-1)
    model = CheXbert(_config(weights, layers, file))
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # shapes
        reason = str(error).strip().splitlines()[-1].strip()[:200]
        raise RunError(f"{file} is not a CheXbert checkpoint: {reason}", hint=_HINT) from error
    missing = [key for key in missing if not key.startswith("bert.pooler.")]  # CheXbert does not use it
    if missing or unexpected:
        named = ", ".join([*missing, *unexpected][:3])
        raise RunError(
            f"{file} is not a CheXbert checkpoint: {len(missing + unexpected)} tensors do not fit ({named})", hint=_HINT
        )
    return CheXbertLabeler(model, _tokenizer(file), choose_device(device), batch_size)


_LAYER = re.compile(r"bert\.encoder\.layer\.(\d{1,3})\.")


def _find(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / _FILE
    if path.is_file():
        return path
    if path.suffix == ".pth" or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UsageError(f"no CheXbert checkpoint at {path}", hint=_HINT)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, _FILE))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"cannot get {_FILE} from {source}: {reason}", hint=_HINT) from error


def _read(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint under their names in `CheXbert`, without running code from the file."""
    if file.stat().st_size > _MAX_BYTES:
        raise RunError(f"{file} is larger than {_MAX_BYTES >> 30} GB, so it is not a CheXbert checkpoint")
    try:
        check_archive(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle can raise any error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"{file} cannot be read as a checkpoint: {reason[:200]}", hint=_HINT) from error
    state = content.get("model_state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise RunError(f"{file} is not a CheXbert checkpoint: it does not contain a dictionary of tensors", hint=_HINT)
    weights = {str(key).removeprefix("module."): value.float() for key, value in state.items()}
    weights = {key: value for key, value in weights.items() if not key.endswith("position_ids")}
    if (broken := not_finite(weights)) is not None:
        raise RunError(f"{file} is damaged: {broken} contains NaN or infinity")
    return weights


def _config(weights: Mapping[str, Tensor], layers: int, file: Path) -> Any:
    from transformers import BertConfig

    try:
        vocabulary, width = weights["bert.embeddings.word_embeddings.weight"].shape
        positions = len(weights["bert.embeddings.position_embeddings.weight"])
        kinds = len(weights["bert.embeddings.token_type_embeddings.weight"])
        inner = len(weights["bert.encoder.layer.0.intermediate.dense.weight"])
    except (KeyError, ValueError) as error:
        raise RunError(f"{file} is not a CheXbert checkpoint: {error} is missing", hint=_HINT) from error
    if layers > _MAX_LAYERS or max(width, inner // 4) > _MAX_WIDTH or vocabulary > _MAX_VOCABULARY:
        size = f"{layers} layers, width {width}, {vocabulary} words"
        raise RunError(f"{file} is not a CheXbert checkpoint: its size is wrong ({size})")
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=kinds,
    )


def _tokenizer(file: Path) -> Any:
    from transformers import AutoTokenizer, BertTokenizerFast

    beside = [file.parent / name for name in ("tokenizer.json", "vocab.txt") if (file.parent / name).is_file()]
    try:
        if beside:
            check_model_directory(file.parent)
            if beside[0].name == "tokenizer.json":
                return BertTokenizerFast(tokenizer_file=str(beside[0]))
            return BertTokenizerFast.from_pretrained(str(file.parent), do_lower_case=True)
    except Exception as error:  # a broken file can raise any error
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RunError(f"{file.parent}: cannot read the tokenizer next to {file.name}: {first}") from error
    try:
        return AutoTokenizer.from_pretrained(_TOKENIZER, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the tokenizer {_TOKENIZER} is neither next to {file} nor in the hub's cache",
            hint=f"Put the vocab.txt of {_TOKENIZER} into {file.parent}.",
        ) from error
