"""The plan of a context: the block, rank and forward of each token.

A plan is made of integers, before any tensor exists.

`BlockPlan` cuts a context into blocks (paper, section 2, Algorithm 1), gives each context-parallel
rank a contiguous run of them, or with look-back stripes in turn, and cuts these into forwards.
`print(plan)` draws it. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from star_attention.errors import SizeError, TokenError
from star_attention.planning import html, picture
from star_attention.planning.lookback import (
    ALL,
    described,
    layer_numbers,
    parse_layers,
)
from star_attention.planning.segments import Segments
from star_attention.planning.sizes import check_lookback, counted, format_size, resolve_sizes
from star_attention.planning.stripes import STRIPE_TOKENS, Stripes

LINEAR_PAIRS = 24 * 1024
"""Cost of the linear layers for one token, in query-key pairs that attention computes in that time.

About `parameters / (2 * heads * head_size * layers)`, which is 18K to 53K for Llama models of 1B to
70B parameters.
"""

ANCHOR_SOURCES = ("broadcast", "local")
"""How ranks other than the first get the anchor: rank 0 sends it, or each computes it again."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Consecutive context tokens that go through the model in one forward.

    A span is either whole blocks (full ones, the short last one, or these before it), or a piece of
    a single block.

    Attributes:
        start: first token.
        stop: one after the last token.
        block_start: first token of the block that contains `start`.
    """

    start: int
    stop: int
    block_start: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """A context cut into blocks, and the blocks assigned to ranks; all sizes are in tokens.

    `print(plan)` draws which tokens each block sees.

    Attributes:
        context_tokens: length of the context.
        block_size: tokens of every block but the last, which may be shorter.
        anchor_size: tokens at the start of the context that every block sees; 0 for no anchor.
        ranks: context-parallel ranks.
        lookback: blocks before its own that a block sees in the layers that look back; 0 for none.
        lookback_layers: those layers, in a spelling of `planning.lookback.parse_layers`.
        stripe_tokens: tokens of the stripes that several ranks take in turn where blocks look back,
            at most; a stripe holds at least one block.
        stripes: these stripes; None on one rank, and without look-back.

    Raises:
        TokenError: an empty context.
        SizeError: a block below 1, an anchor below 0 or above the block, fewer than 1 rank, or a
            look-back below 0.
    """

    context_tokens: int
    block_size: int
    anchor_size: int
    ranks: int = 1
    lookback: int = 0
    lookback_layers: str = ALL
    # Plans of equal blocks are equal, whichever rank encodes which block.
    stripe_tokens: int = field(default=STRIPE_TOKENS, compare=False, repr=False)
    stripes: Stripes | None = field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.context_tokens < 1:
            raise TokenError(
                f"the context is empty ({self.context_tokens:,} tokens); Star Attention needs at"
                " least 1 token of context"
            )
        if self.ranks < 1:
            raise SizeError(f"ranks {self.ranks} is below 1; give the number of processes")
        resolve_sizes(self.context_tokens, self.block_size, self.anchor_size)
        check_lookback(self.lookback)
        if parse_layers(self.lookback_layers) != self.lookback_layers:
            object.__setattr__(self, "lookback_layers", parse_layers(self.lookback_layers))
        if self.lookback and self.ranks > 1:
            stripes = Stripes.cut(
                self.context_tokens,
                self.block_size,
                ranks=self.ranks,
                stripe_tokens=self.stripe_tokens,
            )
            object.__setattr__(self, "stripes", stripes)

    @classmethod
    def resolve(
        cls,
        context_tokens: int,
        block_size: int | str | None = None,
        anchor_size: int | str | None = None,
        ranks: int = 1,
        lookback: int = 0,
        lookback_layers: str = ALL,
        stripe_tokens: int = STRIPE_TOKENS,
    ) -> BlockPlan:
        """Return the plan for a context; sizes that are left out are those of `StarConfig`."""
        check_lookback(lookback)
        block, anchor = resolve_sizes(context_tokens, block_size, anchor_size, lookback)
        return cls(
            context_tokens=context_tokens,
            block_size=block,
            anchor_size=anchor,
            ranks=ranks,
            lookback=lookback,
            lookback_layers=lookback_layers,
            stripe_tokens=stripe_tokens,
        )

    @classmethod
    def dense(cls, context_tokens: int, ranks: int = 1) -> BlockPlan:
        """Return the plan of one block with the whole context: dense attention (law 1)."""
        return cls(
            context_tokens=context_tokens,
            block_size=max(1, context_tokens),
            anchor_size=0,
            ranks=ranks,
        )

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return -(-self.context_tokens // self.block_size)

    @property
    def is_dense(self) -> bool:
        """True if one block holds the whole context."""
        return self.num_blocks == 1

    def lookbacks(self, num_layers: int) -> list[int]:
        """Return how many blocks each of a model's layers looks back.

        Raises:
            InvalidInputError: a layer that looks back does not exist.
        """
        if not self.lookback:
            return [0] * num_layers
        looking_back = layer_numbers(self.lookback_layers, num_layers)
        return [self.lookback if layer in looking_back else 0 for layer in range(num_layers)]

    def first_seen(self, block_start: int, lookback: int, window: int | None = None) -> int:
        """Return the first token of the run that ends with a block, and that the block sees.

        Args:
            block_start: first token of the block.
            lookback: blocks before it that the layer looks back.
            window: sliding window of the layer in tokens, None for full attention. A run that would
                begin inside the anchor begins with it.
        """
        tokens = lookback * self.block_size
        first = block_start - (tokens if window is None else min(tokens, window - 1))
        return first if first >= self.anchor_size else 0

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """`(start, stop)` of every block, in order."""
        return [
            (start, min(start + self.block_size, self.context_tokens))
            for start in range(0, self.context_tokens, self.block_size)
        ]

    def rank_blocks(self, rank: int) -> list[tuple[int, int]]:
        """Return the blocks of one rank: a contiguous run, or with look-back stripes in turn.

        Runs differ by at most one block, and are chosen to give the busiest rank the least work.
        """
        if self.stripes is not None:
            own = self.stripes.of_rank(rank)
            return [block for block in self.blocks if own.holds(block[0])]
        first = sum(self._counts[:rank])
        return self.blocks[first : first + self._counts[rank]]

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        """Number of blocks on each rank."""
        base, more = divmod(self.num_blocks, self.ranks)
        if not base:
            return (1,) * more + (0,) * (self.ranks - more)
        # Where the blocks do not divide evenly, one more suits the first rank, whose first block
        # has no anchor to attend to, and the last rank, if the last block is short.
        layouts = []
        for head, tail in ((1, 0), (0, 0), (1, 1), (0, 1)):
            middle = more - head - tail
            if self.ranks > 1 and 0 <= middle <= self.ranks - 2:
                counts = [head, *(1,) * middle, *(0,) * (self.ranks - 2 - middle), tail]
                layouts.append(tuple(base + extra for extra in counts))
        return min(
            layouts or [(base,)], key=lambda counts: sorted(self._costs(counts), reverse=True)
        )

    def _costs(self, counts: tuple[int, ...]) -> list[int]:
        """Return the work of each rank in pairs, for `counts` blocks per rank."""
        costs, first = [], 0
        for count in counts:
            own = self.blocks[first : first + count]
            costs.append(sum(self._cost(start, stop) for start, stop in own))
            first += count
        return costs

    def _cost(self, start: int, stop: int) -> int:
        tokens = stop - start
        return tokens * (LINEAR_PAIRS + (tokens + 1) // 2 + (self.anchor_size if start else 0))

    def rank_range(self, rank: int) -> tuple[int, int]:
        """Return `(start, stop)` of the context tokens of one rank; empty if it holds no block.

        Of stripes, other ranks hold what lies between.
        """
        blocks = self.rank_blocks(rank)
        if not blocks:
            return self.context_tokens, self.context_tokens
        return blocks[0][0], blocks[-1][1]

    def rank_tokens(self, rank: int) -> int:
        """Return the number of context tokens of one rank."""
        return self.layout[rank].tokens

    @property
    def layout(self) -> tuple[Segments, ...]:
        """The context tokens that each rank holds."""
        if self.stripes is not None:
            return tuple(self.stripes.of_rank(rank) for rank in range(self.ranks))
        ranges = [self.rank_range(rank) for rank in range(self.ranks)]
        return tuple(Segments([(start, stop)] if start < stop else []) for start, stop in ranges)

    @property
    def busy_ranks(self) -> int:
        """Number of ranks that hold a block; these are the first ones."""
        return min(self.ranks, self.num_blocks)

    def spans(
        self, tokens_per_forward: int, *, rank: int = 0, run: tuple[int, int] | None = None
    ) -> Iterator[Span]:
        """Yield the forwards of one rank's phase 1.

        A forward takes several small blocks, or a piece of a block larger than
        `tokens_per_forward`, so that working memory depends on `tokens_per_forward` alone. A
        shorter last block joins the blocks before it where they are the only forward, or a shorter
        one than the others. A stripe is a forward of any size, and a short last block one of its
        own: other ranks read a stripe's blocks, and could not begin before a last piece has ended.

        Args:
            tokens_per_forward: most tokens of a forward.
            rank: context-parallel rank.
            run: one of the runs that a rank holds, in place of all that `rank` holds.
        """
        for start, stop in self.layout[rank] if run is None else [run]:
            most = tokens_per_forward if self.stripes is None else stop - start
            yield from self._spans(start, stop, most)

    def between(self, start: int, stop: int, tokens_per_forward: int) -> Iterator[Span]:
        """Yield the forwards of the tokens `start..stop`, to extend or edit a context."""
        return self._spans(start, stop, tokens_per_forward)

    def _spans(self, position: int, stop: int, tokens_per_forward: int) -> Iterator[Span]:
        first, most = position, tokens_per_forward // self.block_size * self.block_size
        full_blocks_end = self.context_tokens // self.block_size * self.block_size
        while position < stop:
            offset = position % self.block_size
            tokens = 0
            if not offset:
                whole = min(stop, full_blocks_end) - position
                tokens = min(whole, most) // self.block_size * self.block_size
                # Forwards of the usual length stay so: they are compiled for it.
                is_usual = tokens == most and position > first
                rest = stop - position
                if tokens == whole < rest <= tokens_per_forward and not is_usual:
                    tokens = rest if self.stripes is None else tokens
            # No whole block fits: take a piece of one, or the shorter last block.
            if not tokens:
                tokens = min(self.block_size - offset, stop - position, tokens_per_forward)
            yield Span(start=position, stop=position + tokens, block_start=position - offset)
            position += tokens

    def __str__(self) -> str:
        head = (
            f"context {self.context_tokens:,} tok,"
            f" {counted(self.num_blocks, 'block')} x {format_size(self.block_size)},"
            f" anchor {format_size(self.anchor_size)}, {counted(self.ranks, 'rank')}"
        )
        if self.lookback:
            head += f", look-back {described(self.lookback, self.lookback_layers)}"
        return head + "\n" + self.draw()

    def _repr_html_(self) -> str:
        """Return the picture for a notebook."""
        return html.preformatted(str(self))

    def _owners(self) -> list[int]:
        """Return the rank of each block."""
        ranks = {block: rank for rank in range(self.ranks) for block in self.rank_blocks(rank)}
        return [ranks[block] for block in self.blocks]

    def draw(self, width: int = 72) -> str:
        """Draw one line per block, context from left to right.

        `A` is the anchor, `#` the block's own tokens, `+` tokens that it sees in the layers that
        look back, `.` tokens that it does not see. Of more than 16 blocks, the middle ones are left
        out, with a note.

        Args:
            width: columns of the picture.
        """
        return picture.draw(
            self._owners(),
            self.blocks,
            self.anchor_size,
            width,
            self.lookback,
        )


def without_lookback(plan: BlockPlan) -> BlockPlan:
    """Return the paper's plan with the same blocks; the anchor is a whole block then."""
    if not plan.lookback:
        return plan
    return BlockPlan.resolve(plan.context_tokens, plan.block_size, ranks=plan.ranks)
