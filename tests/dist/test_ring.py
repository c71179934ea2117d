"""Ring attention over ranks is dense attention, in both layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import TorchComm
from star_attention.errors import InvalidInputError
from star_attention.hf.shape import model_shape
from star_attention.planning import traffic
from tests.dist.checks import answer, check_tiny
from tests.dist.pool import Pool
from tests.dist.test_ranks_are_invisible import FAMILIES
from tests.engines import CONTEXT, engine, ids, tiny
from tests.tiers import in_turn
from tests.unit.test_golden import CASES, close, expected_logits, star_with, tensors

DENSE = dict(block_size=CONTEXT, anchor_size=0)
# Each turn has both layouts.
WAYS = [(2, "zigzag"), (4, "zigzag"), (3, "contiguous"), (2, "contiguous")]


@pytest.mark.parametrize(("name", "ranks", "layout"), in_turn(2, FAMILIES, WAYS))
def test_every_family(pool: Pool, name: str, ranks: int, layout: str) -> None:
    results = pool.run(answer, ranks, name=name, method="ring", ring_layout=layout)
    assert all(result["layout"][rank] for rank, result in enumerate(results)), (
        "every rank has tokens"
    )
    check_tiny(results, name, **DENSE)


def answer_short_context(comm: TorchComm, tokens: int) -> tuple[list[int], int]:
    star = engine("llama", comm=comm, method="ring")
    context = star.encode(ids(tokens))
    return star.generate(context, [5, 6], max_new_tokens=4).token_ids, context.kv.tokens


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 17])
def test_short_contexts(pool: Pool, tokens: int) -> None:
    star = engine("llama", method="dense")
    expected = star.generate(star.encode(ids(tokens)), [5, 6], max_new_tokens=4).token_ids
    results = pool.run(answer_short_context, 4, tokens=tokens)
    assert [token_ids for token_ids, _ in results] == [expected] * 4
    assert sum(shard_tokens for _, shard_tokens in results) == tokens


def count_bytes(comm: TorchComm, name: str) -> Any:
    """Return the traffic of phase 1; and check that the context cannot be extended."""
    star = StarLLM(tiny(name), comm=comm, method="ring")
    context = star.encode(ids(CONTEXT))
    with pytest.raises(InvalidInputError, match="cannot be extended"):
        star.extend(context, [5, 6])
    return context.wire


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gemma3n"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_are_the_plans(pool: Pool, name: str, ranks: int) -> None:
    expected = traffic.ring_cp(model_shape(tiny(name).config, "float32"), CONTEXT, ranks)
    assert pool.run(count_bytes, ranks, name=name)[0] == expected


CASES_BY_NAME = {case["name"]: case for case in CASES}


def answer_golden_case(comm: TorchComm, name: str) -> dict[str, Any]:
    case = CASES_BY_NAME[name]
    sizes: dict[str, Any] = dict(method=case["mode"])
    if case["mode"] == "star":
        anchor = case["anchor_block_size"]
        sizes |= dict(block_size=case["block_size"], anchor_size=None if anchor == -1 else anchor)
    star = StarLLM(star_with(case["checkpoint"]).model, comm=comm, **sizes)
    context = star.encode(case["context_ids"])
    query_QV = star.logits(context, case["query_ids"])
    reply = star.generate(
        context, case["query_ids"], max_new_tokens=12, ignore_eos=True, return_logits=True
    )
    kv = [[layer.slice(*segment) for segment in layer.segments] for layer in context.kv.layers]
    return dict(
        query=query_QV, tokens=reply.token_ids, steps=reply.logits, kv=kv, layout=context.layout
    )


@pytest.mark.parametrize(("name", "ranks"), in_turn(2, list(CASES_BY_NAME), [2, 3]))
def test_golden_cases(pool: Pool, name: str, ranks: int) -> None:
    """The official implementation's cases, on other numbers of ranks than it used."""
    case = CASES_BY_NAME[name]
    results = pool.run(answer_golden_case, ranks, name=name)
    expected_query_QV, expected_steps_TV, tolerance = expected_logits(case)
    close(results[0]["query"], expected_query_QV, tolerance)
    close(results[0]["steps"], expected_steps_TV, tolerance)
    official = tensors(f"{case['checkpoint']}.safetensors")
    for rank, result in enumerate(results):
        assert result["tokens"] == case["generated_ids"]
        assert rank == 0 or result["query"] is None
        for index, parts in enumerate(result["kv"]):
            for (start, stop), pair in zip(result["layout"][rank], parts, strict=True):
                for tensor_1GLD, kind in zip(pair, "kv", strict=True):
                    whole_GLD = official[f"{case['name']}/phase1/{index}.{kind}"]
                    torch.testing.assert_close(
                        tensor_1GLD[0], whole_GLD[:, start:stop], atol=1e-4, rtol=0
                    )
