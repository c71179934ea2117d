"""What transformers prints while a model loads, for programs that have their own progress."""

from __future__ import annotations

from transformers.utils import logging


def quiet() -> None:
    """No progress bars over weights."""
    logging.disable_progress_bar()
