"""Sentences of a report: the result in short, and warnings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from star_attention.evals.reports.results import Results, length_name, variant_name
from star_attention.evals.reports.wording import accuracy, difference_sentence
from star_attention.evals.runs.variants import parse
from star_attention.evals.suites import babilong
from star_attention.evals.suites.infinitebench.tasks import TASKS as INFINITEBENCH

_PYTHON_PROSE = "pydoc_data.topics"
"""The name that `sources.prose` gives to the prose of the running Python."""


def in_short(results: Results) -> list[str]:
    """State each variant's accuracy and difference from the baseline; then cut-off answers."""
    lines = []
    for variant in results.variants:
        name, comparison = variant_name(variant), results.compared(variant)
        if comparison is None:
            lines.append(f"{name}: – (no task and length that all variants have)")
            continue
        line = f"{name}: {accuracy(comparison.mean)}"
        if variant != results.baseline:
            line += f"; vs {variant_name(results.baseline)} {difference_sentence(comparison)}"
        lines.append(line)
    return lines + _cut_off(results)


def _cut_off(results: Results) -> list[str]:
    """Count answers that the token limit may have cut off; some of them may still be correct."""
    counts = list(map(results.at_limit, results.variants))
    wrong = [
        f"{variant_name(count.variant)} ({count.not_right:,} of {count.answers:,})"
        for count in counts
        if count.not_right
    ]
    if not wrong:
        return []
    line = (
        f"Answers that ended at the token limit and are not fully right: {', '.join(wrong)};"
        " raise --max-new-tokens."
    )
    right = sum(count.ended - count.not_right for count in counts)
    return [line + (f" {right:,} right answers ended there too." if right else "")]


def warnings(results: Results) -> list[str]:
    """Return warnings about how far the numbers can be trusted."""
    return [
        *_incomplete(results),
        *_not_published(results),
        *_same_sizes(results),
        *_empty_answers(results),
        *_single_blocks(results),
    ]


def _incomplete(results: Results) -> list[str]:
    lines = []
    if results.missing:
        lines.append(
            f"This run is incomplete: {results.missing:,} predictions are missing; run the same"
            " command again."
        )
    lines += [f"{name} is left out: {why}." for name, why in results.run["left_out"].items()]
    if results.partial:
        cells = ", ".join(f"{task} at {length_name(length)}" for task, length in results.partial)
        lines.append(
            f"Some variants lack {cells}: means over several tasks or lengths leave these out."
        )
    return lines


def _not_published(results: Results) -> list[str]:
    """Name prose, prompts and stories that differ from the published data sets'."""
    lines = []
    if any(_PYTHON_PROSE in results.prose(task=task) for task in results.tasks):
        lines.append(
            f"Tasks marked {_PYTHON_PROSE} use prose of the running Python, as neither --essays nor"
            " --background was given: their scores are not comparable with published RULER or"
            " BABILong scores."
        )
    published = {line.task for line in results.predictions if "prompts_sha256" in line.meta}
    tasks = (*babilong.SUITE.tasks, *INFINITEBENCH)
    own = [task for task in results.tasks if task in tasks and task not in published]
    if own:
        lines.append(
            f"{', '.join(own)}: prompts of our own, so the scores are not comparable with published"
            " BABILong or InfiniteBench scores."
        )
    if published and results.run["settings"]["suite"] == "babilong":
        lines.append(f"{', '.join(sorted(published))}: published prompts, but our own stories.")
    return lines


def _same_sizes(results: Results) -> list[str]:
    """Name variants whose sizes resolve to the same."""
    names: dict[tuple[Any, ...], list[str]] = {}
    for key in results.variants:
        variant = parse(key)
        for length in results.lengths if variant.has_sizes else ():
            speed = results.speed(key, length)
            if speed is not None:
                rest = replace(variant, block_size=None, anchor_size=None)
                resolved = (length, rest, speed.block_size, speed.anchor_size)
                names.setdefault(resolved, []).append(variant.name)
    return [
        f"{' and '.join(same)} have the same blocks and anchor at {length_name(length)}."
        for (length, *_), same in names.items()
        if len(same) > 1
    ]


def _empty_answers(results: Results) -> list[str]:
    lines = []
    for variant in results.variants:
        predictions = results.select(variant)
        empty = sum(prediction.is_empty for prediction in predictions)
        if empty:
            lines.append(
                f"{variant_name(variant)}: {empty:,} of {len(predictions):,} predictions are empty."
            )
    return lines


def _single_blocks(results: Results) -> list[str]:
    cells = []
    for key in results.sweepable:
        for length in results.lengths:
            speed = results.speed(key, length)
            if speed is not None and speed.blocks == 1:
                cells.append(f"{variant_name(key)} at {length_name(length)}")
    if not cells:
        return []
    return [
        f"One block holds the whole context, which makes it dense attention: {', '.join(cells)}."
    ]
