"""Cases of attention with random tensors, and the budget of error that each must keep.

The budget is twice the error of a plain implementation in the working dtype (`tests.tolerances`),
both measured against the oracle in float64.

Axes: B batch, Q queries, K keys, H query heads, G KV heads, D head size of keys, V of values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from star_attention.attention.attend import Rule
from star_attention.attention.oracle import masked_attention
from star_attention.attention.state import State
from tests.tolerances import FACTOR, FLOOR

DTYPES = list(FLOOR)
BATCH = 2


@dataclass(frozen=True)
class Case:
    """Q queries, the first `offset` tokens after the first of K keys.

    The first `hidden` keys of each batch row are padding.
    """

    Q: int
    K: int
    offset: int
    window: int | None = None
    softcap: float | None = None
    hidden: tuple[int, int] | None = None

    def visible(self) -> Tensor:
        """Return which keys each query sees, bool `[B, Q, K]`."""
        distance_QK = torch.arange(self.Q)[:, None] + self.offset - torch.arange(self.K)[None]
        visible_QK = distance_QK >= 0
        if self.window is not None:
            visible_QK = visible_QK & (distance_QK < self.window)
        hidden_B11 = torch.tensor(self.hidden or (0, 0))[:, None, None]
        return visible_QK[None] & (torch.arange(self.K)[None, None] >= hidden_B11)

    def key_mask(self) -> Tensor | None:
        if self.hidden is None:
            return None
        return torch.arange(self.K)[None] >= torch.tensor(self.hidden)[:, None]


def tensors(
    case: Case, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Make queries, keys and values, the latter two in the memory layout of a cache."""
    generator = torch.Generator().manual_seed(case.Q * 100 + case.K)
    (H, G), (D, V) = heads, sizes
    q_BQHD = torch.randn(BATCH, case.Q, H, D, generator=generator)
    k_BGKD, v_BGKD = (torch.randn(BATCH, G, case.K, size, generator=generator) for size in (D, V))
    return q_BQHD.to(dtype), k_BGKD.to(dtype).transpose(1, 2), v_BGKD.to(dtype).transpose(1, 2)


def plain(q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, keep_BQK: Tensor, rule: Rule) -> State:
    """Compute attention in the obvious way, every step in the working dtype."""
    groups = q_BQHD.shape[2] // k_BKGD.shape[2]
    k_BKHD, v_BKHD = (t.repeat_interleave(groups, 2) for t in (k_BKGD, v_BKGD))
    scores_BHQK = torch.einsum("bqhd,bkhd->bhqk", q_BQHD, k_BKHD) * rule.scale
    if rule.softcap is not None:
        scores_BHQK = torch.tanh(scores_BHQK / rule.softcap) * rule.softcap
    scores_BHQK = scores_BHQK.masked_fill(~keep_BQK[:, None], float("-inf"))
    weights_BHQK = torch.softmax(scores_BHQK, -1).nan_to_num(0.0)
    out_BQHD = torch.einsum("bhqk,bkhd->bqhd", weights_BHQK, v_BKHD)
    return State(out_BQHD, torch.logsumexp(scores_BHQK, -1).transpose(1, 2))


def error(actual: Tensor, exact: Tensor) -> float:
    """Return the largest difference; infinite elements must be the same in both."""
    assert actual.shape == exact.shape
    assert torch.equal(actual.isinf(), exact.isinf())
    finite = ~exact.isinf()
    return (actual.double() - exact.double())[finite].abs().max().item() if finite.any() else 0.0


@dataclass(frozen=True)
class Right:
    """The oracle's state, and how far another one may be from it.

    Attributes:
        state: the oracle's, in float64.
        budgets: largest errors of its two tensors.
        empty_BQ: which queries see no key.
    """

    state: State
    budgets: tuple[float, float]
    empty_BQ: Tensor

    def check(self, state: State) -> None:
        assert state.lse_BQH.dtype == torch.float32
        for value, right, budget in zip(state, self.state, self.budgets, strict=True):
            assert not value.isnan().any()
            assert error(value, right) <= budget
        assert (state.out_BQHD[self.empty_BQ] == 0).all()
        assert (state.lse_BQH[self.empty_BQ] == float("-inf")).all()


def right_of(q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, keep_BQK: Tensor, rule: Rule) -> Right:
    exact = masked_attention(
        q_BQHD, k_BKGD, v_BKGD, keep_BQK, scale=rule.scale, softcap=rule.softcap
    )
    rough = plain(q_BQHD, k_BKGD, v_BKGD, keep_BQK, rule)
    out, lse = (
        FACTOR * error(value, right) + FLOOR[q_BQHD.dtype]
        for value, right in zip(rough, exact, strict=True)
    )
    return Right(exact, (out, lse), ~keep_BQK.any(-1))


def assert_within_budget(
    state: State, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, keep_BQK: Tensor, rule: Rule
) -> None:
    right_of(q_BQHD, k_BKGD, v_BKGD, keep_BQK, rule).check(state)


def rule_of(case: Case, D: int) -> Rule:
    return Rule(scale=D**-0.5, window=case.window, softcap=case.softcap)
