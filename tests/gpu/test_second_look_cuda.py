"""A second look on a GPU: its kernel against the oracle, and a small model against the CPU."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from star_attention import StarLLM
from star_attention.attention.attend import Rule
from star_attention.attention.oracle import masked_attention
from star_attention.attention.scattered import Rows, attend_rows

pytestmark = pytest.mark.gpu
K, Q, H, G = 6000, 2300, 6, 3


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
def test_rows_see_the_keys_up_to_their_own(
    head_size: int, window: int | None, dtype: torch.dtype
) -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    positions = sorted(random.Random(0).sample(range(K), Q))
    q, k, v = (
        torch.randn(1, tokens, heads, head_size, device=device).to(dtype)
        for tokens, heads in ((Q, H), (K, G), (K, G))
    )
    rule = Rule(scale=head_size**-0.5, window=window)
    state = attend_rows(q, k, v, rule=rule, rows=Rows(positions, device), first_key=0)
    back_QK = torch.tensor(positions, device=device)[:, None] - torch.arange(K, device=device)
    keep_QK = (back_QK >= 0) & (back_QK < (window or K))
    right = masked_attention(q, k, v, keep_QK, scale=rule.scale)
    error = (state.out_BQHD.double() - right.out_BQHD).norm() / right.out_BQHD.norm()
    assert error < (1e-5 if dtype == torch.float32 else 6e-3)
    torch.testing.assert_close(state.lse_BQH.double(), right.lse_BQH.double(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_answers_are_those_of_the_cpu(share: float) -> None:
    config = LlamaConfig(
        hidden_size=384,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=500,
        initializer_range=0.06,
    )
    torch.manual_seed(0)
    on_cpu = LlamaForCausalLM(config).eval()
    ids, query = torch.randint(3, 500, (1601,)), torch.randint(3, 500, (40,))

    def answer(model: Any) -> Any:
        star = StarLLM(model, block_size=256, anchor_size=64, tokens_per_forward=100)
        return star.generate(
            star.encode(ids),
            query,
            second_look=share,
            max_new_tokens=4,
            ignore_eos=True,
            return_logits=True,
        )

    right, reply = answer(on_cpu), answer(copy.deepcopy(on_cpu).to("cuda"))
    assert reply.token_ids == right.token_ids
    torch.testing.assert_close(reply.logits, right.logits, atol=2e-3, rtol=1e-3)
    assert reply.timings.second_look_s > 0
