"""Rotary embeddings and tails of new tokens in one launch, on a GPU."""

from __future__ import annotations

import random

import pytest
import torch

from tests.new_oracle import new_tokens

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_new_tokens_in_one_launch(dtype: torch.dtype, normed: bool) -> None:
    draw = random.Random(0)
    for seed in range(20):
        new = new_tokens(seed, 1, dtype, draw, device="cuda", normed=normed)
        before = new.copies()
        out = new.tails.store(*new.own[0], new.rotation)
        new.check(new.own[0][0] if out is None else out, before)
