"""The sections of a report as Markdown, and as an HTML page that needs no other file."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape

from star_attention.evals.reports.sections import Section
from star_attention.evals.reports.tables import Table
from star_attention.evals.runs.run_folder import FIGURES

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
table { display: block; overflow-x: auto }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
th { border-bottom: 2px solid #888; vertical-align: bottom }
th:first-child, td:first-child { text-align: left }
table.words th:nth-child(2), table.words td:nth-child(2) { text-align: left }
table.facts td { overflow-wrap: anywhere }
table.texts th, table.texts td { text-align: left; vertical-align: top }
table.texts td { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 10rem }
img { max-width: 100%; height: auto }
"""


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Return the report as Markdown; figures are links to the run folder."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        if section.lines:
            parts.append("\n".join(f"- {line}" for line in section.lines))
        if section.table:
            parts.append(_markdown_table(section))
        if section.legend:
            parts.append(section.legend)
        if section.figure is not None:
            parts.append(f"![{section.title}]({FIGURES}/{section.figure.name})")
    return "\n\n".join(parts) + "\n"


def _markdown_table(section: Section) -> str:
    head, *rows = section.table
    numbers = len(head) - section.text_columns
    rule = (*("---",) * section.text_columns, *("---:",) * numbers)
    special = _BREAKS_CELLS if section.has_marks else _FORMATS
    escaped = [[special.sub(r"\\\g<0>", " ".join(cell.split())) for cell in row] for row in rows]
    return "\n".join(_markdown_row(row) for row in (head, rule, *escaped))


_BREAKS_CELLS = re.compile(r"\|")
_FORMATS = re.compile(r"[|<\\`*_\[]")
"""What Markdown would not show as it is in the texts of others."""


def _markdown_row(row: Sequence[str]) -> str:
    return "| " + " | ".join(row) + " |"


def html(title: str, sections: Sequence[Section]) -> str:
    """Return the report as one page; figures are part of it."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n'
        f"<body>\n{html_body(title, sections)}\n</body>\n</html>\n"
    )


def html_body(title: str, sections: Sequence[Section]) -> str:
    """Return the report as a part of a page."""
    return "\n".join([f"<h1>{escape(title)}</h1>", *map(_html_section, sections)])


def _html_section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.lines:
        items = "".join(f"<li>{escape(line)}</li>" for line in section.lines)
        parts.append(f"<ul>{items}</ul>")
    if section.table:
        parts.append(_html_table(section.table, text_columns=section.text_columns))
    if section.legend:
        parts.append(f"<p>{escape(section.legend)}</p>")
    if section.figure is not None:
        data = base64.b64encode(section.figure.read_bytes()).decode()
        source = f"data:image/png;base64,{data}"
        parts.append(f'<p><img alt="{escape(section.title)}" src="{source}"></p>')
    return "\n".join(parts)


def _html_table(table: Table, *, text_columns: int) -> str:
    head, *rows = table
    has_head = any(head)
    classes = ["words"] * (text_columns > 1) + ["facts"] * (not has_head)
    classes += ["texts"] * (has_head and text_columns == len(head) > 2)
    attribute = f' class="{" ".join(classes)}"' if classes else ""
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head) if has_head else ""
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table{attribute}><tr>{titles}</tr>{lines}</table>"
