"""The norm of a row, and the sum with a residual around it, as one program; rows have one each.

A program reads its row at once, and the norm's weight while the kernel before ends. Inductor's
kernel reads a row of a few thousand numbers in turns, twice, and its weight afterwards.

Nothing in between is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_attention.attention.kernels import triton_pdl
from star_attention.linear import triton_words

MAX_SIZE = 16384
"""Numbers of a row, at most: registers hold them."""
_THREADS_WORDS = 4
"""Words of a thread: 16 bytes."""


class RowNorms(NamedTuple):
    """What follows each row of `x`, in this order. Each part may be missing, but not all.

    Attributes:
        post: weight of the RMS norm of the row, `[K]`, or None; only before a residual.
        times: what it is multiplied with.
        residual: what is added then, of the row's shape, or None. The sum is the first result.
        pre: weight of the RMS norm of that, `[K]`, or None. The norm is the last result.
        offsets: what is added to each weight, of `post` and `pre`.
        eps: what is added to each mean square.
    """

    post: Tensor | None
    times: float
    residual: Tensor | None
    pre: Tensor | None
    offsets: Sequence[float]
    eps: Sequence[float]

    def after(self, row: Tensor) -> list[Tensor]:
        """Return the results for rows `[..., K]`, by one launch; all have their precision."""
        row = row.contiguous()
        outs, (words, sizes) = self.outs(row), words_of(row)
        arguments, constants = self.arguments(row, outs)
        _row[(row.shape[:-1].numel(),)](
            triton_words.view(row), *arguments, words,
            **sizes, **constants, **triton_pdl.options(row.device),
        )  # fmt: skip
        return outs

    def outs(self, row: Tensor) -> list[Tensor]:
        """Return room for the results."""
        results = (self.residual is not None) + (self.pre is not None)
        return [row.new_empty(row.shape) for _ in range(results)]

    def arguments(self, row: Tensor, outs: list[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Return the kernel's arguments after the rows' words, and constants.

        Args:
            row: contiguous rows that stand for missing tensors.
        """
        tensors = [self.residual, self.post, self.pre, *outs[:1], *outs[-1:]]
        words = [triton_words.view(row if each is None else each) for each in tensors]
        constants = dict(
            POST=self.post is not None,
            ADD=self.residual is not None,
            PRE=self.pre is not None,
            POST_OFFSET=self.offsets[0],
            PRE_OFFSET=self.offsets[1],
            DTYPE=triton_words.dtype_of(row),
        )
        return [*words, row.shape[-1], self.times, *self.eps], constants


@triton.jit
def normed(first, second, words, K, eps, OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    """Return the RMS norm of a row in two halves, by the words of its weight."""
    factor = tl.math.rsqrt(tl.sum(first * first + second * second) / K + eps)
    weight0, weight1 = triton_words.numbers(words, DTYPE)
    return first * factor * (weight0 + OFFSET), second * factor * (weight1 + OFFSET)


@triton.jit
def finish(
    first, second, added, post, pre, sum_ptr, out_ptr, at, mask, K, times, post_eps, pre_eps,
    POST: tl.constexpr, ADD: tl.constexpr, PRE: tl.constexpr,
    POST_OFFSET: tl.constexpr, PRE_OFFSET: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Do what follows a row in two halves; `added`, `post` and `pre` are words.

    `at` is where the row's words are stored.
    """
    if POST:
        first, second = normed(first, second, post, K, post_eps, POST_OFFSET, DTYPE)
    if ADD:
        added0, added1 = triton_words.numbers(added, DTYPE)
        first, second = first * times + added0, second * times + added1
        tl.store(sum_ptr + at, triton_words.words_of(first, second, DTYPE), mask=mask)
    if PRE:
        first, second = normed(first, second, pre, K, pre_eps, PRE_OFFSET, DTYPE)
        tl.store(out_ptr + at, triton_words.words_of(first, second, DTYPE), mask=mask)


@triton.jit
def _row(
    x_ptr, add_ptr, post_ptr, pre_ptr, sum_ptr, out_ptr, K, times, post_eps, pre_eps, words,
    BLOCK: tl.constexpr, POST: tl.constexpr, ADD: tl.constexpr, PRE: tl.constexpr,
    POST_OFFSET: tl.constexpr, PRE_OFFSET: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    mask, place = at < words, tl.program_id(0) * words + at
    # Weights do not depend on the kernel before.
    post = tl.load(post_ptr + at, mask=mask, other=0) if POST else at
    pre = tl.load(pre_ptr + at, mask=mask, other=0) if PRE else at
    triton_pdl.begin(PDL)
    x = tl.load(x_ptr + place, mask=mask, other=0)
    added = tl.load(add_ptr + place, mask=mask, other=0) if ADD else at
    first, second = triton_words.numbers(x, DTYPE)
    finish(
        first, second, added, post, pre, sum_ptr, out_ptr, place, mask, K, times, post_eps, pre_eps,
        POST, ADD, PRE, POST_OFFSET, PRE_OFFSET, DTYPE,
    )  # fmt: skip


def serves(x: Tensor) -> bool:
    """Return True if there is a kernel for rows, `[..., K]`."""
    K = x.shape[-1]
    return K <= MAX_SIZE and K * x.element_size() % 4 == 0 and x.dtype in triton_words.DTYPES


def words_of(row: Tensor) -> tuple[int, dict[str, int]]:
    """Return the words of a row, and the size of a program that has it in registers."""
    words = row.shape[-1] * row.element_size() // 4
    block: int = triton.next_power_of_2(words)
    warps = max(1, min(16, block // (32 * _THREADS_WORDS)))
    return words, dict(BLOCK=block, num_warps=warps)


@torch.library.custom_op("star_attention::row_norms", mutates_args=())
def row_norms(
    x: Tensor,
    post: Tensor | None,
    times: float,
    residual: Tensor | None,
    pre: Tensor | None,
    offsets: Sequence[float],
    eps: Sequence[float],
) -> list[Tensor]:
    """`RowNorms.after` in a compiled layer: the other arguments are those of `RowNorms`."""
    return RowNorms(post, times, residual, pre, offsets, eps).after(x)


@row_norms.register_fake
def _(
    x: Tensor,
    post: Tensor | None,
    times: float,
    residual: Tensor | None,
    pre: Tensor | None,
    offsets: Sequence[float],
    eps: Sequence[float],
) -> list[Tensor]:
    return RowNorms(post, times, residual, pre, offsets, eps).outs(x)
