"""The reports of a run: metrics.json, summary.csv, report.md, report.html and the figures."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from star_attention.errors import MissingPackageError
from star_attention.evals.reports import pages, plots
from star_attention.evals.reports.results import Comparison, Results
from star_attention.evals.reports.sections import sections, title
from star_attention.evals.runs.run_folder import FIGURES, MARKDOWN, METRICS, PAGE, SUMMARY

_SUMMARY_HEAD = (
    "task",
    "length",
    "variant",
    "n",
    "accuracy",
    "stderr",
    "empty",
    "cut_off",
    "baseline",
    "difference",
    "low",
    "high",
    "verdict",
    "question_s",
    "prose",
)


def write(folder: str | Path) -> list[Path]:
    """Write all reports of a run folder, and the figures if matplotlib is installed.

    Returns:
        The files written.

    Raises:
        InvalidInputError: If the folder holds no run, or a damaged one.
    """
    folder = Path(folder)
    results = Results.read(folder)
    figures: dict[str, Path] = {}
    notes = []
    try:
        figures = plots.draw(results, folder / FIGURES)
    except MissingPackageError:
        notes.append(
            "Without figures, as matplotlib is not installed;"
            ' run: pip install "star-attention[plot]"'
        )
    heading, parts = title(results), sections(results, figures, notes)
    texts = {
        METRICS: json.dumps(metrics(results), indent=2) + "\n",
        MARKDOWN: pages.markdown(heading, parts),
        PAGE: pages.html(heading, parts),
    }
    for name, text in texts.items():
        # Texts of models and data sets may hold what UTF-8 cannot.
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    with (folder / SUMMARY).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([_SUMMARY_HEAD, *_summary(results)])
    files = [folder / name for name in (METRICS, SUMMARY, MARKDOWN, PAGE)]
    return files + list(figures.values())


@dataclass(frozen=True)
class Report:
    """The report of a run for a notebook, which shows what report.html does, without figures.

    Attributes:
        results: the run.
    """

    results: Results

    @classmethod
    def read(cls, folder: str | Path) -> Report:
        """Read a run folder.

        Raises:
            InvalidInputError: If the folder holds no run, or a damaged one.
        """
        return cls(Results.read(folder))

    def _repr_html_(self) -> str:
        """Return the page."""
        return pages.html_body(title(self.results), sections(self.results, {}, []))


def metrics(results: Results) -> dict[str, Any]:
    """Return the content of metrics.json: the run, and every mean and difference.

    A `length` of null means all lengths.
    """

    def lines(**cells: Any) -> list[dict[str, Any]]:
        comparisons = [results.compared(variant, **cells) for variant in results.variants]
        return [
            cells | comparison.as_dict() for comparison in comparisons if comparison is not None
        ]

    lengths = [None, *results.lengths]
    speeds = [
        results.speed(variant, length) for variant in results.variants for length in results.lengths
    ]
    return {
        "baseline": results.baseline,
        "missing": results.missing,
        "overall": [line for length in lengths for line in lines(length=length)],
        "groups": [
            line
            for group in results.groups
            for length in lengths
            for line in lines(group=group, length=length)
        ],
        "tasks": [
            line
            for task in results.tasks
            for length in lengths
            for line in lines(task=task, length=length)
        ],
        "speed": [asdict(speed) for speed in speeds if speed is not None],
        "at_limit": [asdict(results.at_limit(variant)) for variant in results.variants],
        "run": dict(results.run),
    }


def _summary(results: Results) -> Iterator[tuple[Any, ...]]:
    """Return the rows of summary.csv: one for each task, length and variant."""
    for task in results.tasks:
        for length in results.lengths:
            for variant in results.variants:
                comparison = results.compared(variant, task=task, length=length)
                if comparison is not None:
                    yield _summary_row(results, comparison, task, length)


def _summary_row(
    results: Results, comparison: Comparison, task: str, length: int
) -> tuple[Any, ...]:
    variant, mean, difference = comparison.variant, comparison.mean, comparison.difference
    predictions = results.select(variant, task=task, length=length)
    compared: tuple[Any, ...] = ("", "", "", "", "")
    if difference is not None:
        compared = (
            results.baseline,
            difference.value,
            difference.low,
            difference.high,
            difference.verdict,
        )
    return (
        task,
        length,
        variant,
        mean.n,
        mean.value,
        mean.stderr,
        sum(prediction.is_empty for prediction in predictions),
        results.at_limit(variant, task=task, length=length).not_right,
        *compared,
        median(prediction.question_s for prediction in predictions),
        results.prose(task=task),
    )
