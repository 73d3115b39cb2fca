"""What other libraries print while one of our commands runs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import huggingface_hub.utils
from transformers.utils import logging


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without bars of loaded weights and data sets, load reports, and warnings that only we could act on.

    Bars of downloads stay, on a terminal. Errors stay. The settings of the process are restored at the end.
    """
    verbosity = logging.get_verbosity()
    weights, data = logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    downloads = not huggingface_hub.utils.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # which turns off those of downloads, too
    datasets.disable_progress_bars()
    if downloads and sys.stderr.isatty():
        huggingface_hub.utils.enable_progress_bars()
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 for a name it has renamed.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if weights:
            logging.enable_progress_bar()
        if data:
            datasets.enable_progress_bars()
        if downloads:
            huggingface_hub.utils.enable_progress_bars()
