"""Needle-in-a-haystack samples in the format that the bundled models were trained on.

One fact is asked for, among filler or other facts. Values are among those that the training of
needle-32m held out, `value % 13 == 5`.
"""

from __future__ import annotations

import functools
import pydoc_data.topics
import random
import re
from dataclasses import dataclass
from typing import Any

NOISE = [
    "The hill is tall and the road is long.",
    "A cold wind comes down from the north.",
    "Nobody is at home this afternoon.",
    "There is bread on the table.",
    "A dog sleeps beside the fire.",
    "Stars come out one after another.",
    "The tea is hot and the cup is blue.",
    "A letter lies unopened on the desk.",
    "Clouds move slowly over the valley.",
]
TASKS = {
    "niah_single_noise": ("noise", "number", 1),
    "niah_single_prose": ("prose", "number", 1),
    "niah_single_code": ("prose", "code", 1),
    "niah_multikey": ("prose", "number", 16),
    "niah_needles": ("needles", "number", None),
    "niah_needles_code": ("needles", "code", None),
}
"""By task: the text around the facts, the kind of value, and the number of facts (None: all)."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A secret; `kind` is "number" or "code"."""

    kind: str
    key: str
    value: str

    @property
    def line(self) -> str:
        """The sentence in the context."""
        return f"The secret {self.kind} for {self.key} is {self.value}.\n"

    @property
    def query(self) -> str:
        """The question, with the start of its answer."""
        secret = f"secret {self.kind} for {self.key}"
        return f"<|q|>What is the {secret}?<|a|>The {secret} is"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A context, and its facts in the order of the text."""

    context: str
    facts: list[Fact]


@functools.cache
def prose() -> list[str]:
    """Sentences of the language reference that comes with Python."""
    text = " ".join(pydoc_data.topics.topics.values())
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", re.sub(r"[`*_\[\]]", "", text))
    lines = [re.sub(r"\s+", " ", sentence).strip() for sentence in sentences]
    return [
        line for line in lines if 30 <= len(line) <= 260 and line.isascii() and line[-1] in ".!?"
    ]


@functools.cache
def words() -> list[str]:
    """Words for keys, from the same text: enough of them that keys rarely repeat."""
    candidates = re.findall(r"\b[a-z]{4,9}\b", " ".join(prose()))
    return sorted({word for word in candidates if not word.endswith(("s", "ing", "ed", "er"))})


def make(task: str, tokenizer: Any, tokens: int, seed: int) -> Sample:
    """A sample of `tokens` tokens less at most one line; a seed always gives the same one."""
    draw = random.Random(f"{task} {tokens} {seed}")
    hay, kind, count = TASKS[task]
    facts: list[Fact] = []
    keys: set[str] = set()
    # One token is BOS.
    room = tokens - 1

    def length(line: str) -> int:
        return len(tokenizer(line, add_special_tokens=False).input_ids)

    while count is None or len(facts) < count:
        key = "-".join(draw.sample(words(), 2))
        if key in keys:
            continue
        number = draw.randrange(76924, 769230) * 13 + 5
        code = f"{draw.randrange(2**32 // 13) * 13 + 5:08x}"
        value = str(number) if kind == "number" else f"{code[:4]}-{code[4:]}"
        fact = Fact(kind=kind, key=key, value=value)
        if length(fact.line) > room:
            break
        keys.add(key)
        facts.append(fact)
        room -= length(fact.line)
    filler: list[str] = []
    stock = NOISE if hay == "noise" else prose() if hay == "prose" else []
    start = draw.randrange(len(stock)) if stock else 0
    while stock:
        line = (
            draw.choice(stock) if hay == "noise" else stock[(start + len(filler)) % len(stock)]
        ) + "\n"
        if length(line) > room:
            break
        filler.append(line)
        room -= length(line)
    lines = [*filler]
    places = sorted(draw.choices(range(len(filler) + 1), k=len(facts)))
    for place, fact in reversed(list(zip(places, facts, strict=True))):
        lines.insert(place, fact.line)
    return Sample(context="".join(lines), facts=facts)
