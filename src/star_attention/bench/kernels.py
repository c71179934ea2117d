"""Attention kernels one by one, in the shapes of both phases: rates beside the ceilings, for every kernel that can run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from star_attention.attention import kernels
from star_attention.attention.attend import Rule, attend
from star_attention.attention.kernels import Call
from star_attention.attention.state import State, merge
from star_attention.errors import InvalidInputError
from star_attention.planning.cost import AttentionShape
from star_attention.planning.plan import format_size
from star_attention.tools import machine
from star_attention.tools.machine import Ceilings, Progress

_CAPACITY, _TAIL = 512, 256
_CALLS = 8  # of a kernel between two looks at the clock


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kernel on one call: seconds (median), operations or bytes, and the rate over the ceiling that bounds it."""

    what: str
    kernel: str
    seconds: float
    flops: int = 0
    bytes: int = 0
    of_ceiling: float = 0.0


def run(
    shape: AttentionShape,
    hidden_size: int,
    ceilings: Ceilings,
    device: torch.device,
    dtype: torch.dtype,
    *,
    blocks: list[int],
    contexts: list[int],
    repeats: int,
    progress: Progress,
) -> list[Row]:
    """Phase 1's two calls for each block size, phase 2's for each context length, merging, and one row's linear layer.

    Raises `InvalidInputError` for a model whose keys and values differ in size.
    """
    if shape.k_head_size != shape.v_head_size:
        raise InvalidInputError(
            "kernels are measured for models whose keys and values have one size"
        )
    H, G, D = shape.heads, shape.kv_heads, shape.k_head_size
    rows: list[Row] = []

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(dtype)

    def measure(
        what: str, kernel: str, work: Callable[[], Any], flops: int = 0, bytes: int = 0
    ) -> None:
        progress(f"{what}, {kernel}")
        seconds = median(_timed(work, repeats, device))
        floor_s = max(flops / ceilings.flops_per_s, bytes / ceilings.bytes_per_s)
        rows.append(
            Row(
                what=what,
                kernel=kernel,
                seconds=seconds,
                flops=flops,
                bytes=bytes,
                of_ceiling=floor_s / seconds,
            )
        )

    for block in blocks:
        q, k, v = random(1, block, H, D), random(1, block, G, D), random(1, block, G, D)
        size = format_size(block)
        for causal, what in (
            (True, f"a block of {size}"),
            (False, f"{size} over an anchor of {size}"),
        ):
            pairs = block * (block + 1) // 2 if causal else block * block
            for name in _able(device, dtype, block, block, shape, causal):
                offset = 0 if causal else block
                work = _attends(q, k, v, D, offset, name)
                measure(what, name, work, flops=shape.flops_per_pair * pairs)
        a, b = (
            State(random(1, block, H, D), torch.randn(1, block, H, device=device)) for _ in range(2)
        )
        moved = 3 * a.out_BQHD.numel() * a.out_BQHD.element_size()
        measure(f"merging {size}", "ours", partial(merge, [a, b], dtype=dtype), bytes=moved)
    for context in contexts:
        q, k, v = random(1, 1, H, D), random(1, G, context, D), random(1, G, context, D)
        what, moved = f"a token over {format_size(context)}", 2 * k.numel() * k.element_size()
        by_token = k.transpose(1, 2), v.transpose(1, 2)
        for name in _able(device, dtype, 1, context, shape, causal=False):
            measure(what, name, _attends(q, *by_token, D, context, name), bytes=moved)
        if kernels.triton_works(device):
            measure(what, "triton", _answers(q, k, v, random, G, D), bytes=moved)
    weight, x = random(4 * hidden_size, hidden_size), random(1, 1, hidden_size)
    moved = weight.numel() * weight.element_size()
    what = f"one row, {hidden_size} to {4 * hidden_size}"
    measure(what, "torch", lambda: linear(x, weight), bytes=moved)
    if kernels.triton_works(device):
        from star_attention.attention.kernels import triton_row

        measure(what, "triton", lambda: triton_row.linear(x, weight, None), bytes=moved)
    return rows


def _timed(work: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    """Seconds of a call; on a GPU without what Python takes for it, which is more than a short kernel does."""
    if device.type != "cuda":
        return machine.timed(work, repeats=repeats, device=device)
    work()  # (what is compiled, or loaded, at first use)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        for _ in range(_CALLS):
            work()
    return [
        seconds / _CALLS for seconds in machine.timed(graph.replay, repeats=repeats, device=device)
    ]


def _able(
    device: torch.device,
    dtype: torch.dtype,
    queries: int,
    keys: int,
    shape: AttentionShape,
    causal: bool,
) -> Iterator[str]:
    """Kernels that can run a call, without the one of plain matrix products where there are others."""
    call = Call(
        device=device.type,
        dtype=dtype,
        queries=queries,
        keys=keys,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_size=shape.k_head_size,
        causal=causal,
    )
    able = [name for name in kernels.KERNELS if not kernels.load(name).unsupported(call)]
    yield from [name for name in able if name != "math"] or able


def _attends(
    q: Tensor, k: Tensor, v: Tensor, size: int, offset: int, name: str
) -> Callable[[], State]:
    rule = Rule(scale=size**-0.5)
    return lambda: attend(q, k, v, rule=rule, offset=offset, kernel=name)


def _answers(
    q: Tensor, k: Tensor, v: Tensor, random: Callable[..., Tensor], kv_heads: int, size: int
) -> Callable[[], State]:
    """Our kernel for phase 2, with a tail of an answer's length."""
    from star_attention.attention.kernels import triton_answer

    tail_k, tail_v = random(1, kv_heads, _CAPACITY, size), random(1, kv_heads, _CAPACITY, size)
    held = (k, v, tail_k, tail_v)
    table = triton_answer.addresses([held]).to(q.device)
    lengths = torch.tensor([k.shape[2], _TAIL, _CAPACITY], device=q.device)
    padding_R = torch.zeros(1, dtype=torch.int32, device=q.device)

    def work(
        held: tuple[Tensor, ...] = held,
    ) -> State:  # (which must live as long as their addresses)
        return triton_answer.attend(
            q,
            kv_heads,
            table=table,
            lengths=lengths,
            padding_R=padding_R,
            layer=0,
            scale=size**-0.5,
            dtype=q.dtype,
        )

    return work


def table(rows: list[Row]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("call", "kernel", "ms", "TFLOP/s", "TB/s", "of ceiling")]
    for row in rows:
        lines.append(
            (
                *(row.what, row.kernel, f"{row.seconds * 1e3:,.3g}"),
                f"{row.flops / row.seconds / 1e12:,.3g}" if row.flops else "",
                f"{row.bytes / row.seconds / 1e12:,.3g}" if row.bytes else "",
                f"{row.of_ceiling:.2f}",
            )
        )
    return lines
