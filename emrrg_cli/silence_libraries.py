"""Turns off progress bars and advice of libraries: the commands show their own progress."""

from __future__ import annotations

import logging
import os
import warnings


def silence_libraries() -> None:
    """Call once in each command before a model or a data set is loaded."""
    import datasets
    import transformers

    # Tokenizers that have used threads must not be forked. The DataLoader's processes are parallel already.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it logs advice about CPU kernels
    # The penalty ignores the prompt, as in the paper.
    warnings.filterwarnings("ignore", message="Passing `repetition_penalty`")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch")
