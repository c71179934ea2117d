"""What transformers prints while a model loads, for programs that have their own progress."""

from __future__ import annotations

from transformers.utils import logging


def hide_progress_bars() -> None:
    """No progress bars over weights."""
    logging.disable_progress_bar()
