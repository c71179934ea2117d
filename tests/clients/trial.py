"""What a client tries: run in an environment of its own, it prints what came of it as JSON.

The environment names the server: `STAR_URL`, `STAR_KEY`, `STAR_MODEL`, and `STAR_DOCUMENT`, a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

URL, KEY, MODEL = (os.environ[f"STAR_{name}"] for name in ("URL", "KEY", "MODEL"))
DOCUMENT = Path(os.environ["STAR_DOCUMENT"]).read_text(encoding="utf-8")
QUESTION = "What is the secret number for torpidity-kill?"
SECOND = "What is the secret number for lyric-known?"
TOO_MANY = 70_000
"""Tokens of an answer that no context has room for."""


def parts(question: str, *, kind: str = "text", **mark: Any) -> list[dict[str, Any]]:
    """Return the document, with a mark, and a question."""
    document = {"type": kind, "text": DOCUMENT, **mark}
    return [document, {"type": kind, "text": question}]


def run(**steps: Callable[[], Any]) -> None:
    """Take steps, and print what each of them returns, or the types of its error.

    `STAR_STEPS` names those that are taken; all are without it.
    """
    results: dict[str, Any] = {}
    only = os.environ.get("STAR_STEPS", "").split()
    for name, step in steps.items():
        if only and name not in only:
            continue
        try:
            results[name] = step()
        except Exception as error:
            types = [each.__name__ for each in type(error).__mro__]
            results[name] = {"error": types, "message": str(error)[:500]}
    print(json.dumps(results))
