"""A long text that every machine has, with facts planted at known depths.

The text is the language reference in the standard library (`pydoc_data.topics`), cut into whole sentences, one a line:
the bundled model was trained on contexts of whole lines of ASCII prose. Headings, grammar rules, tables and code are
left out; the sentences, with the identifiers and signs in them, stay as they are. Its wording, and so the haystack, is
the same for the same release of Python.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from star_attention.errors import SizeError
from star_attention.hf.text.tokens import context_ids, query_ids
from star_attention.tools.prose import prose_lines

ADJECTIVES = tuple(
    """
amber ancient brisk calm clever crimson curious dusty eager faded gentle golden hidden humble icy jolly lonely mellow
misty noble patient quiet rusty scarlet shy silver solemn stormy sunny tidy velvet vivid weary winter wooden
""".split()  # noqa: SIM905
)
NOUNS = tuple(
    """
badger barley beacon candle canyon castle cedar chimney clover comet copper falcon feather fiddle fountain garden
glacier hammer harbor kettle ladder lantern lemon marble meadow mirror orchard otter paddle pebble pillow raven ribbon
saddle sparrow teapot thistle tunnel violin walnut willow
""".split()  # noqa: SIM905
)
QUESTION_MARK, ANSWER_MARK = "<|q|>", "<|a|>"


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One planted line.

    key, number: what it says. depth: where it was meant to stand, from 0 (first line) to 1 (last line).
    position: tokens of the context before it, BOS included.
    """

    key: str
    number: str
    depth: float
    position: int

    @property
    def line(self) -> str:
        return _line(self.key, self.number)

    def query(self, tokenizer: Any) -> str:
        """The question with the beginning of its answer, in the bundled model's format where the tokenizer knows it."""
        question = f"What is the secret number for {self.key}?"
        start = f"The secret number for {self.key} is"
        if QUESTION_MARK in tokenizer.get_vocab():
            return f"{QUESTION_MARK}{question}{ANSWER_MARK}{start}"
        return f"\nQuestion: {question}\nAnswer: {start}"

    def found_in(self, answer: str) -> bool:
        """Whether an answer begins with exactly this number."""
        given = re.match(r"\s*(\d+)", answer)
        return given is not None and given[1] == self.number


@dataclass(frozen=True, kw_only=True)
class Haystack:
    """A context of whole lines with facts in it, `tokens` long with BOS; facts in the order of the text."""

    text: str
    tokens: int
    facts: tuple[Fact, ...]
    seed: int


def build_haystack(tokenizer: Any, tokens: int, *, facts: int = 30, seed: int = 0) -> Haystack:
    """A context of at most `tokens` tokens (BOS included), and as near to it as whole lines come.

    The facts stand at evenly spaced depths, the first on the first line and the last on the last, each on the first line
    boundary at or behind its depth. `seed` chooses keys, numbers, and the sentence that the text starts from; behind its last
    sentence it goes on with its first.

    Raises `SizeError` for fewer than two facts, more than there are keys, a length that the facts alone would fill, or one
    beyond the text's, and `InvalidInputError` where this Python has no `pydoc_data`.
    """
    most = len(ADJECTIVES) * len(NOUNS)
    if not 2 <= facts <= most:
        raise SizeError(
            f"facts {facts} cannot be planted at evenly spaced depths; give 2 to {most}"
        )
    rng = random.Random(f"haystack {tokens} {facts} {seed}")
    keys = [_key(pair) for pair in rng.sample(range(most), facts)]
    planted = [
        (key, str(number))
        for key, number in zip(keys, rng.sample(range(1_000_000, 10_000_000), facts), strict=True)
    ]
    lines = prose_lines()
    first = rng.randrange(len(lines))
    lines = lines[first:] + lines[:first]

    def cost(line: str) -> int:
        return len(query_ids(tokenizer, line))

    # By the dearest key and not by those drawn, which are others for another length: what is asked for must do.
    least = 2 * facts * max(cost(_line(_key(pair), planted[0][1])) for pair in range(most))
    if tokens < least:
        raise SizeError(
            f"tokens {tokens:,} leave no room around {facts} facts; give at least {least:,}"
        )
    room = tokens - (
        len(context_ids(tokenizer, "\n")) - cost("\n") + sum(cost(_line(*pair)) for pair in planted)
    )
    while True:
        haystack = _assemble(tokenizer, _fill(lines, room, cost, tokens), planted, seed)
        if haystack.tokens <= tokens:
            return haystack
        room -= haystack.tokens - tokens  # a tokenizer that joins tokens across lines differently


def _key(pair: int) -> str:
    return f"{ADJECTIVES[pair % len(ADJECTIVES)]}-{NOUNS[pair // len(ADJECTIVES)]}"


def _line(key: str, number: str) -> str:
    return f"The secret number for {key} is {number}.\n"


def _fill(lines: tuple[str, ...], room: int, cost: Any, tokens: int) -> list[tuple[str, int]]:
    """Lines in order, with their tokens, while they fit; and last the one line further on that fills the rest best."""
    taken: list[tuple[str, int]] = []
    for index, line in enumerate(lines):
        size = cost(line)
        if size > room:
            fits = [(cost(other), other) for other in lines[index + 1 : index + 100]]
            size, line = max((one for one in fits if one[0] <= room), default=(0, ""))
            return [*taken, (line, size)] if size else taken
        taken.append((line, size))
        room -= size
    raise SizeError(
        f"tokens {tokens:,} are more than the text has: {sum(size for _, size in taken):,} tokens of the language reference;"
        " give a smaller length"
    )


def _assemble(
    tokenizer: Any, filler: list[tuple[str, int]], planted: list[tuple[str, str]], seed: int
) -> Haystack:
    total = sum(size for _, size in filler)
    depths = [index / (len(planted) - 1) for index in range(len(planted))]
    parts: list[str] = []
    starts: list[int] = []  # characters before each fact
    characters = position = used = 0
    for (key, number), depth in zip(planted, depths, strict=True):
        while used < len(filler) and position < depth * total:
            line, size = filler[used]
            parts.append(line)
            characters, position, used = characters + len(line), position + size, used + 1
        starts.append(characters)
        parts.append(_line(key, number))
        characters += len(parts[-1])
    text = "".join(parts)  # depth 1 is behind the last line, so that all of them are in
    facts = tuple(
        Fact(
            key=key, number=number, depth=depth, position=len(context_ids(tokenizer, text[:start]))
        )
        for (key, number), depth, start in zip(planted, depths, starts, strict=True)
    )
    return Haystack(text=text, tokens=len(context_ids(tokenizer, text)), facts=facts, seed=seed)
