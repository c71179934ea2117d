"""Rows of scores whose highest is hard to tell, and torch's answer."""

from __future__ import annotations

import torch
from torch import Tensor

from star_attention.linear import triton_highest

VOCABULARIES = [1, 96, 2048, 5000, 128_256]


def check(device: str, dtype: torch.dtype, vocabulary: int) -> None:
    torch.manual_seed(vocabulary)
    scores_RV = torch.randint(-4, 4, (9, vocabulary)).to(device, dtype)
    last = vocabulary - 1
    scores_RV[1, vocabulary // 2 :] = float("nan")
    scores_RV[2] = float("-inf")
    scores_RV[3, last] = 9
    scores_RV[4] = -0.0
    scores_RV[4, last] = 0.0
    scores_RV[5] = torch.randn(vocabulary).to(device, dtype)
    scores_RV[6] = -scores_RV[5].abs() - 1
    scores_RV[7, [last // 2, last]] = float("inf")
    scores_RV[8, last] = -float("nan")
    for each in (scores_RV, scores_RV[:1], scores_RV.repeat(1, 2)[:, :vocabulary]):
        _assert_highest(each)


def _assert_highest(scores_RV: Tensor) -> None:
    place_R = triton_highest.highest(scores_RV)
    assert place_R.dtype == torch.int64
    # On the CPU torch takes the first of equal ones.
    assert torch.equal(place_R.cpu(), scores_RV.cpu().float().argmax(-1))
