"""New tokens' queries, keys and values on their way to attention, in Triton: rotary embeddings of
queries and keys, with the norms of their heads, and keys and values into the tails, in one launch.

Where a tail is and how long, the kernel reads from tables on the device: those of `triton_answer`,
whose rows share a context and lengths, or those of `triton_rows`.

Axes: R rows, Q new tokens of each, H query heads, G KV heads, D head size, E angles of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_attention.attention.kernels import triton_pdl
from star_attention.attention.kernels.row_tables import ROW_COLUMNS
from star_attention.attention.rotation import Rotation

NOT, HALVES, PAIRS = 0, 1, 2
"""How queries and keys are rotated: `Rotation.pairs`."""
_HALVES: tl.constexpr = tl.constexpr(HALVES)
_PAIRS: tl.constexpr = tl.constexpr(PAIRS)
_PER_ROW: tl.constexpr = tl.constexpr(ROW_COLUMNS)


@dataclass(frozen=True, kw_only=True)
class Tails:
    """Where a layer's new keys and values go.

    Attributes:
        addresses: int64; addresses of keys and values are next to each other.
        numbers: lengths and capacities: `KVTables.lengths` of one kind, or `RowTables.rows`.
        first: the place of the first address.
        by_row: True if each row has addresses and numbers of its own.
    """

    addresses: Tensor
    numbers: Tensor
    first: int
    by_row: bool

    def store(
        self, q_RQHD: Tensor | None, k_RQGD: Tensor, v_RQGD: Tensor, rotation: Rotation | None
    ) -> Tensor | None:
        """Write new keys and values after each row's tail, which has room for them.

        Args:
            q_RQHD: queries to rotate with the keys, None without `rotation`.
            k_RQGD: keys.
            v_RQGD: values.
            rotation: of queries and keys, with their norms.

        Returns:
            The rotated queries.
        """
        R, Q, G, D = k_RQGD.shape
        new = [t if t.stride(3) == 1 else t.contiguous() for t in (k_RQGD, v_RQGD)]
        heads, out_RQHD, angles, constants = 0, None, (new[0], new[0], 0, 0), dict(ROTATED=NOT, E=1)
        norms = None if rotation is None else rotation.norms
        if rotation is not None:
            assert q_RQHD is not None
            q_RQHD = q_RQHD if q_RQHD.stride(3) == 1 else q_RQHD.contiguous()
            heads, out_RQHD = q_RQHD.shape[2], torch.empty_like(q_RQHD, memory_format=_CONTIGUOUS)
            new = [q_RQHD, *new]
            angles, constants = rotation_arguments(rotation, R)
        else:
            new = [new[0], *new]
        _store[(R * Q * (heads + 2 * G),)](
            *new, new[0] if out_RQHD is None else out_RQHD, *angles[:2],
            new[0] if norms is None else norms.query, new[0] if norms is None else norms.key,
            0.0 if norms is None else norms.eps, self.addresses, self.numbers,
            *(stride for t in new for stride in t.stride()[:3]), *angles[2:], self.first, Q,
            HEADS=heads, KV_HEADS=G, D=D, BLOCK_D=triton.next_power_of_2(D), BY_ROW=self.by_row,
            NORM=norms is not None, OFFSET=0.0 if norms is None else norms.offset,
            num_warps=1, **constants, **triton_pdl.options(k_RQGD.device),
        )  # fmt: skip
        return out_RQHD


_CONTIGUOUS = torch.contiguous_format


def rotation_arguments(
    rotation: Rotation, rows: int
) -> tuple[tuple[Tensor, Tensor, int, int], dict[str, int]]:
    """Return what kernels take of a rotation: tensors and their strides, and constants."""
    cos, sin = (
        t if t.stride(2) == 1 else t.contiguous() for t in (rotation.cos_RQE, rotation.sin_RQE)
    )
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    row = cos.stride(0) if cos.shape[0] == rows else 0
    assert cos.shape[0] in (1, rows)
    constants = dict(ROTATED=PAIRS if rotation.pairs else HALVES, E=cos.shape[2])
    return (cos, sin, row, cos.stride(1)), constants


@triton.jit
def rotated(
    x_ptr, cos_ptr, sin_ptr, weight_ptr, eps, at, angles_at, d, mask,
    ROTATED: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
    NORM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Load elements `at` of heads, whose places in their heads are `d`, and rotate them in fp32.

    With `NORM` they are all elements of one head, which is normed first.
    """
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ROTATED == _HALVES:
        is_first = d < D // 2
        other = tl.where(is_first, at + D // 2, at - D // 2)
    else:
        is_first = d % 2 == 0
        other = tl.where(is_first, at + 1, at - 1)
    y = tl.load(x_ptr + other, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        factor = tl.math.rsqrt(tl.sum(x * x) / D + eps)
        x *= factor * (tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32) + OFFSET)
        d_other = d + other - at
        y *= factor * (tl.load(weight_ptr + d_other, mask=mask, other=0.0).to(tl.float32) + OFFSET)
    # Where both elements of a pair have one number, there are half as many.
    e = angles_at + (d * E // D if ROTATED == _PAIRS else d % E)
    cos = tl.load(cos_ptr + e, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + e, mask=mask, other=0.0).to(tl.float32)
    return x * cos + tl.where(is_first, -y, y) * sin


@triton.jit
def tail_place(
    addresses_ptr, numbers_ptr, first, r, q, KV_HEADS: tl.constexpr, BY_ROW: tl.constexpr
):  # fmt: skip
    """Return where the new keys of a token go: the place of the tail's address, that of the first
    head's key in it, how far the next head's is, and whether there is room."""
    if BY_ROW:
        slot = tl.load(numbers_ptr + r * _PER_ROW).to(tl.int64) + q
        capacity = tl.load(numbers_ptr + r * _PER_ROW + 1).to(tl.int64)
        return addresses_ptr + first + r * 2, slot, capacity, slot < capacity
    else:
        slot = tl.load(numbers_ptr + 1) + q
        capacity = tl.load(numbers_ptr + 2)
        place = r * KV_HEADS * capacity + slot
        return addresses_ptr + first + r * 0, place, capacity, slot < capacity


@triton.jit
def _store(
    q_ptr, k_ptr, v_ptr, out_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, eps,
    addresses_ptr, numbers_ptr,
    q_r, q_q, q_h, k_r, k_q, k_g, v_r, v_q, v_g, angles_r, angles_q, first, queries,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROTATED: tl.constexpr, E: tl.constexpr, BY_ROW: tl.constexpr,
    NORM: tl.constexpr, OFFSET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Take one head of one token: a query's, if there are `HEADS`, a key's or a value's."""
    triton_pdl.begin(PDL)
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    token = tl.program_id(0) // (HEADS + 2 * KV_HEADS)
    h = tl.program_id(0) % (HEADS + 2 * KV_HEADS)
    r = token // queries
    q = token % queries
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    angles_at = r * angles_r + q * angles_q
    if h < HEADS:
        if ROTATED:
            q_at = q_ptr + r * q_r + q * q_q + h * q_h
            q_D = rotated(
                q_at, cos_ptr, sin_ptr, q_norm_ptr, eps, d, angles_at, d, mask,
                ROTATED, E, D, NORM, OFFSET,
            )  # fmt: skip
            tl.store(out_ptr + (token * HEADS + h) * D + d, q_D.to(DTYPE), mask=mask)
    else:
        g = (h - HEADS) % KV_HEADS
        pair_ptr, place, capacity, fits = tail_place(
            addresses_ptr, numbers_ptr, first, r, q, KV_HEADS, BY_ROW
        )
        target = (place + g * capacity) * D + d
        mask = d < tl.where(fits, D, 0)
        if h < HEADS + KV_HEADS:
            k_at = k_ptr + r * k_r + q * k_q + g * k_g
            # Addresses read on the device do not imply an alignment.
            k_tail = tl.multiple_of(tl.load(pair_ptr).to(tl.pointer_type(DTYPE)), 16)
            if ROTATED:
                k_D = rotated(
                k_at, cos_ptr, sin_ptr, k_norm_ptr, eps, d, angles_at, d, mask,
                ROTATED, E, D, NORM, OFFSET,
            )  # fmt: skip
                tl.store(k_tail + target, k_D.to(DTYPE), mask=mask)
            else:
                tl.store(k_tail + target, tl.load(k_at + d, mask=mask), mask=mask)
        else:
            v_D = tl.load(v_ptr + r * v_r + q * v_q + g * v_g + d, mask=mask)
            v_tail = tl.multiple_of(tl.load(pair_ptr + 1).to(tl.pointer_type(DTYPE)), 16)
            tl.store(v_tail + target, v_D, mask=mask)
