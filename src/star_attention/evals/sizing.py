"""How long a generated sample may be: it fits its length with any tokenizer, and comes as near to it as its parts allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from star_attention.errors import SizeError
from star_attention.evals.record import Sample
from star_attention.hf.text import context_ids, query_ids


@dataclass(frozen=True, kw_only=True)
class Size:
    """A length in tokens, as a tokenizer counts them: of context (with what the tokenizer puts in front), query, answer prefix and
    the answer's `max_new_tokens`, together. reserve: tokens kept free for a chat template's own.
    """

    tokenizer: Any
    length: int
    reserve: int = 0

    def tokens(self, sample: Sample) -> int:
        """What a sample takes of the length."""
        text = sample.query + sample.answer_prefix
        asked = len(query_ids(self.tokenizer, text)) if text else 0
        return len(context_ids(self.tokenizer, sample.context)) + asked + sample.max_new_tokens + self.reserve

    def fits(self, sample: Sample) -> bool:
        return self.tokens(sample) <= self.length

    def largest(self, build: Callable[[int], Sample], *, least: int = 1, most: int | None = None) -> tuple[int, Sample]:
        """The largest number of units (needles, words, sentences, ...) for which what `build` makes of them fits, and that sample.

        `build` must be the same for the same number; more units are taken to be longer. Found by doubling and then by halves.

        Raises `SizeError` where `least` units do not fit.
        """
        best = build(least)
        if not self.fits(best):
            raise SizeError(
                f"length {self.length:,} is too short for a sample of {best.task}, which takes {self.tokens(best):,} tokens at"
                " least; give a larger length"
            )
        low, high = least, None
        while high is None or high - low > 1:
            middle = 2 * low + 1 if high is None else (low + high) // 2
            if most is not None and middle >= most:
                if high is None and low < most:
                    middle = most
                elif high is None:
                    break
            sample = build(middle)
            if self.fits(sample):
                low, best = middle, sample
                if most is not None and low >= most:
                    break
            else:
                high = middle
        return low, best
