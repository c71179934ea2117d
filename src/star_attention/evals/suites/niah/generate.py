"""The generator of niah's grid: one needle in prose, at each of several depths."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.evals.samples.building import Draw, depths, insert, opening
from star_attention.evals.samples.case import Case
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.samples.sources import prose, split_sentences, words
from star_attention.evals.suites.niah import DEPTHS, SUITE
from star_attention.evals.suites.ruler.needles import ask, haystack_kind
from star_attention.tools.needles import needle


def generate(
    task: str, *, size: Size, count: int, seed: int, options: Mapping[str, Any]
) -> Iterator[Sample]:
    """Generate `count` samples for each depth, in `count` passes through the depths.

    The sample is RULER's needle with a number, and its question. Within a pass, needle and prose
    are the same, so that depths differ in nothing else. The needle is between the two sentences
    closest to its depth.

    `meta` has `depth`, the nominal depth; `depths`, the actual one; and `cluster`, the same for all
    samples of a pass, because their scores depend on one another.

    Raises:
        InvalidInputError: The option `depths` is malformed, or the prose cannot be read.
        SizeError: The length is too short.
    """
    parsed = _parse_depths(str(options.get("depths") or DEPTHS))
    return (
        _generate(
            Case(
                suite=SUITE.name,
                task=task,
                size=size,
                seed=seed,
                index=index,
                options=options,
                label=f"-{depth:g}",
            ),
            depth,
        )
        for index in range(count)
        for depth in parsed
    )


def _generate(case: Case, depth: float) -> Sample:
    essay = prose(case.options.get("essays"))
    known_words = words(case.options.get("words"))

    def build(count: int) -> Sample:
        draw = Draw(case.rng(), known_words)
        key, value = draw("words"), draw("numbers")
        hidden = needle(key, value, "numbers")
        filler = list(split_sentences(opening(essay, count)))
        ends = list(itertools.accumulate((len(line) + 1 for line in filler), initial=0))
        place = min(range(len(ends)), key=lambda index: abs(ends[index] - ends[-1] * depth / 100))
        text = " ".join(insert([hidden], filler, [place]))
        return ask(
            case,
            text,
            [key],
            [value],
            "numbers",
            depth=depth,
            cluster=f"{case.task}-{case.size.length}-{case.seed}-{case.index}",
            depths=depths(text, [hidden]),
            haystack=haystack_kind(case.options),
            words=known_words.release,
            **essay.meta,
        )

    return case.size.largest(build)[1]


def _parse_depths(text: str) -> list[float]:
    try:
        parsed = [float(part) for part in text.split(",")]
    except ValueError:
        parsed = []
    in_range = all(0 <= depth <= 100 for depth in parsed)
    if not parsed or not in_range or len(set(parsed)) < len(parsed):
        raise InvalidInputError(
            f"depths {quote(text)} are not percentages; give different numbers from 0 to"
            " 100, separated"
            " by commas"
        )
    return parsed
