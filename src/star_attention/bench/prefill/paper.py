"""Speed-ups over ring attention on the same ranks, next to the paper's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from star_attention.bench.prefill.rows import PrefillRow, speed_up
from star_attention.planning import published
from star_attention.planning.published import PublishedSpeedUp
from star_attention.planning.sizes import format_size

THE_PAPERS, BALANCED = "ring-contiguous", "ring"
"""Ring attention as the paper ran it, and in the layout in which all ranks do the same work."""
_HEADER = (
    "context",
    "ranks",
    "block",
    "the paper: star over ring",
    "official over the paper's ring",
    "star over the paper's ring",
    "star over the balanced ring",
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Speed-ups of one length, block size and number of ranks; None where a time is missing."""

    context: int
    ranks: int
    block: int
    official: float | None
    star: float | None
    star_over_balanced: float | None

    @property
    def published(self) -> PublishedSpeedUp | None:
        return published.speed_up(self.context)


def compare(rows: list[PrefillRow]) -> Iterator[Comparison]:
    """Yield the comparisons that rows on several ranks allow, by length, ranks and block."""
    cases = {
        (row.context, row.ranks, row.block)
        for row in rows
        if row.ranks > 1 and row.block is not None and row.tensor_parallel == 1
    }
    for context, ranks, block in sorted(
        cases, key=lambda case: (case[0], case[1], -(case[2] or 0))
    ):
        group = {
            row.method: row
            for row in rows
            if (row.context, row.ranks, row.tensor_parallel) == (context, ranks, 1)
            and row.block in (None, block)
        }

        def over(method: str, baseline: str, group: dict[str, PrefillRow] = group) -> float | None:
            row = group.get(method)
            return None if row is None else speed_up(row, list(group.values()), baseline)

        yield Comparison(
            context=context,
            ranks=ranks,
            block=block or 0,
            official=over("official", THE_PAPERS),
            star=over("star", THE_PAPERS),
            star_over_balanced=over("star", BALANCED),
        )


def table(rows: list[PrefillRow]) -> list[tuple[str, ...]]:
    """Return the cells of a table of all comparisons, empty if there are none."""
    lines = [
        (
            format_size(row.context),
            str(row.ranks),
            format_size(row.block),
            _published(row.published),
            *(
                "" if factor is None else f"{factor:.2f}"
                for factor in (row.official, row.star, row.star_over_balanced)
            ),
        )
        for row in compare(rows)
        if row.official or row.star or row.star_over_balanced
    ]
    return [_HEADER, *lines] if lines else []


def _published(row: PublishedSpeedUp | None) -> str:
    if row is None:
        return ""
    return f"{row.speed_up} (Table {row.table}: {row.workers} workers, {format_size(row.block)})"
