"""`bench kernels`: attention kernels one by one, in the shapes of both phases.

Every kernel that can run a call is measured, with the ceiling that bounds the call.

Axes: B batch, Q query rows, K keys, H query heads, G KV heads, D head size, R rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from star_attention.attention import kernels
from star_attention.attention.attend import Rule, attend
from star_attention.attention.kernels import Call
from star_attention.attention.state import State, merge
from star_attention.bench.benchmark import Benchmark, Target
from star_attention.errors import InvalidInputError
from star_attention.planning.model_shape import AttentionShape
from star_attention.planning.sizes import format_size
from star_attention.tools import machine

_CAPACITY, _TAIL = 512, 256
"""Tokens that the buffer of a tail has room for, and those in it."""
_CALLS_PER_GRAPH = 8


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """One kernel on one call.

    Attributes:
        what: description of the call.
        kernel: its name.
        seconds: the median.
        flops, bytes: operations, or bytes read and written; the other is 0.
        of_ceiling: the rate relative to the ceiling that bounds the call.
    """

    what: str
    kernel: str
    seconds: float
    flops: int = 0
    bytes: int = 0
    of_ceiling: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """A call to measure: its name, a kernel, and its operations or bytes."""

    call: str
    kernel: str
    work: Callable[[], Any]
    flops: int = 0
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class AttentionCalls:
    """Attention calls on random tensors, in the shape of a model's."""

    shape: AttentionShape
    device: torch.device
    dtype: torch.dtype

    def random(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.device).to(self.dtype)

    def kernels(self, queries: int, keys: int, *, causal: bool) -> list[str]:
        """Name the kernels that can run a call.

        The `math` kernel, which multiplies plain matrices, is left out if there are others.
        """
        call = Call(
            device=self.device.type,
            dtype=self.dtype,
            queries=queries,
            keys=keys,
            heads=self.shape.heads,
            kv_heads=self.shape.kv_heads,
            head_size=self.shape.k_head_size,
            causal=causal,
        )
        names = [name for name in kernels.KERNELS if not kernels.load(name).unsupported(call)]
        return [name for name in names if name != "math"] or names

    def attend(
        self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, offset: int, kernel: str
    ) -> Callable[[], State]:
        rule = Rule(scale=self.shape.k_head_size**-0.5)
        return partial(attend, q_BQHD, k_BKGD, v_BKGD, rule=rule, offset=offset, kernel=kernel)

    def answer(self, q_BQHD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor) -> Callable[[], State]:
        """Our kernel for phase 2, with a tail of an answer's length."""
        from star_attention.attention.kernels import triton_answer

        G, D = self.shape.kv_heads, self.shape.k_head_size
        tail_k, tail_v = self.random(1, G, _CAPACITY, D), self.random(1, G, _CAPACITY, D)
        # The table holds addresses, so these tensors must live as long as it does.
        addressed = (k_BGKD, v_BGKD, tail_k, tail_v)
        tables = triton_answer.KVTables(
            addresses=triton_answer.addresses([addressed]).to(self.device),
            lengths=torch.tensor([k_BGKD.shape[2], _TAIL, _CAPACITY], device=self.device),
            padding_R=torch.zeros(1, dtype=torch.int32, device=self.device),
        )
        rule = Rule(scale=D**-0.5, dtype=self.dtype)

        def work(addressed: tuple[Tensor, ...] = addressed) -> State:
            return triton_answer.attend(q_BQHD, G, tables=tables, layer=0, rule=rule)

        return work


@dataclass(frozen=True, kw_only=True)
class Kernels(Benchmark[KernelRow]):
    """Settings of `bench kernels`.

    Attributes:
        blocks: block sizes of the calls of phase 1, in tokens.
        contexts: context lengths of the calls of phase 2, in tokens.
        repeats: runs of each, of which the median counts.
    """

    name: ClassVar[str] = "kernels"
    blocks: list[int]
    contexts: list[int]
    repeats: int

    def run(self, target: Target) -> Iterator[KernelRow]:
        """Measure the largest attention call of the model, merging, and a linear layer of one row.

        Of several ranks, on rank 0 alone.

        Raises:
            InvalidInputError: the model's keys and values differ in size.
        """
        shape = max(target.shape.attention, key=lambda call: call.heads)
        if shape.k_head_size != shape.v_head_size:
            raise InvalidInputError(
                f"the model's keys have size {shape.k_head_size} and its values"
                f" {shape.v_head_size}; kernels are measured only for models with one size, so"
                " give another model"
            )
        calls = AttentionCalls(shape=shape, device=target.device, dtype=target.dtype)
        if target.is_first:
            yield from (self._measure(task, target) for task in self._tasks(calls, target))

    def _tasks(self, calls: AttentionCalls, target: Target) -> Iterator[Task]:
        for block in self.blocks:
            yield from _block_tasks(block, calls)
        for context in self.contexts:
            yield from _token_tasks(context, calls)
        yield from _linear_tasks(target.shape.hidden_size, calls)

    def _measure(self, task: Task, target: Target) -> KernelRow:
        target.progress(f"{task.call}, {task.kernel}")
        seconds = median(_time(task.work, self.repeats, target.device))
        ceilings = target.ceilings
        floor_s = max(task.flops / ceilings.flops_per_s, task.bytes / ceilings.bytes_per_s)
        return KernelRow(
            what=task.call,
            kernel=task.kernel,
            seconds=seconds,
            flops=task.flops,
            bytes=task.bytes,
            of_ceiling=floor_s / seconds,
        )

    def table(self, rows: list[KernelRow]) -> list[tuple[str, ...]]:
        header = ("call", "kernel", "ms", "TFLOP/s", "TB/s", "of ceiling")
        return [header, *(_cells(row) for row in rows)]


