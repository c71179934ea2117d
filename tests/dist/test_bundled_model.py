"""Law 2 with the bundled model, which really retrieves: at 8K its answers are the mask oracle's."""

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

TOKENS, QUERIES = 8192, 4
SIZES = dict(block_size=1024, anchor_size=768)  # 8 blocks: 2, 3 and 4 ranks have different shards


@functools.cache
def sample() -> Any:
    return make("niah_multikey", bundled_tokenizer(), TOKENS, seed=1)


def facts() -> list[Any]:
    return sample().facts[:: len(sample().facts) // QUERIES][:QUERIES]


def query_ids(fact: Any) -> list[int]:
    ids: list[int] = bundled_tokenizer()(fact.query, add_special_tokens=False).input_ids
    return ids


def answer(comm: TorchComm, method: str, tensor_parallel: int) -> dict[str, Any]:
    sizes: dict[str, Any] = SIZES if method == "star" else {}
    settings: dict[str, Any] = dict(comm=comm, method=method, **sizes)
    if tensor_parallel > 1:
        settings |= dict(dtype="float32", device="cpu", tensor_parallel=tensor_parallel)
        star = StarLLM.from_pretrained(BUNDLED, **settings)
    else:
        star = StarLLM(bundled_model(), bundled_tokenizer(), **settings)
    context = star.encode(sample().context)
    queries = [query_ids(fact) for fact in facts()]
    replies = star.generate(context, queries, max_new_tokens=ANSWER_TOKENS)
    return dict(
        ids=context.token_ids,
        tokens=[reply.token_ids for reply in replies],
        logits=star.logits(context, queries[0] + replies[0].token_ids[:-1]),
        texts=[reply.text for reply in replies],
    )


@functools.cache
def oracle(method: str) -> Any:
    """Return the context's KV under the method's mask."""
    ids_L = torch.tensor(bundled_tokenizer()(sample().context).input_ids)
    dense = dict(block_size=len(ids_L), anchor_size=len(ids_L))
    return oracle_cache(bundled_model(), ids_L, **(SIZES if method == "star" else dense))


MESHES = [("star", 2, 1), ("star", 4, 1), ("star", 2, 2), ("star", 4, 2), ("ring", 3, 1)]
MESHES += [("ring", 4, 2)]


@pytest.mark.parametrize(
    ("method", "ranks", "tensor_parallel"),
    [("star", 3, 1), *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in MESHES)],
)
def test_answers_at_8k_are_the_oracles(
    pool: Pool, method: str, ranks: int, tensor_parallel: int
) -> None:
    results = pool.run(answer, ranks, method=method, tensor_parallel=tensor_parallel)
    answers = results[0]["tokens"]
    assert [result["tokens"] for result in results] == [answers] * ranks
    cache = oracle(method)
    assert len(results[0]["ids"]) == cache.get_seq_length()
    for number, (fact, tokens) in enumerate(zip(facts(), answers, strict=True)):
        expected = oracle_answer(bundled_model(), cache, query_ids(fact), tokens)
        assert tokens == expected.argmax(-1).tolist()
        if number == 0:
            scale = max(1.0, expected.abs().max().item())
            logits = results[0]["logits"][-len(tokens) :]
            assert (logits - expected).abs().max().item() <= 1e-4 * scale
    texts = zip(results[0]["texts"], facts(), strict=True)
    assert sum(right(text, fact) for text, fact in texts) >= QUERIES - 1
