"""Numbers and differences as reports write them."""

from __future__ import annotations

from typing import Any

from star_attention.evals.reports.results import Comparison
from star_attention.evals.stats import NO_DIFFERENCE, Mean

MARK, TOO_FEW_MARK = " *", " (too few)"
"""Marks after a difference; `Section.legend` explains them."""


def accuracy(mean: Mean) -> str:
    """Format an accuracy in percent, with its standard error: `87.5 ± 1.2`."""
    error = "" if mean.stderr is None else f" ± {100 * mean.stderr:.1f}"
    return f"{100 * mean.value:.1f}{error}"


def points(value: float) -> str:
    """Format a signed difference in percentage points: `−4.0`, `0.0`, `+1.2`."""
    return f"{100 * value:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def difference_sentence(comparison: Comparison) -> str:
    """Format a difference: `−4.0 points, 95 % interval −6.1 to −1.9: lower`."""
    difference = comparison.difference
    if difference is None:
        return f"not compared: {comparison.unpaired}"
    if difference.low is None or difference.high is None:
        return f"{points(difference.value)} points, {difference.verdict}"
    interval = f"{points(difference.low)} to {points(difference.high)}"
    return f"{points(difference.value)} points, 95 % interval {interval}: {difference.verdict}"


def difference_cell(comparison: Comparison | None) -> str:
    """Format a difference: `−4.0 [−6.1, −1.9] *`."""
    if comparison is None:
        return "–"
    difference = comparison.difference
    if difference is None:
        return "not compared"
    if difference.low is None or difference.high is None:
        return f"{points(difference.value)}{TOO_FEW_MARK}"
    mark = "" if difference.verdict == NO_DIFFERENCE else MARK
    return f"{points(difference.value)} [{points(difference.low)}, {points(difference.high)}]{mark}"


def plain(value: Any) -> str:
    """Format a value of run.json for readers: lists with commas, yes, no, none."""
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
