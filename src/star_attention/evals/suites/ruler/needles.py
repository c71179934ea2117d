"""RULER's eight needle tasks: sentences that give a key its value, hidden in a haystack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from star_attention.evals.samples.building import NOISE, Draw, depths, insert, opening
from star_attention.evals.samples.case import Case
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sources import prose, split_sentences, words
from star_attention.tools.needles import head, needle, question

MAX_NEW_TOKENS = 128
_DEPTHS = tuple(round(100 * step / 39) for step in range(40))
"""Depths of needles in prose, in percent of the sentences."""


@dataclass(frozen=True, kw_only=True)
class Needles:
    """The needles of a task, and their haystack.

    Attributes:
        haystack: "repeat" for noise, "needle" for other needles, "essay" for prose.
        keys: Kind of the keys, "words" or "uuids".
        values: Kind of the values, "numbers" or "uuids".
        num_keys: Keys that are hidden.
        num_values: Values of each key, one needle each.
        num_queries: Keys that are asked for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


NEEDLES = {
    "niah_single_1": Needles(haystack="repeat"),
    "niah_single_2": Needles(haystack="essay"),
    "niah_single_3": Needles(haystack="essay", values="uuids"),
    "niah_multikey_1": Needles(haystack="essay", num_keys=4),
    "niah_multikey_2": Needles(haystack="needle"),
    "niah_multikey_3": Needles(haystack="needle", keys="uuids", values="uuids"),
    "niah_multivalue": Needles(haystack="essay", num_values=4),
    "niah_multiquery": Needles(haystack="essay", num_keys=4, num_queries=4),
}


def generate(case: Case) -> Sample:
    """Generate a sample of a needle task."""
    task = NEEDLES[case.task]
    essay = prose(case.options.get("essays")) if task.haystack == "essay" else None
    known_words = words(case.options.get("words")) if task.keys == "words" else None
    meta: dict[str, Any] = {} if essay is None else dict(essay.meta)
    if known_words is not None:
        meta["words"] = known_words.release

    # The order of the random draws must not change, or seeds would give other samples.
    def build(count: int) -> Sample:
        rng = case.rng()
        draw = Draw(rng, known_words)
        pairs = [
            (key, draw(task.values))
            for key in [draw(task.keys) for _ in range(task.num_keys)]
            for _ in range(task.num_values)
        ]
        queried = rng.sample(list(dict.fromkeys(key for key, _ in pairs)), task.num_queries)
        needles = [needle(key, value, task.values) for key, value in pairs]
        rng.shuffle(needles)
        if essay is not None:
            filler = list(split_sentences(opening(essay, count)))
            places = sorted(
                len(filler) * depth // 100 for depth in rng.sample(_DEPTHS, len(needles))
            )
        else:
            filler = [NOISE] * count
            if task.haystack == "needle":
                filler = [
                    needle(draw(task.keys), draw(task.values), task.values) for _ in range(count)
                ]
            places = sorted(rng.sample(range(count), len(needles)))
        text = (" " if essay is not None else "\n").join(insert(needles, filler, places))
        return ask(
            case,
            text,
            queried,
            [value for key in queried for other, value in pairs if other == key],
            task.values,
            haystack=haystack_kind(case.options) if essay is not None else task.haystack,
            depths=depths(text, needles),
            **meta,
        )

    return case.size.largest(build)[1]


def ask(
    case: Case, text: str, keys: list[str], answers: list[str], values: str, **meta: Any
) -> Sample:
    """Return the sample that asks for the values of some keys in a text.

    As in RULER, the prompt is in the singular if there is one answer.
    """
    single = len(answers) == 1
    return case.sample(
        f"{head(values, single=single)}{text}\n",
        *question(keys, values, single=single),
        answers,
        max_new_tokens=MAX_NEW_TOKENS,
        category="retrieval",
        **meta,
    )


def haystack_kind(options: Mapping[str, Any]) -> str:
    """Return `meta["haystack"]` for prose: it distinguishes the user's texts from our default."""
    return "standard library prose" if options.get("essays") is None else "essay"
