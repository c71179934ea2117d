"""Linear layers whose weights are in fp8, and kernels for products of few rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def is_one_token(x: Tensor) -> bool:
    """True for activations `[..., tokens, K]` of a single token of each row."""
    return x.dim() > 1 and x.shape[-2] == 1
