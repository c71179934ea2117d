"""The sections of a report: titles, sentences, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from star_attention.config import DEFAULT_BLOCK_RULE
from star_attention.evals.reports.answers import MOST_QUESTIONS, answers_table, count_questions
from star_attention.evals.reports.remarks import in_short, warnings
from star_attention.evals.reports.results import Results, length_name, variant_name
from star_attention.evals.reports.tables import (
    MAX_SIDE_BY_SIDE,
    Cells,
    Table,
    accuracy_table,
    facts_table,
    speed_table,
)
from star_attention.evals.reports.wording import MARK, TOO_FEW_MARK
from star_attention.evals.runs.predictions import PREDICTIONS
from star_attention.evals.runs.run_folder import METRICS, SUMMARY
from star_attention.evals.runs.variants import parse
from star_attention.evals.stats import MIN_CONTEXTS

_FIGURE_TITLES = {
    "variants": "Accuracy of each variant",
    "blocks": "Accuracy against block size",
    "anchors": "Accuracy against anchor size",
    "depth": "Accuracy by depth and length",
}
"""Figures that are sections of their own."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of a report.

    Attributes:
        title: Its heading.
        lines: Sentences, as a list.
        table: Rows of cells, the head first.
        text_columns: Number of leading columns that hold text; the others hold numbers.
        figure: A PNG file.
        has_marks: True if marks in the table have a meaning.
    """

    title: str
    lines: tuple[str, ...] = ()
    table: Table = ()
    text_columns: int = 1
    figure: Path | None = None
    has_marks: bool = True

    @property
    def legend(self) -> str:
        """The meaning of the marks in the table; "" if it has none."""
        cells = [cell for row in self.table if self.has_marks for cell in row]
        marks = []
        if any(cell.endswith(MARK) for cell in cells):
            marks.append(f"{MARK.strip()} the interval does not contain 0")
        if any(cell.endswith(TOO_FEW_MARK) for cell in cells):
            marks.append(
                f"{TOO_FEW_MARK.strip()} no interval, as a task and length has fewer than"
                f" {MIN_CONTEXTS} contexts"
            )
        return f"Marks: {'; '.join(marks)}." if marks else ""


def title(results: Results) -> str:
    """Return the heading of the whole report."""
    names = f"{len(results.variants)} variants"
    if len(results.variants) <= MAX_SIDE_BY_SIDE:
        names = ", ".join(map(variant_name, results.variants))
    return f"{results.run['settings']['suite']}: {names}"


def sections(results: Results, figures: Mapping[str, Path], notes: Sequence[str]) -> list[Section]:
    """Return all sections of a report.

    Args:
        results: The run.
        figures: PNG files by name, as `plots.draw` returns them.
        notes: Further sentences for the first section.
    """
    short = (*in_short(results), *warnings(results), *notes)
    return [
        Section(title="In short", lines=short),
        *_accuracy_sections(results, figures),
        *(
            Section(title=title, figure=figures[name])
            for name, title in _FIGURE_TITLES.items()
            if name in figures
        ),
        Section(
            title="Speed",
            lines=("Medians on this machine; a question includes its share of the encoding.",),
            table=speed_table(results),
            figure=figures.get("speed"),
        ),
        _answers_section(results),
        *_skipped_section(results),
        Section(
            title="Variants",
            lines=(
                f"{SUMMARY} and {METRICS} name a variant as it is written for --variants.",
                *_block_rules(results),
            ),
            table=(
                ("variant", "written"),
                *((variant_name(variant), variant) for variant in results.variants),
            ),
            text_columns=2,
        ),
        Section(title="How it was run", table=facts_table(results), text_columns=2),
    ]


def _accuracy_sections(results: Results, figures: Mapping[str, Path]) -> list[Section]:
    text_columns = 1 if len(results.variants) <= MAX_SIDE_BY_SIDE else 2
    lengths: list[tuple[str, Cells]] = [
        (length_name(length), {"length": length}) for length in results.lengths
    ]
    all_lengths: list[tuple[str, Cells]] = [("all lengths", {})] if len(lengths) > 1 else []
    by_length = Section(
        title="Accuracy by length",
        lines=(
            "In percent, ± one standard error. Differences are from"
            f" {variant_name(results.baseline)} on the same samples, in points, with the 95 %"
            " interval of a paired bootstrap; an interval that contains 0 means no significant"
            " difference.",
            "The value of a length is the mean of its tasks' means; that of all lengths is the mean"
            " over tasks and lengths.",
        ),
        table=accuracy_table(results, [*all_lengths, *lengths]),
        text_columns=text_columns,
        figure=figures.get("length"),
    )
    groups: list[tuple[str, Cells]] = [(group, {"group": group}) for group in results.groups]
    by_group = Section(
        title="By category",
        table=accuracy_table(results, groups),
        text_columns=text_columns,
        figure=figures.get("groups"),
    )
    by_task = Section(
        title="By task and length",
        table=accuracy_table(results, _task_rows(results)),
        text_columns=text_columns,
    )
    return [by_length, *([by_group] if len(groups) > 1 else []), by_task]


def _task_rows(results: Results) -> list[tuple[str, Cells]]:
    rows: list[tuple[str, Cells]] = []
    for task in results.tasks:
        prose = results.prose(task=task)
        suffix = f" ({prose})" if prose else ""
        for length in results.lengths:
            cells = {"task": task, "length": length}
            rows.append((f"{task}, {length_name(length)}{suffix}", cells))
    return rows


def _block_rules(results: Results) -> list[str]:
    """Name the variants whose blocks are those that `generate` would take."""
    chosen = [key for key in results.variants if parse(key).follows_rule]
    return [
        f"{', '.join(map(variant_name, chosen))}: blocks as `generate` and the engine choose them"
        f" ({DEFAULT_BLOCK_RULE})."
    ] * bool(chosen)


def _answers_section(results: Results) -> Section:
    table, total = answers_table(results), count_questions(results)
    lines = ["The share of an answer that is right is in parentheses; slashes part right answers."]
    if total > MOST_QUESTIONS:
        lines.append(
            f"{MOST_QUESTIONS:,} of {total:,} questions, those first that are not all right;"
            f" {PREDICTIONS} holds the others."
        )
    return Section(
        title="Questions and answers",
        lines=tuple(lines),
        table=table,
        text_columns=len(table[0]),
        has_marks=False,
    )


def _skipped_section(results: Results) -> list[Section]:
    skipped = results.run["skipped"]
    if not skipped:
        return []
    rows = [(line["sample"], f"{line['tokens']:,}", f"{line['positions']:,}") for line in skipped]
    return [
        Section(
            title="Skipped",
            lines=("Longer than the model's positions (--skip-too-long).",),
            table=(("sample", "tokens", "positions"), *rows),
        )
    ]
