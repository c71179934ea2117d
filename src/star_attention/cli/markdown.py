"""Markdown for the generated pages of docs/."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 100


def paragraph(text: str, indent: str = "") -> str:
    """Join and wrap the lines of a paragraph; lines after the first are indented."""
    return textwrap.fill(
        " ".join(text.split()), WIDTH, subsequent_indent=indent, break_on_hyphens=False
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with a heading."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
