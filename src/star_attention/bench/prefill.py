"""Encoding: Star Attention beside dense attention (stock transformers and ours) and the scheme of the paper's implementation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from star_attention.bench.subject import random_ids
from star_attention.engine import StarLLM
from star_attention.errors import InvalidInputError
from star_attention.planning import cost, estimate
from star_attention.planning.cost import Flops, ModelShape
from star_attention.planning.plan import BlockPlan, format_size, parse_size
from star_attention.tools import machine
from star_attention.tools.baselines import STOCK_BACKENDS, official_encode, stock_prefill
from star_attention.tools.machine import Ceilings, Progress

METHODS = (*STOCK_BACKENDS, "dense", "official", "streaming_llm", "star")
"""In the order of measurement: baselines first."""
_BLOCKED = ("official", "streaming_llm", "star")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one row is of. asked: how the block size was written. extrapolated: it is worked out, not run."""

    method: str
    context: int
    block: int | None = None
    asked: str | None = None
    extrapolated: bool = False

    def __str__(self) -> str:
        block = "" if self.block is None else f", block {format_size(self.block)}"
        return f"{self.method}, context {format_size(self.context)}{block}"


def cases(
    contexts: list[int],
    blocks: list[str],
    methods: list[str],
    *,
    device: str,
    dense_up_to: int | None = None,
) -> list[Case]:
    """Every method at every length, in the order of measurement.

    blocks: of Star Attention and the official scheme, and StreamingLLM's window; sizes, or `/4` for a quarter of the context. A
    block that a context does not hold twice is left out, with a warning. dense_up_to: the longest context at which dense methods
    run; beyond it they are extrapolated.

    Raises `InvalidInputError` for methods and sizes that cannot work, and where nothing is left.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise InvalidInputError(
            f"method {unknown[0]!r} is unknown; choose from {', '.join(METHODS)}"
        )
    if "stock-cudnn" in methods and not device.startswith("cuda"):
        raise InvalidInputError(
            f"method 'stock-cudnn' needs a CUDA device, this is {device}; leave it out"
        )
    found: list[Case] = []
    left_out: list[tuple[int, str]] = []
    for context in sorted(contexts):
        asked = {block_size(one, context): one for one in blocks}
        sizes = sorted((size for size in asked if 2 * size <= context), reverse=True)
        left_out += [(context, one) for size, one in asked.items() if size not in sizes]
        for method in (method for method in METHODS if method in methods):
            if method in _BLOCKED:
                found += [
                    Case(method=method, context=context, block=size, asked=asked[size])
                    for size in sizes
                ]
            else:
                beyond = dense_up_to is not None and context > dense_up_to
                found.append(Case(method=method, context=context, extrapolated=beyond))
    if not found:
        raise InvalidInputError(
            f"nothing is left to measure: no context holds two blocks of {' or '.join(blocks)}; give smaller blocks or longer"
            " contexts"
        )
    for context, one in left_out if set(methods) & set(_BLOCKED) else ():
        warnings.warn(
            f"context {format_size(context)} does not hold two blocks of {one}, which are left out",
            stacklevel=2,
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one length. seconds: median; first_s: of the first run, which compiles if
    others follow. flops: of the method's own work.

    asked: how the block size was written. of_ceiling: the rate over that of a large matrix product. working_bytes: peak memory
    beyond weights and keys and values; None where it is not measured. kv_dtype: how ours keep these. extrapolated: worked out from
    the two longest runs of the method. failed: why there are no numbers.
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
    flops_per_s: float | None = None
    of_ceiling: float | None = None
    working_bytes: int | None = None
    kv_dtype: str | None = None
    extrapolated: bool = False
    failed: str | None = None


def run(
    model: Any,
    shape: ModelShape,
    ceilings: Ceilings,
    cases: list[Case],
    *,
    repeats: int,
    tokens_per_forward: str | None,
    compile: bool | None,
    kv_dtype: str | None = None,
    progress: Progress,
) -> list[Row]:
    """A row for each case.

    repeats: runs after the first one; with 0 that one counts, and a short context goes before it.
    """
    device = next(model.parameters()).device
    rows: list[Row] = []
    for case in cases:
        context, block, method = case.context, case.block, case.method
        plan = (
            BlockPlan.dense(context)
            if block is None
            else BlockPlan.resolve(context, block, None, 1)
        )
        if case.extrapolated:
            rows.append(
                _extrapolated(
                    method, cost.phase1(shape, plan, tokens_per_forward=context), rows, context
                )
            )
            continue
        progress(f"{len(rows) + 1} of {len(cases)}: {case}")
        ids_L = random_ids(model, context)
        work, star = _work(model, method, ids_L, block, tokens_per_forward, compile, kv_dtype)
        if method == "streaming_llm":
            assert star is not None
            plan = star.runtime.plan_for(context)
        flops = _flops(shape, plan, method, star)
        kept = kv_dtype if star is not None and method != "official" else None
        what: dict[str, Any] = dict(
            method=method, context=context, block=block, asked=case.asked, kv_dtype=kept
        )
        if star is not None and not repeats:  # what is compiled is not to count
            star.encode(ids_L[: 2 * star.tokens_per_forward])
        rows.append(
            _measured(
                work,
                device,
                repeats,
                ceilings,
                what,
                flops,
                _fixed(model, shape, plan, method, kept),
            )
        )
    return rows


def block_size(text: str, context: int) -> int:
    """A block size as it may be written: `8k`, or `/4` for that share of the context."""
    if text.startswith("/"):
        if not text[1:].isdecimal() or int(text[1:]) < 1:
            raise InvalidInputError(
                f"block size {text!r} is no share of the context; write /4 for a quarter"
            )
        return max(1, context // int(text[1:]))
    size = parse_size(text, "block_size")
    if size < 1:
        raise InvalidInputError(
            f"block size {text!r} is below 1; give tokens, or /4 for a quarter of the context"
        )
    return size


def _fixed(
    model: Any, shape: ModelShape, plan: BlockPlan, method: str, kv_dtype: str | None
) -> int:
    """Bytes of weights, and of keys and values."""
    weights = int(
        sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    )
    if method == "streaming_llm":
        held = min(plan.context_tokens, plan.anchor_size + plan.block_size)
        return weights + held * shape.kept_bytes_per_token(kv_dtype)
    memory = cost.memory(shape, plan, tokens_per_forward=1, kv_dtype=kv_dtype)
    return weights + memory.kv + memory.anchor


def _extrapolated(method: str, flops: Flops, rows: list[Row], context: int) -> Row:
    """A dense method at a length at which it is not run."""
    row: dict[str, Any] = dict(
        method=method, context=context, block=None, flops=flops.total, extrapolated=True
    )
    row |= dict(kv_dtype=next((one.kv_dtype for one in rows if one.method == method), None))
    runs = [
        one
        for one in rows
        if one.method == method and one.seconds is not None and not one.extrapolated
    ][-2:]
    parts = [
        (Flops(linear=one.linear_flops, attention=one.attention_flops), one.seconds or 0.0)
        for one in runs
    ]
    try:
        matrix, attention = estimate.fitted(parts)
    except InvalidInputError:
        return Row(**row, failed="not two runs to extrapolate from")
    seconds = flops.linear / matrix + flops.attention / attention
    return Row(**row, seconds=seconds, linear_flops=flops.linear, attention_flops=flops.attention)


def _flops(shape: ModelShape, plan: BlockPlan, method: str, star: StarLLM | None) -> Flops:
    if method == "official":
        return cost.phase1_official(shape, plan)
    if method == "streaming_llm":
        return cost.phase1_streaming(shape, plan)
    tokens = plan.context_tokens if star is None else star.tokens_per_forward
    return cost.phase1(shape, plan, tokens_per_forward=tokens)


def _work(
    model: Any,
    method: str,
    ids_L: Tensor,
    block: int | None,
    tokens_per_forward: str | None,
    compile: bool | None,
    kv_dtype: str | None,
) -> tuple[Callable[[], Any], StarLLM | None]:
    """What is timed, and the engine that does it, if one of ours does."""
    if method in STOCK_BACKENDS:
        return (lambda: stock_prefill(model, ids_L, STOCK_BACKENDS[method])), None
    star = StarLLM(
        model,
        block_size=block,
        method="dense" if block is None else method if method == "streaming_llm" else "star",
        tokens_per_forward=tokens_per_forward,
        compile=compile,
        comm="solo",
        kv_dtype=kv_dtype,
    )
    if method == "official":
        plan = BlockPlan.resolve(len(ids_L), block, None, 1)
        return (
            lambda: official_encode(star.runtime.handle, ids_L, plan, star.tokens_per_forward)
        ), star
    return (lambda: star.encode(ids_L)), star


def _measured(
    work: Callable[[], Any],
    device: torch.device,
    repeats: int,
    ceilings: Ceilings,
    what: dict[str, Any],
    flops: Flops,
    fixed_bytes: int,
) -> Row:
    row = what | dict(flops=flops.total, linear_flops=flops.linear, attention_flops=flops.attention)
    try:
        first_s, peak = machine.once_with_peak(work, device)
        seconds = [] if repeats else [first_s]
        for _ in range(repeats):
            one_s, peak = machine.once_with_peak(work, device)
            seconds.append(one_s)
    except machine.OUT_OF_MEMORY:
        return Row(**row, failed="out of memory")
    except RuntimeError as error:  # a kernel that is not there for these shapes
        return Row(**row, failed=str(error).strip().splitlines()[0][:120])
    middle = median(seconds)
    return Row(
        **row,
        seconds=middle,
        all_seconds=tuple(seconds),
        first_s=first_s,
        flops_per_s=flops.total / middle,
        of_ceiling=flops.total / middle / ceilings.flops_per_s,
        working_bytes=None if peak is None else peak - fixed_bytes,
    )


def table(rows: list[Row]) -> list[tuple[str, ...]]:
    """For people; speed-ups are over each dense baseline at the same length."""
    baselines = [
        method for method in (*STOCK_BACKENDS, "dense") if any(row.method == method for row in rows)
    ]
    head = (
        "context",
        "method",
        "block",
        "s",
        "TFLOP/s",
        "of ceiling",
        *(f"x {name}" for name in baselines),
    )
    head = (*head, "of FLOP ratio", "first s", "working GiB")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        method = f"{row.method}, {row.kv_dtype}" if row.kv_dtype else row.method
        if row.extrapolated and row.seconds is not None:
            ends = (f"{row.seconds:,.3g}", *[""] * (len(head) - 4))
            lines.append((format_size(row.context), f"{method}, extrapolated", "", *ends))
            continue
        if row.seconds is None:
            lines.append(
                (
                    format_size(row.context),
                    method,
                    _size(row.block),
                    row.failed or "",
                    *[""] * (len(head) - 4),
                )
            )
            continue
        assert (
            row.flops_per_s is not None and row.of_ceiling is not None and row.first_s is not None
        )
        ratio = flop_ratio_reached(row, rows)
        lines.append(
            (
                *(format_size(row.context), method, _size(row.block), f"{row.seconds:,.3g}"),
                *(f"{row.flops_per_s / 1e12:,.3g}", f"{row.of_ceiling:.2f}"),
                *(_over(speed_up(row, rows, name)) for name in baselines),
                *("" if ratio is None else f"{ratio:.2f}", f"{row.first_s:,.3g}"),
                "" if row.working_bytes is None else f"{row.working_bytes / 2**30:.2f}",
            )
        )
    return lines


def speed_up(row: Row, rows: list[Row], baseline: str) -> float | None:
    """How many times faster than a baseline at the same length; None for itself and where one of them has no time."""
    others = [one for one in rows if one.method == baseline and one.context == row.context]
    other = next(iter(sorted(others, key=lambda one: one.kv_dtype != row.kv_dtype)), None)
    if other is None or other is row or other.seconds is None or row.seconds is None:
        return None
    return other.seconds / row.seconds


def flop_ratio_reached(row: Row, rows: list[Row]) -> float | None:
    """The speed-up over our dense attention (for stock kernels: over the default one) by the ratio of operations."""
    for baseline in ("dense", *STOCK_BACKENDS):
        gained = speed_up(row, rows, baseline)
        other = next(
            (one for one in rows if one.method == baseline and one.context == row.context), None
        )
        if gained is not None and other is not None and row.method in _BLOCKED:
            return gained / (other.flops / row.flops)
    return None


def _size(block: int | None) -> str:
    return "" if block is None else format_size(block)


def _over(factor: float | None) -> str:
    return "" if factor is None else f"{factor:.2f}"


def series(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows of one method, and of a block size as it was asked for, over the lengths; those that have a time."""
    for key in dict.fromkeys(
        (row.method, row.asked, row.kv_dtype) for row in rows if row.seconds is not None
    ):
        some = [
            row
            for row in rows
            if (row.method, row.asked, row.kv_dtype) == key and row.seconds is not None
        ]
        yield name_of(some[0]), sorted(some, key=lambda row: row.context)


def name_of(row: Row) -> str:
    """A method with its settings."""
    block = None if row.asked is None else f"block {row.asked.replace('/', 'length / ')}"
    return ", ".join(part for part in (row.method, block, row.kv_dtype) if part)
