"""Weights in slices: nothing in the answers shows that each rank multiplies only a part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import SoloComm, TorchComm
from star_attention.distributed.groups import PEERS
from star_attention.hf.cache.decode import AnswerCache
from star_attention.hf.execution import compiled, slices
from star_attention.hf.execution.compiled import STEP
from star_attention.hf.shape import model_shape
from star_attention.planning import traffic
from tests.dist.checks import answer_with, check_model
from tests.dist.pool import Pool
from tests.dist.test_peers import HostMemory, connected
from tests.engines import CONTEXT, ids
from tests.families import build

SIZES: dict[str, Any] = dict(block_size=24, anchor_size=10)
HEADS: dict[str, Any] = dict(num_attention_heads=12, num_key_value_heads=12, intermediate_size=120)
"""Heads that divide by 2, 3 and 4; rows of the MLP that do not divide by 3 x 16."""

FAMILIES = {
    "llama": HEADS,
    "qwen2": HEADS,
    "qwen3": HEADS,
    "gemma2": HEADS,
    "gemma3": HEADS,
    "mistral": HEADS,
    "starcoder2": HEADS,
    "llama_dynamic_ntk": HEADS,
    "olmo2": HEADS,
    "cohere": HEADS,
    "mixtral": HEADS,
    "qwen3_moe": HEADS,
    "gemma4": HEADS,
    "gpt_oss": {},
    "phi3": {},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "gemma3n": {},
    "llama_mqa": {},
    "gpt2": {},
}
QUICK = ("llama", "qwen2", "gemma3", "deepseek_v3", "llama_mqa")


def star_of(comm: Any, name: str, **settings: Any) -> StarLLM:
    model = build(name, **FAMILIES[name])
    defaults = SIZES | dict(reserve_tokens=64, tokens_per_forward=48, slice_weights=True)
    return StarLLM(model, comm=comm, **(defaults | settings))


def answer(comm: TorchComm, name: str, **settings: Any) -> dict[str, Any]:
    return answer_with(star_of(comm, name, **settings))


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param(name, ranks, marks=[] if name in QUICK else pytest.mark.slow)
        for name in FAMILIES
        for ranks in (2, 3, 4)
    ],
)
def test_every_family_against_the_oracle(pool: Pool, name: str, ranks: int) -> None:
    results = pool.run(answer, ranks, name=name)
    check_model(results, build(name, **FAMILIES[name]), **SIZES)


# ------------------------------------------------------------------ answers


def answer_in_all_modes(comm: Any, slice_weights: bool | None) -> Any:
    star = star_of(comm, "gemma3", slice_weights=slice_weights)
    torch.manual_seed(star.rank)  # rank 0 alone samples
    queries = [[5, 6, 7], [8, 9]]
    context = star.encode(ids(90))
    length: dict[str, Any] = dict(max_new_tokens=5, ignore_eos=True)
    sampling: dict[str, Any] = dict(do_sample=True, seed=3, num_return_sequences=2)
    answers = [
        star.generate(context, queries, **length),
        star.generate(context, queries[0], **sampling, **length),
        star.generate(context, queries, num_beams=3, **length),
        star.generate(context, queries[0], prompt_lookup_num_tokens=3, **length),
    ]
    logits = star.logits(context, [5, 6, 7])
    tokens = [
        [reply.token_ids for reply in (replies if isinstance(replies, list) else [replies])]
        for replies in answers
    ]
    return tokens, logits


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_mode_is_as_on_one_rank(pool: Pool, ranks: int) -> None:
    expected, expected_logits = answer_in_all_modes(SoloComm(), None)
    results = pool.run(answer_in_all_modes, ranks, slice_weights=True)
    assert [tokens for tokens, _ in results] == [expected] * ranks
    torch.testing.assert_close(results[0][1], expected_logits, atol=2e-4, rtol=1e-4)


def answer_with_each_setting(comm: TorchComm) -> Any:
    star = star_of(comm, "llama")
    context = star.encode(ids(CONTEXT))
    replies = []
    for slice_weights in (True, False, None):
        engine = star.with_config(slice_weights=slice_weights)
        reply = engine.generate(context, [5, 6], max_new_tokens=4, ignore_eos=True)
        replies.append((reply.token_ids, reply.wire.calls))
    return replies


def test_the_setting_of_an_engine(pool: Pool) -> None:
    results = pool.run(answer_with_each_setting, 2)
    assert results[1] == results[0]
    (sliced, calls), (whole, fewer_calls), by_rule = results[0]
    assert sliced == whole
    assert calls > fewer_calls
    assert by_rule == (whole, fewer_calls), "gloo ranks take whole weights"


def answer_compiled(comm: TorchComm, kernels: str = "") -> Any:
    """One token through compiled layers, as CUDA graphs capture it.

    Args:
        kernels: the operation of ranks that write into each other's memory which sums over them,
            in Triton's interpreter; "" for plain operations.
    """
    dtype = torch.half if kernels == "add_product" else torch.float
    with pytest.MonkeyPatch.context() as patch:
        if kernels:
            patch.setattr(compiled, "triton_works", lambda device: True)
            patch.setattr(slices, "triton_works", lambda device: True)
        star = StarLLM(build("llama", **HEADS).to(dtype), comm=comm, compile=True, **SIZES)
        context = star.encode(ids(CONTEXT))
        handle, mesh = star.runtime.handle, star.runtime.comm
        results = []
        for parts in ((), ("attention", "mlp", "head")):
            sliced = slices.of(handle, parts, mesh)
            cache = AnswerCache(context.kv, handle.windows, CONTEXT, [0], mesh, sliced)
            with memory_of(comm, kernels) as calls:
                for position in range(CONTEXT, CONTEXT + 2):
                    ids_11, positions_11 = torch.tensor([[7]]), torch.tensor([[position]])
                    logits = handle.logits(ids_11, positions_11, cache, None, compiled_for=STEP)
            results.append(logits.float())
    assert handle.compiled is not None
    assert handle.compiled.whole
    return results, len(calls)


@contextmanager
def memory_of(comm: TorchComm, operation: str) -> Iterator[list[int]]:
    """Let ranks write into each other's memory, and note the calls of an operation."""
    calls: list[int] = []
    if not operation:
        yield calls
        return
    memory = HostMemory()
    with comm.collective("a test"):
        peers = connected(comm, memory)
    run = getattr(peers, operation)

    def noted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return run(*args, **options)

    setattr(peers, operation, noted)
    key = PEERS, range(comm.size)
    comm.world.groups._groups[key] = peers
    try:
        yield calls
    finally:
        del comm.world.groups._groups[key]
        memory.unlink(peers._own)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["", "add_row", "add_product"])
