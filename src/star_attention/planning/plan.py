"""Who holds which tokens, decided in integers before any tensor exists.

`BlockPlan` cuts a context into blocks (paper, section 2, Algorithm 1), gives each rank a contiguous run of them, and cuts
a rank's run into forwards. `print(plan)` draws it. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from star_attention.errors import SizeError, TokenError
from star_attention.planning.segments import Segments

MIN_BLOCK_SIZE = 1024
MAX_BLOCK_SIZE = 32768

LINEAR_PAIRS = 24 * 1024
"""What the linear layers cost for one token, in pairs of a query and a key that attention could compute instead: about
`parameters / (2 * heads * head_size * layers)`, which is 18K to 53K for Llama models of 1B to 70B parameters."""

_UNITS = {"k": 1024, "m": 1024**2, "g": 1024**3}


def parse_size(text: str | int, name: str = "size") -> int:
    """A number of tokens from `4096`, `"4096"`, `"4k"`, `"128K"` or `"1m"` (units are powers of 1024).

    Raises `SizeError` for anything else; zero and negative numbers pass, so that callers can say what they need.
    """
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise SizeError(
            f"{name} {text!r} is not a number of tokens; write 4096, '4k', '128k' or '1m'"
        )
    if isinstance(text, int):
        return text
    digits, unit = text.strip().lower(), 1
    if digits and digits[-1] in _UNITS:
        digits, unit = digits[:-1], _UNITS[digits[-1]]
    try:
        number = float(digits) if "." in digits else int(digits)
        tokens = number * unit
        if tokens != int(tokens):
            raise ValueError(text)
        return int(tokens)
    except (ValueError, OverflowError):
        raise SizeError(
            f"{name} {text!r} is not a number of tokens; write 4096, '4k', '128k' or '1m'"
        ) from None


def format_size(tokens: int) -> str:
    """`16384` as `16k`, `1048576` as `1m`, and what is no multiple of 1024 with thousands separators."""
    for suffix, unit in (("m", 1024**2), ("k", 1024)):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{suffix}"
    return f"{tokens:,}"


def counted(number: int, noun: str) -> str:
    """`1 block`, `2,048 blocks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def default_block_size(context_tokens: int) -> int:
    """The paper's rule: the smallest power of two that is at least a quarter of the context, within 1024..32768.

    Source: arXiv 2411.17116, section 3 (block = a quarter of the sequence up to 128K, fixed at 32K beyond).
    """
    size = MIN_BLOCK_SIZE
    while size * 4 < context_tokens and size < MAX_BLOCK_SIZE:
        size *= 2
    return size


def resolve_sizes(
    context_tokens: int, block_size: int | str | None, anchor_size: int | str | None
) -> tuple[int, int]:
    """Block and anchor size in tokens for a context of `context_tokens`; `None` takes the default rule.

    Raises `SizeError` for sizes that are not numbers, a block below 1, an anchor below 0 or above the block.
    """
    block = (
        default_block_size(context_tokens)
        if block_size is None
        else parse_size(block_size, "block_size")
    )
    if block < 1:
        raise SizeError(
            f"block_size {block} is below 1; give a positive number of tokens, or leave it out for the paper's rule"
        )
    anchor = block if anchor_size is None else parse_size(anchor_size, "anchor_size")
    if anchor < 0:
        raise SizeError(
            f"anchor_size {anchor} is negative; give 0 (no anchor) to block_size {block}, or leave it out for the block size"
        )
    if anchor > block:
        raise SizeError(
            f"anchor_size {anchor} is above block_size {block}: the anchor is the head of the first block;"
            f" lower anchor_size to at most {block} or raise block_size"
        )
    return block, anchor


ANCHOR_SOURCES = ("broadcast", "local")
"""How ranks other than the first get the anchor: rank 0 sends it, or each computes it again."""

RING_LAYOUTS = ("zigzag", "contiguous")
"""How ring attention assigns tokens to ranks, see `ring_layout`."""


def ring_layout(
    context_tokens: int, ranks: int, kind: str = RING_LAYOUTS[0]
) -> tuple[Segments, ...]:
    """Which tokens each rank has in ring attention.

    "zigzag" cuts the context into two runs a rank and gives rank r the r-th from the front and the r-th from the back, so that
    causal attention is the same work for all; "contiguous" gives each one run. A context of fewer than two tokens a rank stays
    on the first.
    """
    if context_tokens < 2 * ranks:
        return (Segments.prefix(context_tokens), *(Segments(),) * (ranks - 1))
    runs = ranks if kind == "contiguous" else 2 * ranks
    cuts = [run * context_tokens // runs for run in range(runs + 1)]
    cut = [(start, stop) for start, stop in pairwise(cuts)]
    if ranks == 1:
        return (Segments.prefix(context_tokens),)
    if kind == "contiguous":
        return tuple(Segments([run]) for run in cut)
    return tuple(Segments([cut[rank], cut[-1 - rank]]) for rank in range(ranks))


@dataclass(frozen=True, kw_only=True)
class Span:
    """Consecutive context tokens `[start, stop)` that go through the model in one forward.

    Either whole blocks of one size (`stop - start` a multiple of the block, or one short last block), or a piece of a
    single block. `block_start` is where the first token's block begins.
    """

    start: int
    stop: int
    block_start: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """A context of `context_tokens` cut into blocks over `ranks`; sizes in tokens, resolved, never None.

    Raises `TokenError` for an empty context and `SizeError` for sizes that cannot work.
    """

    context_tokens: int
    block_size: int
    anchor_size: int
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.context_tokens < 1:
            raise TokenError(
                f"the context is empty ({self.context_tokens:,} tokens); Star Attention needs at least 1 token of context"
            )
        if self.ranks < 1:
            raise SizeError(f"ranks {self.ranks} is below 1; give the number of processes")
        resolve_sizes(self.context_tokens, self.block_size, self.anchor_size)

    @classmethod
    def resolve(
        cls,
        context_tokens: int,
        block_size: int | str | None = None,
        anchor_size: int | str | None = None,
        ranks: int = 1,
    ) -> BlockPlan:
        """The plan for a context, with the paper's rule where a size is None."""
        block, anchor = resolve_sizes(context_tokens, block_size, anchor_size)
        return cls(context_tokens=context_tokens, block_size=block, anchor_size=anchor, ranks=ranks)

    @classmethod
    def dense(cls, context_tokens: int, ranks: int = 1) -> BlockPlan:
        """One block holding the whole context: ordinary dense attention (law 1)."""
        return cls(
            context_tokens=context_tokens,
            block_size=max(1, context_tokens),
            anchor_size=0,
            ranks=ranks,
        )

    @property
    def num_blocks(self) -> int:
        return -(-self.context_tokens // self.block_size)

    @property
    def is_dense(self) -> bool:
        return self.num_blocks == 1

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """`(start, stop)` of every block, in order; only the last may be shorter than `block_size`."""
        return [
            (start, min(start + self.block_size, self.context_tokens))
            for start in range(0, self.context_tokens, self.block_size)
        ]

    def rank_blocks(self, rank: int) -> list[tuple[int, int]]:
        """The blocks of one rank: contiguous runs that differ by one block at most, so that the busiest rank has least to do.

        Where the blocks do not divide, the first rank is a good place for one more, because the first block has no anchor
        to look at, and the last rank is one, where the last block is short.
        """
        first = sum(self._counts[:rank])
        return self.blocks[first : first + self._counts[rank]]

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        base, more = divmod(self.num_blocks, self.ranks)
        if not base:
            return (1,) * more + (0,) * (self.ranks - more)
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
        """Work of each rank in pairs, with so many blocks a rank."""
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
        """`[start, stop)` of the context tokens held by one rank; empty when it holds no block."""
        mine = self.rank_blocks(rank)
        return (mine[0][0], mine[-1][1]) if mine else (self.context_tokens, self.context_tokens)

    @property
    def layout(self) -> tuple[Segments, ...]:
        """What each rank keeps."""
        ranges = [self.rank_range(rank) for rank in range(self.ranks)]
        return tuple(Segments([(start, stop)] if start < stop else []) for start, stop in ranges)

    @property
    def busy_ranks(self) -> int:
        """Ranks that hold a block: the first so many."""
        return min(self.ranks, self.num_blocks)

    def spans(self, tokens_per_forward: int, *, rank: int = 0) -> Iterator[Span]:
        """The forwards of one rank's phase 1, at most `tokens_per_forward` tokens each.

        Small blocks go several to a forward; a block that is larger than a forward is cut into pieces, so that working
        memory depends on `tokens_per_forward` alone. The ragged last block is a forward of its own, because the blocks
        of one forward are computed as a batch.
        """
        return self._spans(*self.rank_range(rank), tokens_per_forward)

    def from_token(self, start: int, tokens_per_forward: int) -> Iterator[Span]:
        """The forwards of everything from token `start` on, whoever holds it: for a context that grows."""
        return self._spans(start, self.context_tokens, tokens_per_forward)

    def _spans(self, position: int, stop: int, tokens_per_forward: int) -> Iterator[Span]:
        while position < stop:
            into = position % self.block_size
            whole = (
                0
                if into
                else min(stop, self.context_tokens - self.context_tokens % self.block_size)
                - position
            )
            tokens = min(whole, tokens_per_forward) // self.block_size * self.block_size
            if not tokens:
                tokens = min(self.block_size - into, stop - position, tokens_per_forward)
            yield Span(start=position, stop=position + tokens, block_start=position - into)
            position += tokens

    def __str__(self) -> str:
        head = (
            f"context {self.context_tokens:,} tok, {counted(self.num_blocks, 'block')} x {format_size(self.block_size)},"
            f" anchor {format_size(self.anchor_size)}, {counted(self.ranks, 'rank')}"
        )
        return head + "\n" + self.draw()

    def draw(self, width: int = 72) -> str:
        """The blocks as a picture: one line a block, `A` anchor, `#` own tokens, `.` not seen; context left to right.

        More than 16 blocks are drawn with the middle left out (and said so).
        """
        scale = width / self.context_tokens
        owner = [rank for rank in range(self.ranks) for _ in self.rank_blocks(rank)]
        lines = []
        shown = list(range(self.num_blocks))
        if len(shown) > 16:
            shown = [*shown[:8], -1, *shown[-7:]]
        for index in shown:
            if index < 0:
                lines.append(f"{'':>10}  ... {self.num_blocks - 15} more blocks ...")
                continue
            start, stop = self.blocks[index]
            row = []
            for column in range(width):
                token = int((column + 0.5) / scale)
                own = start <= token < stop or int(start * scale) == column
                row.append(
                    "A"
                    if token < self.anchor_size and index > 0 and not own
                    else "#"
                    if own
                    else "."
                )
            lines.append(f"rank {owner[index]:<2} b{index:<3} |{''.join(row)}| {start:,}..{stop:,}")
        lines.append(f"{'query':>10} |{'#' * width}| sees everything")
        return "\n".join(lines)
