"""The rows of `bench decode`, and their table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from star_attention.bench.ranks import in_short
from star_attention.planning.sizes import format_size
from star_attention.planning.windows import LAST

WHOLE, SLICES, SHARD = "whole", "slices", "shard"
"""Weights that a rank reads for a token: all of them, slices (`slice_weights`), or those that it
holds (`tensor_parallel`)."""


@dataclass(frozen=True, kw_only=True)
class DecodeRow:
    """One length, in one way to compute; times are medians.

    Attributes:
        context: length in tokens.
        block: block size in tokens.
        compiled: True with compiled layers and CUDA graphs.
        queries: number of queries in a batch.
        query_tokens, tokens: length of a query and of an answer.
        ranks: ranks that answer together.
        tensor_parallel: those that share the weights of one model.
        weights: `WHOLE`, `SLICES` or `SHARD`.
        kv_dtype, kv_device, kv_resident, kv_windows: as for `StarLLM`.
        token_s: time per token of an answer through `StarLLM.generate`:
            (time of all tokens - time of one) / (tokens - 1).
        read_bytes: bytes of weights, keys and values that the fullest rank reads for a token.
        floor_s: the same over the copy rate.
        link_bytes: bytes that the fullest rank's GPU reads from host memory for a token.
        link_bytes_per_s: rate of large copies from there; None where there are none.
        ttft_s: time to the first token of a further query on the same context.
        first_s: time of the first query, which compiles and captures.
        encode_s: time to encode the context, in the first row of a context; compiles as well.
        wire_bytes: bytes per token that the ranks exchange, all together.
        peak_bytes: peak device memory of each rank; None where it is not measured.
        failed: the reason if there are no numbers.
    """

    context: int
    block: int
    compiled: bool
    queries: int
    query_tokens: int
    tokens: int
    ranks: int = 1
    tensor_parallel: int = 1
    weights: str = WHOLE
    kv_dtype: str | None = None
    kv_device: str | None = None
    kv_resident: float = 0.0
    kv_windows: str = LAST
    token_s: float | None = None
    read_bytes: int = 0
    floor_s: float = 0.0
    link_bytes: int = 0
    link_bytes_per_s: float | None = None
    ttft_s: float | None = None
    first_s: float | None = None
    encode_s: float | None = None
    wire_bytes: int = 0
    peak_bytes: tuple[int, ...] | None = None
    failed: str | None = None

    @property
    def over_floor(self) -> float | None:
        return None if self.token_s is None else self.token_s / self.floor_s

    @property
    def over_link(self) -> float | None:
        """The time of a token over that of its bytes from host memory."""
        if self.token_s is None or not (self.link_bytes and self.link_bytes_per_s):
            return None
        return self.token_s * self.link_bytes_per_s / self.link_bytes

    @property
    def mesh(self) -> str:
        """The ranks, as context x tensor parallel."""
        return f"{self.ranks // self.tensor_parallel} x {self.tensor_parallel}"

    @property
    def layers(self) -> str:
        return "compiled" if self.compiled else "plain"

    @property
    def label(self) -> str:
        """The way to compute, in words."""
        if self.ranks == 1:
            return self.layers
        if self.tensor_parallel > 1:
            return f"{self.layers}, {self.mesh} ranks"
        return f"{self.layers}, {self.ranks} ranks, weights {self.weights}"


def speed_up(row: DecodeRow, rows: list[DecodeRow]) -> float | None:
    """Return how many times as fast a row is as one rank, in the same way to compute."""
    for other in rows:
        if (
            other.ranks == 1 < row.ranks
            and (other.context, other.compiled, other.queries)
            == (row.context, row.compiled, row.queries)
            and other.token_s is not None
            and row.token_s is not None
        ):
            return other.token_s / row.token_s
    return None


def series(rows: list[DecodeRow]) -> Iterator[tuple[str, list[DecodeRow]]]:
    """Yield the rows that have a time by their way to compute, each by length."""
    groups: dict[str, list[DecodeRow]] = {}
    for row in sorted(rows, key=lambda row: (row.ranks, not row.compiled, row.weights == SLICES)):
        if row.token_s is not None:
            groups.setdefault(row.label, []).append(row)
    for label, group in groups.items():
        yield label, sorted(group, key=lambda row: row.context)


def table(rows: list[DecodeRow]) -> list[tuple[str, ...]]:
    """Return the cells of the table."""
    on_ranks = any(row.ranks > 1 for row in rows)
    by_link = any(row.link_bytes and row.link_bytes_per_s for row in rows)
    header = [
        "context",
        *(["ranks", "weights"] if on_ranks else []),
        "layers",
        "ms per token",
        "floor ms",
        "over floor",
        *(["link MB per token", "link GB/s", "over link"] if by_link else []),
        *(["x one rank"] if on_ranks else []),
        "tok/s",
        "next query s",
        "first query s",
        *(["wire KB per token", "peak GiB"] if on_ranks else []),
    ]
    lines = [_cells(row, rows, on_ranks, by_link) for row in rows]
    return [tuple(line + [""] * (len(header) - len(line))) for line in [header, *lines]]


def _cells(row: DecodeRow, rows: list[DecodeRow], on_ranks: bool, by_link: bool) -> list[str]:
    place = [row.mesh if row.ranks > 1 else "1", row.weights] if on_ranks else []
    start = [format_size(row.context), *place, row.layers]
    if row.token_s is None or row.ttft_s is None or row.first_s is None:
        return [*start, in_short(row.failed)]
    faster = speed_up(row, rows)
    peak = None if row.peak_bytes is None else max(row.peak_bytes) / 2**30
    return [
        *start,
        f"{row.token_s * 1e3:,.3g}",
        f"{row.floor_s * 1e3:,.3g}",
        f"{row.over_floor:.2f}",
        *(_link_cells(row) if by_link else []),
        *(["" if faster is None else f"{faster:.2f}"] if on_ranks else []),
        f"{row.queries / row.token_s:,.0f}",
        f"{row.ttft_s:,.3f}",
        f"{row.first_s:,.3g}",
        *([f"{row.wire_bytes / 1e3:,.4g}"] if on_ranks else []),
        *(["" if peak is None else f"{peak:.1f}"] if on_ranks else []),
    ]


def _link_cells(row: DecodeRow) -> list[str]:
    if row.over_link is None or row.link_bytes_per_s is None:
        return ["", "", ""]
    return [
        f"{row.link_bytes / 1e6:,.4g}",
        f"{row.link_bytes_per_s / 1e9:,.3g}",
        f"{row.over_link:.2f}",
    ]
