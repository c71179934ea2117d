"""Sizes of generated samples, which fill their length as closely as possible in any tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from star_attention.errors import SizeError
from star_attention.evals.samples.sample import Sample


@dataclass(frozen=True, kw_only=True)
class Size:
    """A length in tokens: of context, query, answer prefix and the answer's `max_new_tokens`.

    Attributes:
        tokenizer: Tokenizer to count with; special tokens that it adds to a context count as well.
        length: Tokens in all.
        reserve: Tokens to leave free for a chat template.
    """

    tokenizer: Any
    length: int
    reserve: int = 0

    def tokens(self, sample: Sample) -> int:
        """Return the tokens that a sample takes, including the reserve."""
        # Imports torch, which reading data sets does not need.
        from star_attention.hf.text.tokens import context_ids, query_ids

        query = sample.query + sample.answer_prefix
        return (
            len(context_ids(self.tokenizer, sample.context))
            + (len(query_ids(self.tokenizer, query)) if query else 0)
            + sample.max_new_tokens
            + self.reserve
        )

    def fits(self, sample: Sample) -> bool:
        """Return True if the sample is within the length."""
        return self.tokens(sample) <= self.length

    def largest(
        self, build: Callable[[int], Sample], *, least: int = 1, most: int | None = None
    ) -> tuple[int, Sample]:
        """Find the largest number of units for which a sample fits.

        Args:
            build: Builds a sample from a number of units (needles, words, sentences, ...); the same
                sample for the same number, and a longer one for more units.
            least: Smallest number of units to try.
            most: Largest number of units to try; None for no limit.

        Returns:
            The number of units and its sample.

        Raises:
            SizeError: A sample of `least` units does not fit.
        """
        best = build(least)
        used = first = self.tokens(best)
        if used > self.length:
            raise SizeError(
                f"length {self.length:,} is too short for a sample of {best.task}, which takes at"
                f" least {used:,} tokens; give a larger length"
            )
        # `low` units fit, `high` units do not. Interpolate between the two by the tokens that a
        # unit takes; since units differ, every third step bisects instead.
        low = least
        high = None if most is None else most + 1
        # Tokens of `high` units; 0 if they have not been built.
        excess = 0
        steps = 0
        while high is None or high - low > 1:
            steps += 1
            room = self.length - used
            if high is not None and excess and steps % 3 == 0:
                middle = (low + high) // 2
            elif high is not None and excess:
                middle = low + room * (high - low) // (excess - used)
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
                high, excess = middle, tokens
        return low, best
