"""What follows a single row (`linear.triton_norm`), and the same in float64."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from star_attention.linear.triton_norm import RowNorms

PARTS = [
    (post, residual, pre)
    for post, residual, pre in itertools.product((False, True), repeat=3)
    if residual or (pre and not post)
]
"""Which parts there are: the norm of the row, the residual, the norm of the sum."""


def norms_of(row: Tensor, parts: tuple[bool, bool, bool], seed: int = 0) -> RowNorms:
    """Return what follows rows of one shape, precision and device."""
    from star_attention.linear.triton_norm import RowNorms

    random = torch.Generator().manual_seed(1000 + seed)
    post, residual, pre = parts

    def weight() -> Tensor:
        return torch.randn(row.shape[-1], generator=random).to(row.device, row.dtype)

    return RowNorms(
        weight() if post else None,
        0.5 if seed % 2 else 1.0,
        torch.randn(row.shape, generator=random).to(row.device, row.dtype) if residual else None,
        weight() if pre else None,
        (1.0, 0.0) if seed % 3 else (0.0, 1.0),
        (1e-5, 1e-6),
    )


def exact(row: Tensor, norms: RowNorms) -> list[Tensor]:
    """Return the results in float64."""

    def norm(x: Tensor, weight: Tensor, at: int) -> Tensor:
        factor = torch.rsqrt(x.square().mean(-1, keepdim=True) + norms.eps[at])
        return x * factor * (weight.double() + norms.offsets[at])

    x, results = row.double(), []
    if norms.post is not None:
        x = norm(x, norms.post, 0)
    if norms.residual is not None:
        x = x * norms.times + norms.residual.double()
        results.append(x)
    if norms.pre is not None:
        results.append(norm(x, norms.pre, 1))
    return results


def check(results: list[Tensor], row: Tensor, norms: RowNorms, *, eps: float | None = None) -> None:
    """Compare results with those in float64: rounded once, or as near as sums in float32 are.

    Args:
        eps: what rounding may change, if not half of the precision's.
    """
    eps = eps or max(torch.finfo(row.dtype).eps, 1e-6)
    rights = exact(row, norms)
    assert len(results) == len(rights)
    for result, right in zip(results, rights, strict=True):
        assert (result.shape, result.dtype) == (row.shape, row.dtype)
        assert (result.double() - right).norm() <= eps * right.norm()
