"""One needle in prose at each of several depths: the grid of depth and length that heat maps show."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from star_attention.errors import InvalidInputError
from star_attention.evals import suites
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.samples.sources import prose, split_sentences, words
from star_attention.evals.suites.ruler.case import Case, depths
from star_attention.evals.suites.ruler.needles import (
    Draw,
    ask,
    haystack_kind,
    opening,
    planted,
    sentence,
)

TASKS = ("niah_grid",)
DEPTHS = "0,10,20,30,40,50,60,70,80,90,100"
OPTIONS = {
    "depths": f"where the needle stands, in percent of the text: numbers with commas ({DEPTHS})",
    "essays": "prose around the needle: a .json with a field text, a folder of .txt, or a text file",
    "words": "train or eval: the words that the bundled model was trained on, or the others",
}


def generate(
    task: str, *, size: Size, count: int, seed: int, options: Mapping[str, Any]
) -> Iterator[Sample]:
    """`count` samples for each depth, one after another through the depths: RULER's needle with a number, and its question.

    The same needle and text are asked for at each depth, so that depths differ in nothing else. The needle stands between the two
    sentences nearest to its depth, `meta["depth"]`; where that is, `meta["depths"]` says. All depths of one needle
    and text, whose scores depend on one another, have the same `meta["cluster"]`.

    Raises `InvalidInputError` for an unknown task or option, depths that are none, and prose that cannot be read; `SizeError` for a
    length that is too short.
    """
    suites.check(suites.get("niah"), "NIAH", task, options)
    asked = _depths(str(options.get("depths") or DEPTHS))
    cases = (
        (
            Case(
                suite="niah",
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
        for depth in asked
    )
    return itertools.starmap(_needle, cases)


def _needle(case: Case, depth: float) -> Sample:
    essay = prose(case.options.get("essays"))
    known = words(case.options.get("words"))

    def build(count: int) -> Sample:
        draw = Draw(case.rng(), known)
        key, value = draw("words"), draw("numbers")
        hidden = sentence(key, value, "numbers")
        sentences = list(split_sentences(opening(essay, count)))
        ends = list(itertools.accumulate((len(one) + 1 for one in sentences), initial=0))
        place = min(range(len(ends)), key=lambda at: abs(ends[at] - ends[-1] * depth / 100))
        text = " ".join(planted(sentences, [hidden], [place]))
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
            words=known.release,
            **essay.described,
        )

    return case.size.largest(build)[1]


def _depths(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= depth <= 100 for depth in found) or len(set(found)) < len(found):
        raise InvalidInputError(
            f"depths {text!r} are no percents; give different numbers from 0 to 100, with commas"
        )
    return found
