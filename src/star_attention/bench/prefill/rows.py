"""The rows of `bench prefill`: speed-ups, extrapolation, and the table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from star_attention.bench.prefill.contenders import BASELINES, CONTENDERS, OURS_FIRST
from star_attention.bench.ranks import in_short
from star_attention.errors import InvalidInputError
from star_attention.planning.cost import Flops
from star_attention.planning.hardware import fit_rates
from star_attention.planning.sizes import format_size


@dataclass(frozen=True, kw_only=True)
class PrefillRow:
    """One method at one length.

    Attributes:
        method: a name in `CONTENDERS`.
        context: length in tokens.
        block: block size in tokens; None for dense methods.
        asked: the block size as the user wrote it.
        seconds: the median.
        all_seconds: every run but the first, unless that is the only one.
        first_s: the first run, which compiles if others follow.
        ranks: ranks that shared the work.
        tensor_parallel: those that shared the weights.
        flops: operations that the method needs, on all ranks together.
        linear_flops, attention_flops: the parts of it that extrapolation needs.
        busiest_flops: operations of the busiest rank.
        helped_layers: layers that rank 0 computed for each of the other ranks that it helped.
        flops_per_s: its rate.
        of_ceiling: the rate relative to that of a large matrix product.
        working_bytes: peak memory of a rank beyond weights, keys and values; None where it is not
            measured.
        peak_bytes: peak memory of each rank.
        wire_bytes: bytes that the ranks exchanged, all together.
        kv_dtype: precision of the stored keys and values, if it is not the model's.
        anchor: anchor size in tokens, if it was given.
        extrapolated: True if the time is computed from the method's two longest runs.
        failed: the reason if there are no numbers.
    """

    method: str
    context: int
    block: int | None
    asked: str | None = None
    seconds: float | None = None
    all_seconds: tuple[float, ...] = ()
    first_s: float | None = None
    flops: int = 0
    linear_flops: int = 0
    attention_flops: int = 0
    busiest_flops: int = 0
    helped_layers: tuple[int, ...] = ()
    flops_per_s: float | None = None
    of_ceiling: float | None = None
    working_bytes: int | None = None
    peak_bytes: tuple[int, ...] | None = None
    wire_bytes: int = 0
    ranks: int = 1
    tensor_parallel: int = 1
    kv_dtype: str | None = None
    anchor: int | None = None
    extrapolated: bool = False
    failed: str | None = None

    @property
    def label(self) -> str:
        """The method and its settings."""
        block = None if self.asked is None else f"block {self.asked.replace('/', 'length / ')}"
        anchor = None if self.anchor is None else f"anchor {format_size(self.anchor)}"
        parts = (self.method, block, anchor, self.kv_dtype, self.mesh)
        return ", ".join(part for part in parts if part)

    @property
    def mesh(self) -> str:
        """The ranks in words, "" for one."""
        if self.ranks == 1:
            return ""
        if self.tensor_parallel == 1:
            return f"{self.ranks} ranks"
        return f"{self.ranks // self.tensor_parallel} x {self.tensor_parallel} ranks"


def speed_up(row: PrefillRow, rows: list[PrefillRow], baseline: str) -> float | None:
    """Return how many times faster a row is than a baseline at the same length.

    The baseline is on as many ranks, or on one rank if it runs on one only. None for the baseline
    itself, and where one of the two has no time.
    """
    alone = CONTENDERS[baseline].needs_solitude
    baselines = [
        other
        for other in rows
        if _is(other, baseline, row.context) and (alone or other.ranks == row.ranks)
    ]
    other = min(baselines, key=lambda other: other.kv_dtype != row.kv_dtype, default=None)
    if other is None or other is row or other.seconds is None or row.seconds is None:
        return None
    return other.seconds / row.seconds


def speed_up_over_one_rank(row: PrefillRow, rows: list[PrefillRow]) -> float | None:
    """Return how many times faster a row is than the same work on one rank."""
    for other in rows:
        same = replace(other, ranks=row.ranks, tensor_parallel=row.tensor_parallel).label
        if other.ranks == 1 < row.ranks and other.context == row.context and same == row.label:
            return other.seconds / row.seconds if other.seconds and row.seconds else None
    return None


def flop_ratio_reached(row: PrefillRow, rows: list[PrefillRow]) -> float | None:
    """Return the speed-up of a block method relative to the ratio of operations.

    The baseline is this library's dense attention, or without it transformers' own.
    """
    if not CONTENDERS[row.method].takes_block or row.ranks > 1:
        return None
    for baseline in OURS_FIRST:
        faster = speed_up(row, rows, baseline)
        other = next((other for other in rows if _is(other, baseline, row.context)), None)
        if faster is not None and other is not None:
            return faster / (other.flops / row.flops)
    return None


def _is(row: PrefillRow, method: str, context: int) -> bool:
    return row.method == method and row.context == context


def series(rows: list[PrefillRow]) -> Iterator[tuple[str, list[PrefillRow]]]:
    """Yield the rows that have a time by method and settings, each with its label, by length."""
    groups: dict[tuple[str, int], list[PrefillRow]] = {}
    for row in rows:
        if row.seconds is not None:
            groups.setdefault((row.label, row.ranks), []).append(row)
    for group in groups.values():
        yield group[0].label, sorted(group, key=lambda row: row.context)


def extrapolate(row: PrefillRow, flops: Flops, rows: list[PrefillRow]) -> PrefillRow:
    """Compute the time of a dense method at a length from its two longest runs.

    Args:
        row: method, length and ranks.
        flops: operations of dense attention at that length.
        rows: what has been measured.
    """
    runs = [
        run
        for run in rows
        if (run.method, run.ranks) == (row.method, row.ranks) and not run.extrapolated
    ]
    row = replace(
        row,
        flops=flops.total,
        kv_dtype=next((run.kv_dtype for run in runs), None),
        extrapolated=True,
    )
    samples = [
        (Flops(linear=run.linear_flops, attention=run.attention_flops), run.seconds)
        for run in runs
        if run.seconds is not None
    ]
    try:
        linear_rate, attention_rate = fit_rates(samples[-2:])
    except InvalidInputError:
        return replace(row, failed="not two runs to extrapolate from")
    return replace(
        row,
        seconds=flops.linear / linear_rate + flops.attention / attention_rate,
        linear_flops=flops.linear,
        attention_flops=flops.attention,
    )


def table(rows: list[PrefillRow]) -> list[tuple[str, ...]]:
    """Return the cells of the table; its speed-ups are over each dense baseline in `rows`."""
    baselines = [name for name in BASELINES if any(row.method == name for row in rows)]
    on_ranks = any(row.ranks > 1 for row in rows)
    header = [
        "context",
        "method",
        "block",
        *(["ranks"] if on_ranks else []),
        "s",
        "TFLOP/s a rank" if on_ranks else "TFLOP/s",
        "of ceiling",
        *(["x one rank"] if on_ranks else []),
        *(f"x {name}" for name in baselines),
        "speed-up / FLOP ratio",
        "first s",
        "working GiB",
        *(["wire MB"] if on_ranks else []),
    ]
    lines = [_cells(row, rows, baselines, on_ranks) for row in rows]
    return [tuple(line + [""] * (len(header) - len(line))) for line in [header, *lines]]


def _cells(
    row: PrefillRow, rows: list[PrefillRow], baselines: list[str], on_ranks: bool
) -> list[str]:
    method = f"{row.method}, {row.kv_dtype}" if row.kv_dtype else row.method
    context, block = format_size(row.context), "" if row.block is None else format_size(row.block)
    ranks = [row.mesh.removesuffix(" ranks") or "1"] if on_ranks else []
    if row.seconds is None:
        return [context, method, block, *ranks, in_short(row.failed)]
    seconds = f"{row.seconds:,.3g}"
    if row.extrapolated:
        return [context, f"{method}, extrapolated", block, *ranks, seconds]
    working_gib = None if row.working_bytes is None else row.working_bytes / 2**30
    return [
        context,
        method,
        block,
        *ranks,
        seconds,
        "" if row.flops_per_s is None else f"{row.flops_per_s / 1e12:,.3g}",
        _ratio(row.of_ceiling),
        *([_ratio(speed_up_over_one_rank(row, rows))] if on_ranks else []),
        *(_ratio(speed_up(row, rows, name)) for name in baselines),
        _ratio(flop_ratio_reached(row, rows)),
        "" if row.first_s is None else f"{row.first_s:,.3g}",
        _ratio(working_gib),
        *([f"{row.wire_bytes / 1e6:,.4g}" if row.wire_bytes else ""] if on_ranks else []),
    ]


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
