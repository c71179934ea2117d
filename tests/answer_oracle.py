"""Phase 2's attention over a context and each row's tail in float64: the oracle of our kernel.

Axes: R rows, Q new tokens of each, L context tokens, T tail tokens before the new ones, C capacity
of the tail, K keys, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from star_attention.attention.state import State
from star_attention.storage.kv import quantize


@dataclass(frozen=True, kw_only=True)
class Case:
    """Lengths of the axes, and the rule of attention; `padding` is that of each row, in tokens."""

    R: int = 1
    Q: int = 1
    H: int = 8
    G: int = 2
    D: int = 64
    L: int = 300
    T: int = 5
    padding: tuple[int, ...] = (0,)
    window: int | None = None
    softcap: float | None = None
    fp8: bool = False


CASES = {
    "one token": Case(),
    "no tail yet": Case(T=0, L=257, G=1, D=128),
    "padded rows": Case(R=3, padding=(0, 3, 7), T=20, H=4, G=4, D=80),
    "a query": Case(R=2, Q=33, padding=(0, 3), T=0),
    "a query after a tail": Case(Q=20, T=9, window=17, padding=(4,), H=4),
    "a window": Case(R=5, padding=(0, 0, 60, 1, 2), T=70, L=100, H=32, window=90),
    "a window that ends in the tail": Case(T=70, window=30),
    "a softcap": Case(R=2, padding=(0, 0), softcap=30.0, D=96),
    "more rows than a tile": Case(R=20, padding=(0,) * 20, H=16, G=2, T=3, L=90),
    "one key": Case(L=1, T=0),
    "fp8": Case(T=70, L=290, fp8=True),
    "fp8, a padded query": Case(R=2, Q=18, padding=(0, 3), T=4, D=80, window=150, fp8=True),
}

Shards = Sequence[Sequence[tuple[int, int]]]
SHARDS: dict[str, Shards] = {
    "two ranks": [[(0, 130)], [(130, 300)]],
    "an idle rank": [[(0, 300)], []],
    "zig-zag": [[(0, 60), (250, 300)], [(60, 70), (200, 250)], [(70, 130), (130, 200)]],
    "stripes": [
        [(0, 50), (100, 150), (200, 240), (270, 300)],
        [(50, 100), (150, 200), (240, 270)],
    ],
}
"""Segments of each rank, of a context of 300 tokens."""
SHARDED_CASES = {
    "one token": Case(),
    "padded rows": Case(R=3, padding=(0, 3, 7), T=20, H=4, G=4, D=80),
    "a padded query": Case(R=2, Q=18, padding=(0, 3), T=0, window=97),
    "a window": Case(R=4, padding=(0, 60, 1, 2), T=70, H=32, window=150),
    "a window that ends in the tail": Case(T=70, window=30),
    "fp8": Case(R=2, Q=5, padding=(0, 2), T=9, window=130, fp8=True),
}


@dataclass(kw_only=True)
class Setup:
    """The tensors of a case. The kernel reads new keys and values from the tail, after `append`.

    `addressed` keeps the tensors alive whose addresses are in the table.
    """

    case: Case
    addressed: list[Tensor]
    q_RQHD: Tensor
    k_GLD: Tensor
    v_GLD: Tensor
    tail_k_RGCD: Tensor
    tail_v_RGCD: Tensor
    k_RGQD: Tensor
    v_RGQD: Tensor
    padding_R: Tensor

    @property
    def capacity(self) -> int:
        return self.tail_k_RGCD.shape[2]


def setup(case: Case, dtype: torch.dtype, device: str) -> Setup:
    capacity = case.T + case.Q + 11

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, dtype)

    k_GLD, v_GLD = (random(case.G, case.L, case.D) for _ in range(2))
    tail_k, tail_v = (random(case.R, case.G, capacity, case.D) for _ in range(2))
    new_k, new_v = (random(case.R, case.Q, case.G, case.D).transpose(1, 2) for _ in range(2))
    addressed = [k_GLD, v_GLD, tail_k, tail_v]
    if case.fp8:
        (k8, k_scale), (v8, v_scale) = quantize(k_GLD), quantize(v_GLD)
        addressed = [k8, v8, tail_k, tail_v, k_scale, v_scale]
        k_GLD, v_GLD = k8.double() * k_scale[..., None], v8.double() * v_scale[..., None]
    return Setup(
        addressed=addressed,
        case=case,
        q_RQHD=random(case.R, case.Q, case.H, case.D),
        k_GLD=k_GLD,
        v_GLD=v_GLD,
        tail_k_RGCD=tail_k,
        tail_v_RGCD=tail_v,
        k_RGQD=new_k,
        v_RGQD=new_v,
        padding_R=torch.tensor(case.padding, dtype=torch.int32, device=device),
    )


def tables(
    tensors: Setup, segments: Sequence[tuple[int, int]] | None = None, *, holds_tail: bool = True
) -> tuple[Any, list[Tensor]]:
    """Return the kernel's tables for a shard, or all, of the context; the layer's row is 1.

    The second result keeps tensors alive whose addresses are in the tables.
    """
    from star_attention.attention.kernels import triton_answer

    k, v, tail_k, tail_v, *scales = tensors.addressed
    segments = [(0, tensors.case.L)] if segments is None else segments
    tokens = torch.cat([torch.arange(0), *(torch.arange(*run) for run in segments)])
    k, v, *scales = (tensor[:, tokens.to(k.device)] for tensor in (k, v, *scales))
    addressed = [k, v, tail_k, tail_v, *scales]
    lengths = triton_answer.lengths(
        segments,
        context_tokens=tensors.case.L,
        tail_tokens=tensors.case.T,
        capacity=tensors.capacity,
        holds_tail=holds_tail,
    )
    kv_tables = triton_answer.KVTables(
        addresses=triton_answer.addresses([[], addressed]).to(k.device),
        lengths=lengths[None].to(k.device),
        padding_R=tensors.padding_R,
    )
    return kv_tables, addressed


def expected(tensors: Setup, scale: float) -> State:
    """Compute the attention in float64, with the tail as its buffers hold it."""
    case, outs, lses = tensors.case, [], []
    last = case.T + case.Q
    for row, padding in enumerate(case.padding):
        k_HKD, v_HKD = (
            torch.cat([whole, tail[row, :, :last]], 1)
            .repeat_interleave(case.H // case.G, 0)
            .double()
            .cpu()
            for whole, tail in (
                (tensors.k_GLD, tensors.tail_k_RGCD),
                (tensors.v_GLD, tensors.tail_v_RGCD),
            )
        )
        scores = torch.einsum("qhd,hkd->qhk", tensors.q_RQHD[row].double().cpu(), k_HKD) * scale
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        keys = torch.cat([torch.arange(case.L), case.L + torch.arange(last) - padding])
        queries = case.L + case.T - padding + torch.arange(case.Q)
        visible_QK = keys[None] <= queries[:, None]
        if case.window is not None:
            visible_QK &= queries[:, None] - keys[None] < case.window
        visible_QK[:, case.L : case.L + padding] = False
        scores = scores.masked_fill(~visible_QK[:, None], float("-inf"))
        outs.append(torch.einsum("qhk,hkd->qhd", scores.softmax(-1).nan_to_num(0.0), v_HKD))
        lses.append(scores.logsumexp(-1))
    return State(torch.stack(outs), torch.stack(lses))


def real_rows(case: Case) -> Tensor:
    """Return which queries are not padding, bool `[R, Q]`."""
    return torch.arange(case.Q)[None] + case.T >= torch.tensor(case.padding)[:, None]
