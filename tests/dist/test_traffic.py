"""The bytes and the work that were counted are those that the plan predicts."""

from __future__ import annotations

from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.attention import attend
from star_attention.distributed import TorchComm
from star_attention.hf.shape import model_shape
from star_attention.planning import traffic
from star_attention.planning.plan import BlockPlan
from star_attention.planning.traffic import Traffic, merge_choice
from tests.dist.pool import Pool
from tests.engines import CONTEXT, ids, tiny
from tests.tiers import in_turn

SIZES = dict(block_size=24, anchor_size=10)
QUERY, ANSWER = 9, 5


def count_bytes(
    comm: TorchComm, name: str, anchor_source: str, tokens_per_forward: int
) -> dict[str, Any]:
    star = StarLLM(
        tiny(name),
        comm=comm,
        anchor_source=anchor_source,
        tokens_per_forward=tokens_per_forward,
        **SIZES,
    )
    context = star.encode(ids(CONTEXT))
    reply = star.generate(context, ids(QUERY), max_new_tokens=ANSWER, ignore_eos=True)
    return dict(phase1=context.wire, phase2=reply.wire, stats=context.stats)


WAYS = [
    (2, None, "broadcast"),
    (3, "reduce", "local"),
    (4, "gather", "broadcast"),
    (7, None, "broadcast"),
]


@pytest.mark.parametrize(
    ("name", "tokens_per_forward", "ranks", "merge_collective", "source"),
    in_turn(2, ["llama", "deepseek_v3", "gemma3n"], [4, 48], WAYS),
)
def test_bytes_are_the_plans(
    pool: Pool,
    name: str,
    ranks: int,
    merge_collective: str | None,
    source: str,
    tokens_per_forward: int,
) -> None:
    results = pool.run(
        count_bytes,
        ranks,
        merge_collective=merge_collective,
        name=name,
        anchor_source=source,
        tokens_per_forward=tokens_per_forward,
    )
    shape = model_shape(tiny(name).config, "float32")
    plan = BlockPlan(context_tokens=CONTEXT, **SIZES, ranks=ranks)
    phase1 = traffic.phase1_cp(
        shape, plan, tokens_per_forward=tokens_per_forward, anchor_source=source
    )
    phase2 = traffic.phase2_cp(
        shape,
        ranks,
        query_tokens=QUERY,
        answer_tokens=ANSWER,
        tokens_per_forward=tokens_per_forward,
        merge_collective=merge_collective,
    )
    assert results[0]["phase1"] == phase1
    assert (phase1 == Traffic()) == (source == "local")
    assert [result["phase2"] for result in results] == [phase2] * ranks
    assert phase2.bytes > 0
    assert [len(result["stats"]) for result in results] == [ranks] * ranks
    assert [result["stats"] for result in results] == [results[0]["stats"]] * ranks


def test_the_collective_that_moves_fewer_bytes_is_chosen() -> None:
    heads, size = 32, 128
    assert merge_choice(2, heads, size) == "gather", "2 ranks: equal bytes, one collective less"
    assert merge_choice(8, heads, size) == "gather", "16 KB are not worth another collective"
    assert merge_choice(4, 64 * heads, size) == "gather", "3 MB a rank against 1.5 MB"
    assert merge_choice(3, 512 * heads, size) == "reduce"
    assert merge_choice(8, 64 * heads, size) == "reduce"
    assert merge_choice(64, 4 * heads, size) == "reduce"


def count_work(comm: TorchComm, anchor_source: str) -> tuple[int, int]:
    """Return the tokens through this rank's linear layers, and its pairs of attention."""
    model = tiny("llama")
    star = StarLLM(model, comm=comm, block_size=16, anchor_source=anchor_source)
    star.encode(ids(16))  # the probe of what layers store is not counted
    tokens = 0
    pairs = 0

    def count_tokens(module: Any, arguments: Any, output: Any) -> None:
        nonlocal tokens
        tokens += arguments[0].shape[1]

    def run(q_BQHD: Any, k_BKGD: Any, v_BKGD: Any, *, causal: bool = False, **kwargs: Any) -> Any:
        nonlocal pairs
        B, Q, K = q_BQHD.shape[0], q_BQHD.shape[1], k_BKGD.shape[1]
        assert kwargs.get("mask_BQK") is None
        pairs += B * (Q * (Q + 1) // 2 if causal else Q * K)
        return real(q_BQHD, k_BKGD, v_BKGD, causal=causal, **kwargs)

    real = attend.run
    mlp = model.get_decoder().layers[0].mlp.register_forward_hook(count_tokens)
    attend.run = run
    try:
        star.encode(ids(8 * 16))
    finally:
        attend.run = real
        mlp.remove()
    return tokens, pairs // model.config.num_hidden_layers


@pytest.mark.parametrize("ranks", [2, 4])
def test_work_per_rank_falls_with_the_number_of_ranks(pool: Pool, ranks: int) -> None:
    """k blocks of b tokens are k b tokens through the linear layers.

    The official scheme sends 2 k b, with the anchor again for each block.
    """
    b, k = 16, 8 // ranks
    own, anchor = k * b * (b + 1) // 2, b * b
    for rank, (tokens, pairs) in enumerate(pool.run(count_work, ranks, anchor_source="broadcast")):
        assert tokens == k * b
        assert pairs == own + (k - (rank == 0)) * anchor
    for rank, (tokens, _) in enumerate(pool.run(count_work, ranks, anchor_source="local")):
        assert tokens == k * b + (b if rank else 0), "the anchor once a rank, not once a block"
