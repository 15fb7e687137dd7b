"""Keeps the libraries' own bars and advice off the terminal: the commands show their own progress."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Called once by each command before it loads a model or a data set."""
    import datasets
    import transformers

    # Tokenizers fork badly once they have used threads; the DataLoader's processes are the parallelism here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it; it advises on kernels for each CPU
    # The penalty cannot see the image; that it leaves the prompt out is how the paper's decoding works too.
    warnings.filterwarnings("ignore", message="Passing `repetition_penalty`")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch")
