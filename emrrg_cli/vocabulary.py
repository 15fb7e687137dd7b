"""Words that several parts of the program share, each defined here alone.

Recipes, commands and files use the names of LoRA's targets, scan engines, scores, splits, sections and cleaning rules.
"""

from __future__ import annotations

from typing import Literal, get_args

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

# As sources write them.
SPLIT_NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}

Projection = Literal["frontal", "lateral", "oblique", "unknown"]
# Views that a model can distinguish; what is neither frontal nor lateral is unknown to it.
VIEW_TOKENS: tuple[Projection, ...] = ("unknown", "frontal", "lateral")
# As datasets write a view that is lateral, and one that is not known.
LATERAL_VIEW = "LATERAL"
UNKNOWN_VIEW = "unknown"
# Projections that can be asked for alone.
WantedView = Literal["frontal", "lateral"]

# As a dataset directory stores images.
ImageFormat = Literal["jpeg", "png"]

# Which text of a study is its report; `report` follows the rule of the data set.
Section = Literal["report", "findings", "impression", "both"]
SECTIONS: tuple[Section, ...] = get_args(Section)

# Clinical context that is known before a film is read.
ContextField = Literal["indication", "comparison", "technique", "age", "sex"]
CONTEXT_FIELDS: tuple[ContextField, ...] = get_args(ContextField)

# R2Gen's rules, and `none`: the text as it is. `auto` stands for the rule that R2Gen used for the data set's source.
CleaningRule = Literal["r2gen-iu", "r2gen-mimic", "none"]
Cleaning = Literal["auto", CleaningRule]
CLEANING_RULES: tuple[CleaningRule, ...] = get_args(CleaningRule)

EngineName = Literal["reference", "recompute", "numba", "triton", "mamba_ssm"]
ScanEngine = Literal["auto", EngineName]
SCAN_ENGINES: tuple[EngineName, ...] = get_args(EngineName)

# Projections of the encoder that get LoRA, and `llm`, which stands for those of the LLM.
AdapterTarget = Literal[
    "X", "Z", "dt", "B", "C", "in_proj", "x_proj", "dt_proj", "out_proj", "patch_embed", "mlp", "llm"
]
ADAPTER_TARGETS: tuple[AdapterTarget, ...] = get_args(AdapterTarget)

# How text is split into words before it is scored.
Tokenizer = Literal["whitespace", "ptb"]

# Language scores, as results name them: those of a single report, and METEOR, which Java computes.
BLEU_NAMES = ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4")
ROUGE_L = "ROUGE_L"
CIDER = "CIDEr"
METEOR = "METEOR"
# Agreement of findings by the rules labeler, micro F1.
F1_RULES = "F1_rules"
# Names for display, if they differ.
SCORE_LABELS = {name: name.replace("_", "-") for name in (*BLEU_NAMES, ROUGE_L)}
# Scores that may reward a sampled report or select the best model.
ROUGE_1 = "ROUGE_1"  # recall: the share of the reference's words that the report has
WORD_RECALL = "word_recall"  # recall of different words: a second "there is" adds nothing
FINDINGS = "findings"  # correct findings, minus a small part for each one; see `scoring.reward`
REWARDS = (*BLEU_NAMES, ROUGE_1, WORD_RECALL, ROUGE_L, CIDER, F1_RULES, FINDINGS)
AGREEMENTS = (*BLEU_NAMES, ROUGE_1, WORD_RECALL, F1_RULES, FINDINGS)  # between sampled reports
SELECTION_SCORES = (*BLEU_NAMES, ROUGE_L, METEOR, CIDER, F1_RULES)

# Places of the visual tokens and the context in a prompt, and the published prompt (EMRRG, arXiv 2510.16776).
IMAGE_PLACE = "<ImageHere>"
CONTEXT_PLACE = "<ContextHere>"
PUBLISHED_PROMPT = (
    f"Human: <Img>{IMAGE_PLACE}</Img> "
    "Generate a comprehensive and detailed diagnosis report for this chest xray image. \nAssistant:"
)

# Mean and standard deviation of the colours of ImageNet, for values from 0 to 1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
