"""How long a generated sample may be: it fits its length with any tokenizer, and comes as near to it as its parts allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from star_attention.errors import SizeError
from star_attention.evals.samples.sample import Sample
from star_attention.hf.text.tokens import context_ids, query_ids


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
        return (
            len(context_ids(self.tokenizer, sample.context))
            + asked
            + sample.max_new_tokens
            + self.reserve
        )

    def fits(self, sample: Sample) -> bool:
        return self.tokens(sample) <= self.length

    def largest(
        self, build: Callable[[int], Sample], *, least: int = 1, most: int | None = None
    ) -> tuple[int, Sample]:
        """The largest number of units (needles, words, sentences, ...) for which what `build` makes of them fits, and that sample.

        `build` must be the same for the same number; more units are taken to be longer. Found between a number that fits and one
        that does not, which close in by the tokens that a unit takes, and by halves each third time, because units differ.

        Raises `SizeError` where `least` units do not fit.
        """
        best = build(least)
        used = first = self.tokens(best)
        if used > self.length:
            raise SizeError(
                f"length {self.length:,} is too short for a sample of {best.task}, which takes {used:,} tokens at"
                " least; give a larger length"
            )
        low = least
        high = None if most is None else most + 1
        beyond = 0  # tokens of `high` units, where they were built
        probes = 0
        while high is None or high - low > 1:
            probes += 1
            room = self.length - used
            if high is not None and beyond and probes % 3 == 0:
                middle = (low + high) // 2
            elif high is not None and beyond:
                middle = low + room * (high - low) // (beyond - used)
            elif used > first:
                middle = min(2 * low + 1, low + room * (low - least) // (used - first))
            else:
                middle = 2 * low + 1
            middle = max(low + 1, middle if high is None else min(middle, high - 1))
            sample = build(middle)
            tokens = self.tokens(sample)
            if tokens <= self.length:
                low, best, used = middle, sample, tokens
            else:
                high, beyond = middle, tokens
        return low, best
