"""Measures time and memory of the parts of an evaluation, on pairs of random sentences or of a file.

python tests/benchmarks/evaluation.py --studies 3858
python tests/benchmarks/evaluation.py --predictions predictions.jsonl
python tests/benchmarks/evaluation.py --chexbert-reports 200    (BERT-base with random weights)
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emrrg_cli.evaluation import bootstrap, clinical
from emrrg_cli.evaluation.assess import Options, assess
from emrrg_cli.evaluation.controls import derangements
from emrrg_cli.evaluation.language import score
from emrrg_cli.evaluation.predictions import Predictions, read_predictions
from emrrg_cli.labeling import label_reports
from emrrg_cli.scoring.comparison import Corpus
from emrrg_cli.scoring.scores import SCORES

_PARTS = (
    ("the heart is", "heart size is", "the cardiac silhouette is"),
    ("normal .", "mildly enlarged .", "within normal limits .", "unchanged from the prior study ."),
    (
        "the lungs are clear .",
        "there is a small left pleural effusion .",
        "basilar atelectasis .",
    ),
    ("no pneumothorax .", "no pneumothorax or effusion is seen .", "there is no evidence of pneumothorax ."),
    ("bony structures are intact .", "degenerative changes of the spine .", "no acute bony abnormality ."),
    ("a right central line ends in the superior vena cava .", "no acute cardiopulmonary process .", ""),
)


def random_pairs(studies: int) -> Predictions:
    """Makes reports of about 40 words, some with unique words."""
    draw = random.Random(0)

    def report() -> str:
        parts = [draw.choice(choices) for choices in _PARTS * 2]
        parts += [f"series {draw.randrange(10**4)} image {draw.randrange(500)} ."] * (draw.random() < 0.3)
        return " ".join(filter(None, parts))

    ids = [f"s{number}" for number in range(studies)]
    return Predictions(ids, [report() for _ in ids], [report() for _ in ids])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=3858)
    parser.add_argument("--predictions", type=Path)
    parser.add_argument("--meteor", action="store_true")
    parser.add_argument("--chexbert-reports", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.chexbert_reports:
        _chexbert(arguments.chexbert_reports)
        return
    pairs = read_predictions(arguments.predictions) if arguments.predictions else random_pairs(arguments.studies)
    print(f"{len(pairs)} pairs")
    references, hypotheses = list(pairs.references), list(pairs.hypotheses)
    _timed("pycocoevalcap", lambda: score(references, hypotheses, meteor=False))
    corpus = Corpus(references)
    compared = _timed("statistics of pairs", lambda: corpus.compare(references, hypotheses))
    fast = [one for one in SCORES if not one.slow]
    statistics = [one.statistics(compared) for one in fast]
    _timed(
        "intervals, 1,000 resamples",
        lambda: [bootstrap.intervals(s, one.combine) for s, one in zip(statistics, fast, strict=True)],
    )
    orders = derangements(len(pairs))
    _timed("20 deals", lambda: [corpus.compare(references, [hypotheses[i] for i in order]) for order in orders])
    _timed("test of the image, 10,000 resamples", lambda: bootstrap.p_greater(statistics[-1][:, 0]))
    labels = _timed("rules", lambda: (label_reports(references), label_reports(hypotheses)))
    _timed("clinical figures", lambda: [clinical.present(side, "uncertain_positive") for side in labels])
    began, busy = time.perf_counter(), time.process_time()
    assess(pairs, Options(meteor=arguments.meteor, train_reports=references))
    print(f"{'all of it, as emrrg evaluate does':40}{time.perf_counter() - began:8.2f} s")
    print(f"{'  of which this process was running':40}{time.process_time() - busy:8.2f} s")
    unit = 2**30 if sys.platform == "darwin" else 2**20
    print(f"{'peak memory':40}{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:8.2f} GiB")


def _timed(name: str, work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = work()
    print(f"{name:40}{time.perf_counter() - began:8.2f} s", flush=True)
    return result


def _chexbert(reports: int) -> None:
    import torch
    from transformers import BertConfig

    from emrrg_cli.evaluation.chexbert import CheXbert, CheXbertLabeler

    class Words:
        """A tokenizer of whole words: the number of tokens is about that of BERT's."""

        def __call__(self, texts: list[str], **options: Any) -> dict[str, torch.Tensor]:
            rows = [torch.tensor([2, *(4 + hash(word) % 30000 for word in text.split()), 3]) for text in texts]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            return {"input_ids": tokens, "attention_mask": (tokens > 0).long()}

    labeler = CheXbertLabeler(CheXbert(BertConfig()), Words(), torch.device("cpu"))
    texts = list(random_pairs(reports).references)
    distinct = len(set(texts))
    began = time.perf_counter()
    labeler(texts)
    seconds = time.perf_counter() - began
    print(f"{reports} reports ({distinct} distinct) in {seconds:.1f} s on {torch.get_num_threads()} threads: "
          f"{distinct / seconds:.1f} a second; 3,000 in {3000 * seconds / distinct:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
