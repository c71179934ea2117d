"""HTML of results for notebooks, which call `_repr_html_`. Texts of users are escaped."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


def table(title: str, rows: Mapping[str, object], after: str = "") -> str:
    """Return a table of two columns under a title, and `after`, which is HTML already."""
    lines = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th>"
        f"<td style='text-align:left'>{escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<div><b>{escape(title)}</b><table>{lines}</table>{after}</div>"


def preformatted(text: str) -> str:
    """Return a text whose spaces and line breaks are kept, in letters of equal width."""
    return f"<pre style='line-height:1.2'>{escape(text)}</pre>"


def prose(text: str) -> str:
    """Return a text whose line breaks are kept."""
    return f"<div style='white-space:pre-wrap'>{escape(text)}</div>"


def folded(title: str, text: str) -> str:
    """Return a text that is shown when its title is clicked."""
    return f"<details><summary>{escape(title)}</summary>{prose(text)}</details>"


def note(text: str) -> str:
    """Return a small line below something else."""
    return f"<div><small>{escape(text)}</small></div>"
