"""Stripes: the runs of blocks that ranks take in turn where blocks look back.

A block that looks back waits, layer by layer, for the blocks before it. So all ranks work on
neighboring stripes at the same time. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from star_attention.planning.segments import Segments

STRIPE_TOKENS = 8192
"""Most tokens of a stripe of several blocks, if `tokens_per_forward` does not say.

A constant, because the layout must not depend on the device.
"""


@dataclass(frozen=True, kw_only=True)
class Stripes:
    """The stripes of a context.

    Attributes:
        runs: `(start, stop)` of the tokens of every stripe; stripe s belongs to rank s mod `ranks`.
        ranks: context-parallel ranks.
    """

    runs: tuple[tuple[int, int], ...]
    ranks: int

    @classmethod
    def cut(
        cls, context_tokens: int, block_size: int, *, ranks: int, stripe_tokens: int
    ) -> Stripes:
        """Cut a context into stripes of at most `stripe_tokens` tokens, but at least one block."""
        most = max(1, stripe_tokens // block_size)
        bounds = stripe_bounds(-(-context_tokens // block_size), ranks, most)
        runs = tuple(
            (first * block_size, min(last * block_size, context_tokens))
            for first, last in pairwise(bounds)
        )
        return cls(runs=runs, ranks=ranks)

    @property
    def rounds(self) -> int:
        """Number of rounds, in each of which ranks encode a stripe."""
        return -(-len(self.runs) // self.ranks)

    def of_round(self, number: int) -> Segments:
        """Return the stripes of one round, that of rank 0 first."""
        return Segments(self.runs[number * self.ranks : (number + 1) * self.ranks])

    @property
    def longest(self) -> int:
        """Tokens of the longest stripe."""
        return max(stop - start for start, stop in self.runs)

    def of_rank(self, rank: int) -> Segments:
        """Return the stripes of one rank."""
        return Segments(self.runs[rank :: self.ranks])


def stripe_bounds(num_blocks: int, ranks: int, most_blocks: int) -> list[int]:
    """Return the first block of every stripe, and at last the number of blocks.

    Stripe s belongs to rank s modulo `ranks`. There are as few rounds as possible, and stripes
    differ by at most one block: no layout takes fewer blocks, one after another.

    Args:
        num_blocks: blocks of the context.
        ranks: context-parallel ranks.
        most_blocks: most blocks of a stripe.
    """
    rounds = -(-num_blocks // (ranks * most_blocks))
    stripes = min(num_blocks, rounds * ranks)
    base, more = divmod(num_blocks, stripes)
    return [stripe * base + min(stripe, more) for stripe in range(stripes + 1)]
