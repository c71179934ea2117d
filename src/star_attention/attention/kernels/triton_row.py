"""A matrix times one row; ours, in Triton.

cuBLAS moves the weights of a single token at two thirds of the memory's bandwidth on Hopper (bench/results), this at nine tenths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_BLOCK_K = 1024


@triton.jit
def _row(x_ptr, w_ptr, bias_ptr, out_ptr, K, stride, BLOCK_K: tl.constexpr, BIAS: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    sum_K = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_K = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        sum_K += x_K * tl.load(w_ptr + n * stride + k, mask=k < K, other=0.0).to(tl.float32)
    out = tl.sum(sum_K, 0)
    if BIAS:
        out += tl.load(bias_ptr + n).to(tl.float32)
    tl.store(out_ptr + n, out)


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` of a single row, `[..., K]` to `[..., N]`; sums in fp32."""
    N, K = weight_NK.shape
    out = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    _row[(N,)](
        x.contiguous(), weight_NK, weight_NK if bias_N is None else bias_N, out, K, weight_NK.stride(0),
        BLOCK_K=_BLOCK_K, BIAS=bias_N is not None, num_warps=4,
    )  # fmt: skip
    return out


class RowLinear(nn.Linear):
    """A linear layer that takes `linear` for a single row where it is compiled; in plain calls it is the one of torch."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and input.numel() == input.shape[-1]:
            return linear(input, self.weight, self.bias)
        return super().forward(input)


def fits(module: nn.Module) -> bool:
    """Whether a module may become a `RowLinear`: a plain linear layer of plain weights (not of a quantized kind)."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.stride(1) == 1