def test_compiled_layers(pool: Pool, kernels: str) -> None:
    if kernels and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter")
    results = pool.run(answer_compiled, 2, kernels=kernels)
    margin = 2e-2 if kernels == "add_product" else 1e-4
    for (whole, sliced), calls in results:
        torch.testing.assert_close(sliced, whole, atol=margin, rtol=margin)
        assert torch.equal(sliced, results[0][0][1])
        # Two sums in each of three layers, of two tokens.
        assert calls == (2 * 2 * 3 if kernels else 0)


# ------------------------------------------------------------------ traffic


def count_bytes(comm: TorchComm, tokens_per_forward: int) -> Any:
    star = star_of(comm, "llama", tokens_per_forward=tokens_per_forward)
    context = star.encode(ids(CONTEXT))
    return star.generate(context, ids(9), max_new_tokens=5, ignore_eos=True).wire


@pytest.mark.parametrize("tokens_per_forward", [4, 48])
@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_are_the_plans(pool: Pool, ranks: int, tokens_per_forward: int) -> None:
    results = pool.run(count_bytes, ranks, tokens_per_forward=tokens_per_forward)
    model = build("llama", **HEADS)
    predicted = traffic.phase2_cp(
        model_shape(model.config, "float32"),
        ranks,
        query_tokens=9,
        answer_tokens=5,
        tokens_per_forward=tokens_per_forward,
        sliced=("attention", "mlp", "head"),
    )
    assert results == [predicted] * ranks
