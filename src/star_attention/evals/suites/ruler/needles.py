"""RULER's eight needle tasks: sentences that give a key its value, hidden in noise, among their like, or in prose."""

from __future__ import annotations

import random
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sources import Prose, Words, prose, split_sentences, words
from star_attention.evals.suites.ruler.case import Case, depths

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
MAX_NEW_TOKENS = 128
_DEPTHS = tuple(round(100 * step / 39) for step in range(40))  # percent of the sentences


@dataclass(frozen=True, kw_only=True)
class Needles:
    """A task's parts. haystack: "repeat", "needle" or "essay". keys: what they are ("words" or "uuids"); values: likewise
    ("numbers" or "uuids"). num_keys needles, or num_values for one key, are hidden; num_queries keys are asked for.
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


def needles(case: Case) -> Sample:
    task = NEEDLES[case.task]
    essay = prose(case.options.get("essays")) if task.haystack == "essay" else None
    listed = words(case.options.get("words")) if task.keys == "words" else None

    def build(count: int) -> Sample:
        rng = case.rng()
        draw = Draw(rng, listed)
        pairs = [
            (key, draw(task.values))
            for key in [draw(task.keys) for _ in range(task.num_keys)]
            for _ in range(task.num_values)
        ]
        asked = rng.sample(list(dict.fromkeys(key for key, _ in pairs)), task.num_queries)
        hidden = [sentence(key, value, task.values) for key, value in pairs]
        rng.shuffle(hidden)
        if essay is not None:
            sentences = list(split_sentences(opening(essay, count)))
            places = sorted(
                len(sentences) * depth // 100 for depth in rng.sample(_DEPTHS, len(hidden))
            )
        else:
            sentences = [NOISE] * count
            if task.haystack == "needle":
                sentences = [
                    sentence(draw(task.keys), draw(task.values), task.values) for _ in range(count)
                ]
            places = sorted(rng.sample(range(count), len(hidden)))
        text = (" " if essay is not None else "\n").join(planted(sentences, hidden, places))
        return ask(
            case,
            text,
            asked,
            [value for key in asked for other, value in pairs if other == key],
            task.values,
            haystack=haystack_kind(case.options) if essay is not None else task.haystack,
            depths=depths(text, hidden),
            **(essay.described if essay is not None else {}),
            **({} if listed is None else {"words": listed.release}),
        )

    return case.size.largest(build)[1]


class Draw:
    """Random keys and values, none of them twice; words from a list."""

    def __init__(self, rng: random.Random, words: Words | None) -> None:
        self._rng = rng
        self._words = words
        self._drawn: set[str] = set()

    def __call__(self, kind: str) -> str:
        while (drawn := self._one(kind)) in self._drawn:
            pass
        self._drawn.add(drawn)
        return drawn

    def _one(self, kind: str) -> str:
        if kind == "numbers":
            return str(self._rng.randint(1_000_000, 9_999_999))
        if kind == "uuids":
            return str(uuid.UUID(int=self._rng.getrandbits(128), version=4))
        assert self._words is not None, "there is no list of words"
        return f"{self._rng.choice(self._words.adjectives)}-{self._rng.choice(self._words.nouns)}"


def sentence(key: str, value: str, values: str) -> str:
    """A needle. Its kind of value stays in the plural, also where the question asks for one."""
    return f"One of the special magic {values} for {key} is: {value}."


def ask(
    case: Case, text: str, keys: list[str], answers: list[str], values: str, **meta: Any
) -> Sample:
    """The question for the values of some keys in a text, as RULER words it: in the singular where there is one answer."""
    one = len(answers) == 1
    return case.sample(
        f"{head(values, one=one)}{text}\n",
        *question(keys, values, one=one),
        answers,
        max_new_tokens=MAX_NEW_TOKENS,
        category="retrieval",
        **meta,
    )


def head(values: str, *, one: bool) -> str:
    """What stands in front of the text, where `one` value will be asked for, or several."""
    some, are, kind = ("A", "is", values.removesuffix("s")) if one else ("Some", "are", values)
    return (
        f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it."
        f" I will quiz you about the {kind} afterwards.\n"
    )


def question(keys: list[str], values: str, *, one: bool) -> tuple[str, str]:
    """The question for the values of some keys, and how its answer begins."""
    what, are, kind = (
        ("is the", "is", values.removesuffix("s")) if one else ("are all the", "are", values)
    )
    named = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    return (
        f"What {what} special magic {kind} for {named} mentioned in the provided text?",
        f" The special magic {kind} for {named} mentioned in the provided text {are}",
    )


def opening(essay: Prose, count: int) -> str:
    """Its first `count` words; behind its last it goes on with its first."""
    rounds, rest = divmod(count, len(essay.words))
    return " ".join(essay.words * rounds + essay.words[:rest])


def planted(sentences: list[str], hidden: list[str], places: list[int]) -> list[str]:
    """Sentences with the hidden ones each before the one at its place; places ascend, up to the number of sentences."""
    parts: list[str] = []
    start = 0
    for one, place in zip(hidden, places, strict=True):
        parts += [*sentences[start:place], one]
        start = place
    return parts + sentences[start:]


def haystack_kind(options: Mapping[str, Any]) -> str:
    """Of prose: RULER's own essays, or other texts that a user names, are not the standard library's."""
    return "standard library prose" if options.get("essays") is None else "essay"
