"""A long text with facts planted at known depths.

The text is `tools.prose`, one sentence per line: the bundled model was trained on contexts of whole
lines of ASCII prose. The same release of Python always gives the same text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from star_attention.errors import SizeError
from star_attention.hf.text.tokens import context_ids, query_ids
from star_attention.tools.needles import ADJECTIVES, NOUNS
from star_attention.tools.prose import prose_lines

QUESTION_MARK, ANSWER_MARK = "<|q|>", "<|a|>"

_NUM_KEYS = len(ADJECTIVES) * len(NOUNS)
_LOOK_AHEAD = 100


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One planted line.

    Attributes:
        key, number: its content.
        depth: its intended place, from 0 (first line) to 1 (last line).
        position: tokens of the context before it, including BOS.
    """

    key: str
    number: str
    depth: float
    position: int

    @property
    def line(self) -> str:
        return _line(self.key, self.number)

    def query(self, tokenizer: Any) -> str:
        """Return the question with the beginning of its answer.

        It has the bundled model's format if the tokenizer has its marks.
        """
        question = f"What is the secret number for {self.key}?"
        start = f"The secret number for {self.key} is"
        if QUESTION_MARK in tokenizer.get_vocab():
            return f"{QUESTION_MARK}{question}{ANSWER_MARK}{start}"
        return f"\nQuestion: {question}\nAnswer: {start}"

    def matches(self, answer: str) -> bool:
        """Return True if an answer begins with exactly this number."""
        number = re.match(r"\s*(\d+)", answer)
        return number is not None and number[1] == self.number


@dataclass(frozen=True, kw_only=True)
class Haystack:
    """A context of whole lines, `tokens` long with BOS, and its facts in the order of the text."""

    text: str
    tokens: int
    facts: tuple[Fact, ...]
    seed: int


def build_haystack(tokenizer: Any, tokens: int, *, facts: int = 30, seed: int = 0) -> Haystack:
    """Build a context that is as long as whole lines allow.

    The facts are at evenly spaced depths, from the first line to the last, each at the first line
    boundary at or after its depth.

    Args:
        tokenizer: of the model; BOS counts.
        tokens: the most tokens.
        facts: the number of facts.
        seed: determines keys, numbers, and the first sentence. After the last sentence of the prose
            the text continues with the first.

    Raises:
        SizeError: fewer than two facts, more than there are keys, a length that the facts alone
            would fill, or one beyond that of the prose.
        InvalidInputError: this Python has no `pydoc_data`.
    """
    if not 2 <= facts <= _NUM_KEYS:
        raise SizeError(
            f"facts {facts} cannot be planted at evenly spaced depths; give 2 to {_NUM_KEYS}"
        )
    rng = random.Random(f"haystack {tokens} {facts} {seed}")
    keys = [_key(index) for index in rng.sample(range(_NUM_KEYS), facts)]
    numbers = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), facts)]
    planted = list(zip(keys, numbers, strict=True))
    lines = prose_lines()
    first = rng.randrange(len(lines))
    lines = lines[first:] + lines[:first]

    def cost(line: str) -> int:
        return len(query_ids(tokenizer, line))

    # Computed for the longest of all keys, so that the limit does not depend on those drawn: they
    # differ for the length that the message asks for.
    longest_line = max(cost(_line(_key(index), numbers[0])) for index in range(_NUM_KEYS))
    least = 2 * facts * longest_line
    if tokens < least:
        raise SizeError(
            f"tokens {tokens:,} leave no room around {facts} facts; give at least {least:,}"
        )
    special_tokens = len(context_ids(tokenizer, "\n")) - cost("\n")
    room = tokens - special_tokens - sum(cost(_line(*fact)) for fact in planted)
    while True:
        haystack = _assemble(tokenizer, _fill(lines, room, cost, tokens), planted, seed)
        if haystack.tokens <= tokens:
            return haystack
        # This tokenizer needs more tokens for joined lines than for each line alone.
        room -= haystack.tokens - tokens


def _key(index: int) -> str:
    return f"{ADJECTIVES[index % len(ADJECTIVES)]}-{NOUNS[index // len(ADJECTIVES)]}"


def _line(key: str, number: str) -> str:
    return f"The secret number for {key} is {number}.\n"


def _fill(
    lines: tuple[str, ...], room: int, cost: Callable[[str], int], tokens: int
) -> list[tuple[str, int]]:
    """Take lines in order while they fit, and then the next line that fills the rest best.

    Returns the lines with their tokens.
    """
    taken: list[tuple[str, int]] = []
    for index, line in enumerate(lines):
        size = cost(line)
        if size > room:
            candidates = ((cost(other), other) for other in lines[index + 1 : index + _LOOK_AHEAD])
            size, line = max((pair for pair in candidates if pair[0] <= room), default=(0, ""))
            return [*taken, (line, size)] if line else taken
        taken.append((line, size))
        room -= size
    raise SizeError(
        f"tokens {tokens:,} are more than the text has:"
        f" {sum(size for _, size in taken):,} tokens of the language reference;"
        " give a smaller length"
    )


def _assemble(
    tokenizer: Any, filler: list[tuple[str, int]], planted: list[tuple[str, str]], seed: int
) -> Haystack:
    """Join lines and facts. Depth 1 is after the last line, so that all lines are used."""
    total = sum(size for _, size in filler)
    depths = [index / (len(planted) - 1) for index in range(len(planted))]
    parts: list[str] = []
    prefixes = []
    position = used = 0
    for (key, number), depth in zip(planted, depths, strict=True):
        while used < len(filler) and position < depth * total:
            line, size = filler[used]
            parts.append(line)
            position, used = position + size, used + 1
        prefixes.append("".join(parts))
        parts.append(_line(key, number))
    text = "".join(parts)
    facts = tuple(
        Fact(key=key, number=number, depth=depth, position=len(context_ids(tokenizer, prefix)))
        for (key, number), depth, prefix in zip(planted, depths, prefixes, strict=True)
    )
    return Haystack(text=text, tokens=len(context_ids(tokenizer, text)), facts=facts, seed=seed)
