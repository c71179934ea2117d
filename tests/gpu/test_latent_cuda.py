"""MLA on a GPU: the kernel over compressed keys, and answers by CUDA graphs against eager ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from star_attention import StarLLM
from star_attention.attention.kernels import triton_absorb
from star_attention.attention.latent import Expansion
from star_attention.attention.state import merge
from tests.engines import ids
from tests.latent_oracle import CASES, SHARDS, Case, Tensors

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_compressed_attention(name: str, dtype: torch.dtype) -> None:
    """Within twice the error of a plain implementation in that precision."""
    case = CASES[name]
    tensors = Tensors(case, dtype, "cuda")
    state = tensors.attend([(0, case.L)])
    for tail, new in zip(tensors.tails, tensors.new, strict=True):
        assert torch.equal(tail[:, :, case.T : case.T + case.Q], new)
    tensors.check(state, 4e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shards", SHARDS)
def test_ranks_merge_to_the_whole(shards: str) -> None:
    tensors, layout = Tensors(Case(C=512, P=64), torch.bfloat16, "cuda"), SHARDS[shards]
    states = [
        tensors.attend(segments, holds_tail=rank == len(layout))
        for rank, segments in enumerate(layout, start=1)
    ]
    tensors.check(merge(states), 4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_around_a_token(dtype: torch.dtype) -> None:
    """Within the rounding of the results; the new key is stored."""
    case, N, V = Case(C=512, P=64), 128, 128
    tensors = Tensors(case, dtype, "cuda")
    weight = (torch.randn(case.H, N + V, case.C) / case.C**0.5).to("cuda", dtype)
    expansion, exact = Expansion(weight, N), Expansion(weight.double(), N)
    q = torch.randn(1, case.H, 1, N + case.P).to("cuda", dtype).transpose(1, 2)
    tables, _addressed = tensors.tables([(0, case.L)])
    out = triton_absorb.absorb(q, tensors.new, expansion, tables=tables, layer=1)
    for tail, new in zip(tensors.tails, tensors.new, strict=True):
        assert torch.equal(tail[:, :, case.T : case.T + 1], new)
    eps, right = torch.finfo(dtype).eps, exact.absorb(q.double())
    assert (out.double() - right).norm() <= eps * right.norm()
    mean = torch.randn(1, 1, case.H, case.C, device="cuda")
    right = torch.einsum("bqhc,hvc->bqhv", mean.double(), exact.weight_HXC[:, N:])
    out = triton_absorb.expand(mean, expansion, dtype)
    assert (out.double() - right).norm() <= eps * right.norm()


def deepseek(dtype: torch.dtype) -> Any:
    """A small model with the attention of DeepSeek-V2-Lite."""
    config = DeepseekV2Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=16,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        topk_method="greedy",
        max_position_embeddings=2**15,
    )
    torch.manual_seed(0)
    model: Any = DeepseekV2ForCausalLM(config).eval().to("cuda", dtype)
    if dtype == torch.float32:
        # Grouped products of other precisions than bfloat16 wait for the device.
        model.set_experts_implementation("batched_mm")
    return model


@pytest.mark.parametrize("kv_dtype", [None, "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_answer_as_eager_forwards(dtype: torch.dtype, kv_dtype: str | None) -> None:
    model = deepseek(dtype)
    settings: dict[str, Any] = dict(max_new_tokens=60, ignore_eos=True, return_logits=True)
    replies = []
    for fast in (True, False):
        star = StarLLM(model, compile=fast, block_size=1024, kv_dtype=kv_dtype)
        context = star.encode(ids(5000))
        replies.append([star.generate(context, ids(9, seed=seed), **settings) for seed in (2, 3)])
        # The second context replays what the first has captured.
        other = star.encode(ids(3000, seed=4))
        replies[-1].append(star.generate(other, ids(9, seed=5), **settings))
        if fast:
            graphs = star.runtime.handle.graphs
            assert graphs is not None
            assert {key[:2] for key, made in graphs.captured.items() if made} == {(1, 1), (1, 16)}
    for by_graph, eager in zip(*replies, strict=True):
        # Random weights rank tokens by less than bfloat16 resolves: only logits are alike there.
        same = 60 if dtype == torch.float32 else 1
        if dtype == torch.float32:
            assert by_graph.token_ids == eager.token_ids
        error = (by_graph.logits[:same] - eager.logits[:same]).norm() / eager.logits[:same].norm()
        assert error < (1e-4 if dtype == torch.float32 else 2e-2)


def test_a_query_that_is_too_long_for_a_graph_expands_the_context() -> None:
    star = StarLLM(deepseek(torch.bfloat16), compile=True, block_size=1024)
    context = star.encode(ids(5000))
    assert len(star.generate(context, ids(200), max_new_tokens=5, ignore_eos=True).token_ids) == 5
    graphs = star.runtime.handle.graphs
    assert graphs is not None
    assert {key[:2] for key, made in graphs.captured.items() if made} == {(1, 1)}
