"""Rows of 16-bit numbers as words of 32 bits, of two numbers each, in Triton.

A thread reads fewer of them. A row of other numbers has one for each word.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def numbers(words, DTYPE: tl.constexpr):
    """Return the first and the second numbers of words, in fp32; zeros if they have only one."""
    if DTYPE == tl.float32:
        first = words.to(tl.float32, bitcast=True)
        second = tl.zeros_like(first)
    else:
        first = words.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        second = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def words_of(first, second, DTYPE: tl.constexpr):
    """Return the words of numbers, which are rounded."""
    if DTYPE == tl.float32:
        words = first.to(tl.int32, bitcast=True)
    else:
        low = first.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        words = low | (second.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return words


DTYPES: dict[torch.dtype, Any] = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}
"""Triton's types of the numbers in words."""


def dtype_of(tensor: Tensor) -> Any:
    """Return Triton's type of the numbers in a tensor's words; None if it has no such words."""
    if tensor.numel() * tensor.element_size() % 4:
        return None
    return DTYPES.get(tensor.dtype)


def view(tensor: Tensor) -> Tensor:
    """Return the words of a tensor, which is copied where they are not aligned."""
    tensor = tensor.contiguous().view(-1)
    if tensor.data_ptr() % 4:
        tensor = tensor.clone()
    return tensor.view(torch.int32)
