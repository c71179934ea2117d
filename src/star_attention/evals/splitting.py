"""Splitting a whole prompt of lm-evaluation-harness into context (phase 1) and query (phase 2).

The first of these that applies decides where the query begins:

1. "column": after the last occurrence of the document's own context, a column of the data set.
2. "sentinel": where the task has written `SENTINEL` into its prompt, which is removed.
3. "pattern": where the question of a known task begins (`PATTERNS`).
4. "last block": the query is not marked. The caller takes the last block as the query.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

COLUMN = "context"
"""The column that usually holds a document's context."""

SENTINEL = "<|star-attention-query|>"
"""Text that a task writes into its prompt where the query begins."""

LAST_BLOCK = "last block"

PATTERNS = (
    ("niah_", r"What (?:is|are all) the special magic"),
    ("ruler_vt", r"Question: Find all variables"),
    ("ruler_cwe", r"Question: What are the 10 most common"),
    ("ruler_fwe", r"Question: Do not provide any explanation"),
    ("ruler_qa", r"Answer the question based on the given documents"),
    ("babilong_", r"{question}"),
)
"""Prefixes of the harness's own task names, and regular expressions for where their query begins.

The last match counts. `{question}` stands for the document's.
"""

_NEVER = "(?!)"


@dataclass(frozen=True, kw_only=True)
class Split:
    """A prompt in two parts.

    Attributes:
        context: Text for phase 1; the whole prompt for "last block".
        query: Text for phase 2; "" for "last block".
        how: "column", "sentinel", "pattern" or "last block".
    """

    context: str
    query: str
    how: str


def split(
    prompt: str, doc: Any, task: str, *, context_column: str = COLUMN, sentinel: str = SENTINEL
) -> Split:
    """Split a prompt where its query begins.

    Args:
        prompt: The whole prompt.
        doc: The row of the data set that it was made from.
        task: Name of the task.
        context_column: The column with the document's context.
        sentinel: Text in whose place the query begins; "" for none.
    """
    parts = prompt.split(sentinel) if sentinel else [prompt]
    prompt = "".join(parts)
    columns: Mapping[str, Any] = doc if isinstance(doc, Mapping) else {}
    candidates = [("column", end) for end in _after_context(prompt, columns.get(context_column))]
    if len(parts) > 1:
        candidates.append(("sentinel", len(prompt) - len(parts[-1])))
    question = str(columns.get("question", "")).strip()
    candidates += [("pattern", start) for start in _pattern_starts(prompt, task, question)]
    for how, position in candidates:
        if position > 0:
            return Split(context=prompt[:position], query=prompt[position:], how=how)
    return Split(context=prompt, query="", how=LAST_BLOCK)


def _after_context(prompt: str, context: Any) -> Iterator[int]:
    """Return where the context ends in the prompt; a template may have stripped it."""
    if isinstance(context, str):
        for text in (context, context.strip()):
            start = prompt.rfind(text) if text else -1
            if start >= 0:
                yield start + len(text)


def _pattern_starts(prompt: str, task: str, question: str) -> Iterator[int]:
    """Return where the question of a known task begins."""
    for prefix, pattern in PATTERNS:
        if task.startswith(prefix):
            matches = [
                *re.finditer(pattern.replace("{question}", re.escape(question) or _NEVER), prompt)
            ]
            if matches:
                yield matches[-1].start()
