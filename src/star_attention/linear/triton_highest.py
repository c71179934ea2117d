"""The place of the highest of many scores, as of a vocabulary's, in two short launches of Triton.

Axes: R rows, V scores of each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_attention.attention.kernels import triton_pdl

_BLOCK = 2048
"""Scores of a program."""


@triton.jit
def _ranks(scores, at, V):
    """Return numbers in the order of scores at places `at`, of equal ones the first place highest.

    As for torch, NaN is the highest, and the two zeros are equal. A number's low half is its place.
    """
    bits = scores.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(scores == 0.0, 0, order)
    order = tl.where(scores == scores, order, 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) + (V - 1 - at).to(tl.int64)


@triton.jit
def _of_parts(scores_ptr, tops_ptr, V, stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    part, row = tl.program_id(0), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    triton_pdl.begin(PDL)
    row_ptr = scores_ptr + row.to(tl.int64) * stride
    # Beyond the last score it is read again: at a later place it is never the first of equals.
    scores = tl.load(row_ptr + tl.minimum(at, V - 1)).to(tl.float32)
    tl.store(tops_ptr + row * tl.num_programs(0) + part, tl.max(_ranks(scores, at, V), 0))


@triton.jit
def _of_all(tops_ptr, place_ptr, V, parts, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0)
    part = tl.arange(0, BLOCK)
    triton_pdl.begin(PDL)
    # Beyond the last part it is read again.
    top = tl.max(tl.load(tops_ptr + row * parts + tl.minimum(part, parts - 1)), 0)
    tl.store(place_ptr + row, V - 1 - (top & 0xFFFFFFFF))


def highest(scores_RV: Tensor) -> Tensor:
    """Return the place of the highest score of each row, int64 `[R]`: of equal ones, the first.

    Args:
        scores_RV: scores in fp32 or half precision, whose rows are contiguous.
    """
    R, V = scores_RV.shape
    parts = triton.cdiv(V, _BLOCK)
    tops = scores_RV.new_empty(R, parts, dtype=torch.int64)
    place_R = scores_RV.new_empty(R, dtype=torch.int64)
    early = triton_pdl.options(scores_RV.device)
    _of_parts[(parts, R)](scores_RV, tops, V, scores_RV.stride(0), BLOCK=_BLOCK, **early)
    _of_all[(R,)](
        tops, place_R, V, parts, BLOCK=triton.next_power_of_2(parts), num_warps=2, **early
    )
    return place_R
