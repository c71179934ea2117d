"""Contexts with planted facts, the questions about them, and the text that follows."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from star_attention.calibration.settings import CalibrationSettings
from star_attention.errors import SizeError
from star_attention.hf.text.tokens import context_ids, query_ids
from star_attention.tools.needles import ADJECTIVES, NOUNS, head, needle, question
from star_attention.tools.prose import prose_lines

VALUES_OF_KEYS = (1, 1, 4, 4)
"""Values of each key: single facts, and lists whose values are in several blocks."""

_LAST_DEPTH = 0.9
"""Facts are before this part of the context."""

_SENTENCE = re.compile(r".{1,400}?(?:[.!?]\s+|\n+|\Z)|.{400}", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Tokens after a context: some that are given, then some whose likelihood is measured."""

    ids: list[int]
    measured: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A context with planted facts.

    Attributes:
        context: token ids.
        facts: questions about the facts, with their answers.
        text: the text that follows.
    """

    context: list[int]
    facts: tuple[Probe, ...]
    text: Probe


def prose() -> str:
    """Return the text that is used where the user gives none."""
    return " ".join(line.strip() for line in prose_lines())


def samples(tokenizer: Any, text: str, settings: CalibrationSettings) -> list[Sample]:
    """Build the contexts of a calibration.

    Raises:
        SizeError: the text, or a context, is too short.
    """
    sentences = [match[0] for match in _SENTENCE.finditer(text)]
    sizes = [len(query_ids(tokenizer, sentence)) for sentence in sentences]
    # Some more than the context and its continuation, because joined sentences may take fewer.
    need = settings.length + settings.length // 4
    total = sum(sizes)
    if total < need:
        raise SizeError(
            f"the text has {total:,} tokens, and contexts of {settings.length:,} need {need:,};"
            f" give a longer text, or --length {total * 4 // 5}"
        )
    last = len(sentences)
    tail = 0
    while tail < need:
        last -= 1
        tail += sizes[last]
    return [
        _sample(
            tokenizer,
            sentences,
            sizes,
            random.Random(f"calibration {settings.length} {settings.seed} {number}"),
            last,
            settings.length,
        )
        for number in range(settings.samples)
    ]


def _sample(
    tokenizer: Any,
    sentences: list[str],
    sizes: list[int],
    rng: random.Random,
    last: int,
    length: int,
) -> Sample:
    """Plant facts between the sentences from a random one on, up to number `last`."""
    facts = list(_facts(rng))
    places = sorted(
        (rng.uniform(0.02, _LAST_DEPTH) * length, key, value)
        for key, values in facts
        for value in values
    )
    in_order = {key: [value for _, other, value in places if other == key] for key, _ in facts}
    parts, tokens, index = [head("numbers", single=False)], 0, rng.randint(0, last)
    while tokens < length * 5 // 4 and index < len(sentences):
        while places and places[0][0] <= tokens:
            _, key, value = places.pop(0)
            line = needle(key, value, "numbers") + " "
            parts.append(line)
            tokens += len(query_ids(tokenizer, line))
        parts.append(sentences[index])
        tokens, index = tokens + sizes[index], index + 1
    ids = context_ids(tokenizer, "".join(parts))
    after = ids[length : length + max(16, length // 8)]
    return Sample(
        context=ids[:length],
        facts=tuple(_probe(tokenizer, key, values) for key, values in in_order.items()),
        text=Probe(ids=after, measured=len(after) - 1),
    )


def _facts(rng: random.Random) -> Iterator[tuple[str, list[str]]]:
    """Draw keys with their values."""
    count = len(VALUES_OF_KEYS)
    adjectives, nouns = rng.sample(ADJECTIVES, count), rng.sample(NOUNS, count)
    for adjective, noun, values in zip(adjectives, nouns, VALUES_OF_KEYS, strict=True):
        yield f"{adjective}-{noun}", [str(rng.randrange(10**6, 10**7)) for _ in range(values)]


def _probe(tokenizer: Any, key: str, values: list[str]) -> Probe:
    query, start = question([key], "numbers", single=len(values) == 1)
    given = query_ids(tokenizer, f"\n{query}{start}")
    ids = query_ids(tokenizer, f"\n{query}{start} {', '.join(values)}")
    shared = next(
        (number for number, (a, b) in enumerate(zip(given, ids, strict=False)) if a != b),
        len(given),
    )
    return Probe(ids=ids, measured=len(ids) - shared)
