"""Law 2 with the bundled model, which really retrieves: its answers are the mask oracle's."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import TorchComm
from tests.dist.pool import Pool
from tests.engines import BUNDLED, bundled_model, bundled_tokenizer
from tests.needles import make
from tests.unit.test_bundled_model import ANSWER_TOKENS, oracle_answer, oracle_cache, right

QUERIES = 4


def sizes(tokens: int) -> dict[str, Any]:
    """8 blocks: 2, 3 and 4 ranks have different shards."""
    return dict(block_size=tokens // 8, anchor_size=3 * tokens // 32)


@functools.cache
def sample(tokens: int) -> Any:
    return make("niah_multikey", bundled_tokenizer(), tokens, seed=1)


def facts(tokens: int) -> list[Any]:
    found = sample(tokens).facts
    return list(found[:: len(found) // QUERIES][:QUERIES])


def query_ids(fact: Any) -> list[int]:
    ids: list[int] = bundled_tokenizer()(fact.query, add_special_tokens=False).input_ids
    return ids


def answer(comm: TorchComm, tokens: int, method: str, tensor_parallel: int) -> dict[str, Any]:
    blocks = sizes(tokens) if method == "star" else {}
    settings: dict[str, Any] = dict(comm=comm, method=method, **blocks)
    if tensor_parallel > 1:
        settings |= dict(dtype="float32", device="cpu", tensor_parallel=tensor_parallel)
        star = StarLLM.from_pretrained(BUNDLED, **settings)
    else:
        star = StarLLM(bundled_model(), bundled_tokenizer(), **settings)
    context = star.encode(sample(tokens).context)
    queries = [query_ids(fact) for fact in facts(tokens)]
    replies = star.generate(context, queries, max_new_tokens=ANSWER_TOKENS)
    return dict(
        ids=context.token_ids,
        tokens=[reply.token_ids for reply in replies],
        logits=star.logits(context, queries[0] + replies[0].token_ids[:-1]),
        texts=[reply.text for reply in replies],
    )


@functools.cache
def oracle(tokens: int, method: str) -> Any:
    """Return the context's KV under the method's mask."""
    ids_L = torch.tensor(bundled_tokenizer()(sample(tokens).context).input_ids)
    dense = dict(block_size=len(ids_L), anchor_size=len(ids_L))
    return oracle_cache(bundled_model(), ids_L, **(sizes(tokens) if method == "star" else dense))


MESHES = [
    ("star", 2, 1),
    ("star", 3, 1),
    ("star", 4, 1),
    ("star", 2, 2),
    ("star", 4, 2),
    ("ring", 3, 1),
]
MESHES += [("ring", 4, 2)]


def test_answers_at_2k_are_the_oracles(pool: Pool) -> None:
    check_against_oracle(pool, 2048, "star", 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "ranks", "tensor_parallel"), MESHES)
def test_answers_at_8k_are_the_oracles(
    pool: Pool, method: str, ranks: int, tensor_parallel: int
) -> None:
    check_against_oracle(pool, 8192, method, ranks, tensor_parallel)


def check_against_oracle(
    pool: Pool, tokens: int, method: str, ranks: int, tensor_parallel: int
) -> None:
    settings: dict[str, Any] = dict(method=method, tensor_parallel=tensor_parallel)
    results = pool.run(answer, ranks, tokens=tokens, **settings)
    answers = results[0]["tokens"]
    assert [result["tokens"] for result in results] == [answers] * ranks
    cache = oracle(tokens, method)
    assert len(results[0]["ids"]) == cache.get_seq_length()
    for number, (fact, answered) in enumerate(zip(facts(tokens), answers, strict=True)):
        expected = oracle_answer(bundled_model(), cache, query_ids(fact), answered)
        assert answered == expected.argmax(-1).tolist()
        if number == 0:
            scale = max(1.0, expected.abs().max().item())
            logits = results[0]["logits"][-len(answered) :]
            assert (logits - expected).abs().max().item() <= 1e-4 * scale
    texts = zip(results[0]["texts"], facts(tokens), strict=True)
    assert sum(right(text, fact) for text, fact in texts) >= QUERIES - 1
