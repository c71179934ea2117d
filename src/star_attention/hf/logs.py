"""Progress bars of transformers, for programs that print their own progress."""

from __future__ import annotations

from transformers.utils import logging


def hide_progress_bars() -> None:
    """Hide the progress bars that transformers prints while it loads weights."""
    logging.disable_progress_bar()