def _block_tasks(block: int, calls: AttentionCalls) -> Iterator[Task]:
    """Yield the two calls of phase 1 for a block, and merging their states."""
    shape = calls.shape
    H, G, D = shape.heads, shape.kv_heads, shape.k_head_size
    q_BQHD = calls.random(1, block, H, D)
    k_BKGD, v_BKGD = calls.random(1, block, G, D), calls.random(1, block, G, D)
    size = format_size(block)
    for kernel in calls.kernels(block, block, causal=True):
        yield Task(
            call=f"a block of {size}",
            kernel=kernel,
            work=calls.attend(q_BQHD, k_BKGD, v_BKGD, 0, kernel),
            flops=shape.flops_per_pair * (block * (block + 1) // 2),
        )
    for kernel in calls.kernels(block, block, causal=False):
        yield Task(
            call=f"{size} over an anchor of {size}",
            kernel=kernel,
            work=calls.attend(q_BQHD, k_BKGD, v_BKGD, block, kernel),
            flops=shape.flops_per_pair * (block * block),
        )
    states = [
        State(calls.random(1, block, H, D), torch.randn(1, block, H, device=calls.device))
        for _ in range(2)
    ]
    yield Task(
        call=f"merging {size}",
        kernel="ours",
        work=partial(merge, states, dtype=calls.dtype),
        bytes=3 * _nbytes(states[0].out_BQHD),
    )


def _token_tasks(context: int, calls: AttentionCalls) -> Iterator[Task]:
    """Yield the call of phase 2: one token over a context."""
    H, G, D = calls.shape.heads, calls.shape.kv_heads, calls.shape.k_head_size
    q_BQHD = calls.random(1, 1, H, D)
    k_BGKD, v_BGKD = calls.random(1, G, context, D), calls.random(1, G, context, D)
    k_BKGD, v_BKGD = k_BGKD.transpose(1, 2), v_BGKD.transpose(1, 2)
    name, moved = f"a token over {format_size(context)}", 2 * _nbytes(k_BGKD)
    for kernel in calls.kernels(1, context, causal=False):
        work = calls.attend(q_BQHD, k_BKGD, v_BKGD, context, kernel)
        yield Task(call=name, kernel=kernel, work=work, bytes=moved)
    if kernels.triton_works(calls.device):
        work = calls.answer(q_BQHD, k_BGKD, v_BGKD)
        yield Task(call=name, kernel="triton", work=work, bytes=moved)


def _linear_tasks(hidden_size: int, calls: AttentionCalls) -> Iterator[Task]:
    """Yield a linear layer on the hidden state of one token."""
    weight, x = calls.random(4 * hidden_size, hidden_size), calls.random(1, 1, hidden_size)
    name, moved = f"one row, {hidden_size} to {4 * hidden_size}", _nbytes(weight)
    yield Task(call=name, kernel="torch", work=partial(linear, x, weight), bytes=moved)
    if kernels.triton_works(calls.device):
        from star_attention.linear import triton_row

        work = partial(triton_row.linear, x, weight, None)
        yield Task(call=name, kernel="triton", work=work, bytes=moved)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _time(work: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    """Seconds per call; on a GPU without Python's share, which exceeds that of a short kernel."""
    if device.type != "cuda":
        return machine.time_repeatedly(work, repeats=repeats, device=device)
    # The first call compiles and loads, which a capture cannot.
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        for _ in range(_CALLS_PER_GRAPH):
            work()
    return [
        seconds / _CALLS_PER_GRAPH
        for seconds in machine.time_repeatedly(graph.replay, repeats=repeats, device=device)
    ]


def _cells(row: KernelRow) -> tuple[str, ...]:
    return (
        row.what,
        row.kernel,
        f"{row.seconds * 1e3:,.3g}",
        f"{row.flops / row.seconds / 1e12:,.3g}" if row.flops else "",
        f"{row.bytes / row.seconds / 1e12:,.3g}" if row.bytes else "",
        f"{row.of_ceiling:.2f}",
    )
