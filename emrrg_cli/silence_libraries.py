"""Turns off progress bars and advice of libraries: the commands show their own progress.

`open_dataset` turns off those of `datasets`: importing it takes seconds, and most commands do not need it.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def silence_libraries() -> None:
    """Turns them off; each command calls this once before it loads a model."""
    import transformers

    # Tokenizers that have used threads must not be forked. The DataLoader's processes are parallel already.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it logs advice about CPU kernels
    # The penalty ignores the prompt, as in the paper.
    warnings.filterwarnings("ignore", message="Passing `repetition_penalty`")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch")
    # Recipes also run on machines with few cores, and more processes than cores make sense if they wait for a disk.
    warnings.filterwarnings("ignore", message="This DataLoader will create")


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """In the block, transformers shows no progress bar while it loads weights. Downloads of the hub keep theirs."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    shown, downloads_shown = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # also those of the hub
    try:
        if downloads_shown:
            enable_progress_bars()
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
        if not downloads_shown:
            disable_progress_bars()
