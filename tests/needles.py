"""Needle-in-a-haystack samples in the format of the bundled model's secrets: one fact is asked, among filler or other facts.

(Values are of those that the training of needle-32m held out, value % 13 == 5.)
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
# Name of a task: (what the facts stand in, what they tell, how many)
TASKS = {
    "niah_single_noise": ("noise", "number", 1),
    "niah_single_prose": ("prose", "number", 1),
    "niah_single_code": ("prose", "code", 1),
    "niah_multikey": ("prose", "number", 16),
    "niah_needles": ("needles", "number", None),
    "niah_needles_code": ("needles", "code", None),
}


@dataclass(frozen=True, kw_only=True)
class Fact:
    kind: str  # "number" or "code"
    key: str
    value: str

    @property
    def line(self) -> str:
        return f"The secret {self.kind} for {self.key} is {self.value}.\n"

    @property
    def query(self) -> str:
        return f"<|q|>What is the secret {self.kind} for {self.key}?<|a|>The secret {self.kind} for {self.key} is"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A context of at most the asked number of tokens, and its facts in the order of the text."""

    context: str
    facts: list[Fact]


@functools.cache
def prose() -> list[str]:
    """Sentences of the language reference that every Python brings along."""
    text = " ".join(pydoc_data.topics.topics.values())
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", re.sub(r"[`*_\[\]]", "", text))
    lines = [re.sub(r"\s+", " ", sentence).strip() for sentence in sentences]
    return [
        line for line in lines if 30 <= len(line) <= 260 and line.isascii() and line[-1] in ".!?"
    ]


@functools.cache
def words() -> list[str]:
    """Words for keys, out of the same text: so many that few keys of a context share one."""
    found = re.findall(r"\b[a-z]{4,9}\b", " ".join(prose()))
    return sorted({word for word in found if not word.endswith(("s", "ing", "ed", "er"))})


def make(task: str, tokenizer: Any, tokens: int, seed: int) -> Sample:
    """A sample of a task, `tokens` long (less at most one line), the same for the same seed."""
    draw = random.Random(f"{task} {tokens} {seed}")
    hay, kind, count = TASKS[task]
    facts: list[Fact] = []
    keys: set[str] = set()
    room = tokens - 1  # BOS

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
