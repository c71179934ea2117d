"""Queries, keys and values of new tokens on ranks, and the tails that they go to.

Axes: R rows, Q new tokens of each, H query heads of a rank, G KV heads, D head size, C capacity.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from star_attention.attention.kernels.row_tables import RowTables
from star_attention.attention.rotation import HeadNorms, Rotation

H, G, D = 6, 2, 16


@dataclass(kw_only=True)
class NewTokens:
    """What all ranks have, the same on each of them.

    `own` has of each rank queries, keys and values; `stored` has the keys and values of each row's
    tail, `[G, C, D]` with the heads of all ranks, and `lengths` their tokens.
    """

    own: list[list[Tensor]]
    stored: list[tuple[Tensor, Tensor]]
    lengths: list[int]
    tails: Any
    rotation: Rotation | None
    kept: Any

    def check(self, queries: Tensor, before: list[tuple[Tensor, Tensor]]) -> None:
        """Compare queries of all heads and tails with what they should be, to rounding."""
        q, k, v = (torch.cat(of_ranks, 2) for of_ranks in zip(*self.own, strict=True))
        if self.rotation is not None:
            q, k = self.rotation.both(q, k)
        # Sums of two terms, which norms make as large as some tens, may nearly cancel.
        ulps = 16 if self.rotation is not None and self.rotation.norms is not None else 2
        _close(queries, q, ulps)
        for row, (pair, old) in enumerate(zip(self.stored, before, strict=True)):
            for tail, was, new in zip(pair, old, (k, v), strict=True):
                first = self.lengths[row]
                room = max(0, min(tail.shape[1] - first, new.shape[1]))
                was[:, first : first + room] = new[row, :room].transpose(0, 1)
                _close(tail, was, ulps)

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        return [(k.clone(), v.clone()) for k, v in self.stored]


def _close(actual: Tensor, expected: Tensor, ulps: int) -> None:
    # The interpreter rounds to bfloat16 towards zero.
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, atol=ulps * eps, rtol=2 * eps)


def new_tokens(
    seed: int,
    ranks: int,
    dtype: torch.dtype,
    draw: random.Random,
    device: str = "cpu",
    *,
    normed: bool = False,
) -> NewTokens:
    """Return tokens of rows whose tails are their own, or of one context, rotated or not.

    Heads are `normed` before they are rotated.
    """
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    by_row, R = draw.random() < 0.5, draw.choice([1, 3])
    Q = 1 if by_row else draw.choice([1, 20])
    own = [[numbers(R, Q, heads, D) for heads in (H, G, G)] for _ in range(ranks)]
    angles, pairs = draw.choice([(D, False), (D // 2, False), (D, True)])
    rotation = None
    if draw.random() < 0.7:
        cos, sin = numbers(draw.choice([1, R]), Q, angles), numbers(R, Q, angles)
        norms = None
        if normed:
            norms = HeadNorms(query=numbers(D), key=numbers(D), offset=1.0, eps=1e-3)
        rotation = Rotation(cos_RQE=cos, sin_RQE=sin[: len(cos)], pairs=pairs, norms=norms)
    if by_row:
        capacities = [9, 4, 0][:R]
        lengths = [8, 1, 0][:R]
        stored = [(numbers(G * ranks, C, D), numbers(G * ranks, C, D)) for C in capacities]
        tails, kept = _of_rows(stored, lengths, device)
    else:
        capacity, lengths = Q + 7, [5] * R
        whole = numbers(2, R, G * ranks, capacity, D)
        stored = list(zip(*whole.unbind(), strict=True))
        tails, kept = _of_one_context(whole, lengths[0], device)
    return NewTokens(
        own=own, stored=stored, lengths=lengths, tails=tails, rotation=rotation, kept=kept
    )


def _of_rows(stored: list[tuple[Tensor, Tensor]], lengths: list[int], device: str) -> Any:
    from star_attention.attention.kernels import triton_rows

    filled = RowTables.zeros(2, len(stored), 1, "cpu")
    filled.tails[1] = torch.tensor([[k.data_ptr(), v.data_ptr()] for k, v in stored])
    filled.rows[:, 0] = torch.tensor(lengths)
    filled.rows[:, 1] = torch.tensor([k.shape[1] for k, _ in stored])
    on_device = RowTables.zeros(2, len(stored), 1, device)
    on_device.copy_(filled)
    return triton_rows.tails_of(on_device, 1), on_device


def _of_one_context(whole: Tensor, length: int, device: str) -> Any:
    from star_attention.attention.kernels import triton_answer

    k, v = whole.unbind()
    lengths = triton_answer.lengths(
        [], context_tokens=0, tail_tokens=length, capacity=whole.shape[3]
    )
    tables = triton_answer.KVTables(
        addresses=triton_answer.addresses([[], [None, None, k, v]]).to(device),
        lengths=lengths[None].to(device),
        padding_R=torch.zeros(len(k), dtype=torch.int32, device=device),
    )
    return triton_answer.tails_of(tables, 1), (tables, whole)
