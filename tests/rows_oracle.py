"""Attention of rows with contexts and tails of their own in float64: the oracle of our kernel.

Axes: R rows, L context tokens, T tail tokens before the new one, C capacity of a tail, K keys,
H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from star_attention.attention.kernels import row_tables
from star_attention.attention.state import State
from star_attention.storage.kv import quantize


@dataclass(frozen=True, kw_only=True)
class RowCase:
    """Lengths of the axes, and the rule of attention.

    `contexts` has the tokens of each context and the tail tokens of each of its rows; `unused` rows
    of the bucket come after them. With `keeps_window`, stored are the last tokens of contexts.
    """

    contexts: tuple[tuple[int, tuple[int, ...]], ...] = ((300, (5,)),)
    unused: int = 0
    H: int = 8
    G: int = 2
    D: int = 64
    window: int | None = None
    softcap: float | None = None
    fp8: bool = False
    keeps_window: bool = False

    def first_kept(self, tokens: int) -> int:
        """The first stored token of a context."""
        return max(0, tokens - self.window + 1) if self.keeps_window and self.window else 0

    @property
    def tails(self) -> list[int]:
        return [tail for _, tails in self.contexts for tail in tails]


CASES = {
    "one row": RowCase(),
    "no tail yet": RowCase(contexts=((257, (0,)),), G=1, D=128),
    "rows of one context": RowCase(contexts=((600, (3, 70, 0, 64, 17)),), H=6),
    "more rows than a tile": RowCase(contexts=((70, (3,) * 9),), G=1, D=32),
    "contexts of their own": RowCase(contexts=((513, (9,)), (1, (0,)), (1200, (128,)))),
    "many contexts": RowCase(contexts=((40, (1, 2, 3)), (700, (4, 5)), (90, (6,))), unused=2),
    "a long tail": RowCase(contexts=((100, (600, 2)),), H=4, D=80),
    "a window": RowCase(contexts=((900, (5, 90)), (60, (300, 0))), window=100),
    "a window, uneven heads": RowCase(contexts=((500, (9, 400)),), window=350, H=6, D=48, unused=1),
    "a softcap": RowCase(contexts=((300, (5, 1)), (20, (2,))), softcap=30.0, D=96),
    "fp8": RowCase(contexts=((290, (70, 2)), (900, (0,))), fp8=True),
    "fp8, a window": RowCase(contexts=((600, (4,)), (70, (80, 3))), D=80, window=150, fp8=True),
    "a kept window": RowCase(
        contexts=((900, (5, 90, 120)), (60, (0, 300))), window=100, keeps_window=True
    ),
    "fp8, a kept window": RowCase(
        contexts=((600, (4,)), (300, (80, 3))), D=48, window=150, fp8=True, keeps_window=True
    ),
}


@dataclass(kw_only=True)
class RowSetup:
    """The tensors of a case; `stored` keeps those alive whose addresses are in the tables."""

    case: RowCase
    stored: list[tuple[Tensor, ...]]
    q_RHD: Tensor
    k_RGD: Tensor
    v_RGD: Tensor
    contexts: list[tuple[Tensor, Tensor]]
    tails: list[tuple[Tensor, Tensor]]


def setup(case: RowCase, dtype: torch.dtype, device: str) -> RowSetup:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, dtype)

    rows = len(case.tails) + case.unused
    contexts = [(random(case.G, L, case.D), random(case.G, L, case.D)) for L, _ in case.contexts]
    stored: list[tuple[Tensor, ...]] = list(contexts)
    if case.fp8:
        quantized = [(*quantize(k), *quantize(v)) for k, v in contexts]
        stored = [(k8, v8, k_scale, v_scale) for k8, k_scale, v8, v_scale in quantized]
        contexts = [
            (k8.double() * k_scale[..., None], v8.double() * v_scale[..., None])
            for k8, v8, k_scale, v_scale in stored
        ]
    firsts = [case.first_kept(L) for L, _ in case.contexts]
    stored = [
        tuple(tensor[:, first:].contiguous() for tensor in tensors)
        for tensors, first in zip(stored, firsts, strict=True)
    ]
    return RowSetup(
        case=case,
        stored=stored,
        q_RHD=random(rows, case.H, case.D),
        k_RGD=random(rows, case.G, case.D),
        v_RGD=random(rows, case.G, case.D),
        contexts=contexts,
        tails=[
            (random(case.G, T + 1 + T % 7, case.D), random(case.G, T + 1 + T % 7, case.D))
            for T in case.tails
        ],
    )


def tables(tensors: RowSetup) -> tuple[Any, int]:
    """Return the kernel's tables, in which the layer's row is 1, and the rows of a tile."""
    case, device = tensors.case, tensors.q_RHD.device
    rows, group = len(tensors.q_RHD), case.H // case.G
    shared = max(len(tails) for _, tails in case.contexts)
    tile_rows = row_tables.tile_rows(shared, group, head_size=case.D, dtype=tensors.q_RHD.dtype)
    filled = row_tables.RowTables.zeros(2, rows, row_tables.most_items(rows, case.G), device)
    items, row_items = row_tables.work(
        [(len(tails), tokens) for tokens, tails in case.contexts],
        tile_rows=tile_rows,
        kv_heads=case.G,
    )
    assert len(items) <= len(filled.items)
    filled.items[: len(items)] = torch.tensor(items)
    for number, stored in enumerate(tensors.stored):
        addresses = [tensor.data_ptr() for tensor in stored]
        filled.shards[1, number, : len(stored)] = torch.tensor(addresses)
        first = case.first_kept(case.contexts[number][0])
        kept = torch.tensor([stored[0].shape[1], first])
        filled.shards[1, number, row_tables.SHARD_ADDRESSES :] = kept
    context_of = [tokens for tokens, tails in case.contexts for _ in tails]
    for row, (k_GCD, v_GCD) in enumerate(tensors.tails):
        filled.tails[1, row] = torch.tensor([k_GCD.data_ptr(), v_GCD.data_ptr()])
        numbers = [case.tails[row], k_GCD.shape[1], context_of[row], *row_items[row]]
        filled.rows[row] = torch.tensor(numbers)
    return filled, tile_rows


def expected(tensors: RowSetup, scale: float) -> State:
    """Compute the attention in float64, with tails as their buffers hold them; unused rows too."""
    case, outs, lses = tensors.case, [], []
    context_of = [number for number, (_, tails) in enumerate(case.contexts) for _ in tails]
    for row, number in enumerate(context_of):
        tail = case.tails[row] + 1
        k_HKD, v_HKD = (
            torch.cat([whole, own[:, :tail]], 1)
            .repeat_interleave(case.H // case.G, 0)
            .double()
            .cpu()
            for whole, own in zip(tensors.contexts[number], tensors.tails[row], strict=True)
        )
        scores = torch.einsum("hd,hkd->hk", tensors.q_RHD[row].double().cpu(), k_HKD) * scale
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        if case.window is not None:
            scores[:, : max(0, scores.shape[1] - case.window)] = float("-inf")
        outs.append(torch.einsum("hk,hkd->hd", scores.softmax(-1), v_HKD))
        lses.append(scores.logsumexp(-1))
    for _ in range(case.unused):
        outs.append(torch.zeros(case.H, case.D).double())
        lses.append(torch.full((case.H,), float("-inf")).double())
    return State(torch.stack(outs)[:, None], torch.stack(lses)[:, None])
