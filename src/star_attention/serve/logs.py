"""What a server logs: lines or JSON objects, failures by their place, and no user's text."""

from __future__ import annotations

import json
import logging
import traceback
from datetime import UTC, datetime

from star_attention.errors import StarAttentionError

_log = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """Writes a record as a JSON object on one line, that of a request with its fields."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry = {"time": at, "level": record.levelname.lower()}
        request = getattr(record, "request", None)
        if request is None:
            return json.dumps(entry | {"message": record.getMessage()})
        return json.dumps(entry | {"message": "request"} | request)


def log_failure(subject: str, error: BaseException) -> None:
    """Log where an exception was raised, without its message, which may quote a prompt.

    Of one that the library raises on purpose, its name says enough.
    """
    if isinstance(error, StarAttentionError):
        _log.error("%s failed with %s", subject, type(error).__name__)
        return
    frames = "".join(traceback.format_tb(error.__traceback__))
    _log.error("%s failed with %s\n%s", subject, type(error).__name__, frames)
