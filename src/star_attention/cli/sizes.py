"""Numbers on the command line: `128k`, `8k,32k`, and ranges of doublings such as `128k..1m`."""

from __future__ import annotations

from collections.abc import Callable

from star_attention.errors import InvalidInputError, SizeError, quote
from star_attention.planning.sizes import parse_size

QUARTER = "quarter"
"""Block size: the fastest one of a quarter of the context or more."""


def token_count(text: str, name: str) -> int:
    """Parse a positive number of tokens: `4096`, `4k`, `1m`.

    Raises:
        SizeError: If it is not a number of tokens, or below 1.
    """
    tokens = parse_size(text, name)
    if tokens < 1:
        raise SizeError(f"{name} {tokens:,} is below 1; give a positive number of tokens")
    return tokens


def token_counts(text: str, name: str) -> list[int]:
    """Parse one or more numbers of tokens: `128k`, `8k,32k`, `128k..1m`.

    Raises:
        SizeError: If a part is not a number of tokens, or below 1.
        InvalidInputError: If a range ends before it begins.
    """
    return _parse_list(text, name, lambda part: token_count(part, name))


def rank_counts(text: str) -> list[int]:
    """Parse one or more numbers of ranks: `8`, `1,8`, `1..1024`.

    Raises:
        InvalidInputError: If a part is not a positive number, or a range ends before it begins.
    """

    def rank_count(part: str) -> int:
        if not part.isdecimal() or int(part) < 1:
            raise InvalidInputError(
                f"ranks {quote(part)} is not a number of ranks; write 8, or 1..1024"
            )
        return int(part)

    return _parse_list(text, "ranks", rank_count)


def _parse_list(text: str, name: str, parse: Callable[[str], int]) -> list[int]:
    numbers: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        number = parse(first)
        stop = parse(last) if dots else number
        if stop < number:
            raise InvalidInputError(
                f"{name} {quote(part)} ends before it begins; write the smaller number first"
            )
        while number <= stop:
            numbers.append(number)
            number *= 2
    return numbers
