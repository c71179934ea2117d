"""What a server logs of its failures: where, and no user's text."""

from __future__ import annotations

import logging
import traceback

from star_attention.errors import StarAttentionError

_log = logging.getLogger(__name__)


def log_failure(subject: str, error: BaseException) -> None:
    """Log where an exception was raised, without its message, which may quote a prompt.

    Of one that the library raises on purpose, its name says enough.
    """
    if isinstance(error, StarAttentionError):
        _log.error("%s failed with %s", subject, type(error).__name__)
        return
    frames = "".join(traceback.format_tb(error.__traceback__))
    _log.error("%s failed with %s\n%s", subject, type(error).__name__, frames)
