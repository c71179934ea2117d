"""Law 2 with the bundled model, which really retrieves: at 8K, on any number of ranks, its answers are the mask oracle's."""

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

TOKENS, QUESTIONS = 8192, 4
SIZES = dict(block_size=1024, anchor_size=768)  # 8 blocks: 2, 3 and 4 ranks have different shares


@functools.cache
def sample() -> Any:
    return make("niah_multikey", bundled_tokenizer(), TOKENS, seed=1)


def facts() -> list[Any]:
    return sample().facts[:: len(sample().facts) // QUESTIONS][:QUESTIONS]


def query(fact: Any) -> list[int]:
    ids: list[int] = bundled_tokenizer()(fact.query, add_special_tokens=False).input_ids
    return ids


def asked(comm: TorchComm, method: str, tensor_parallel: int) -> dict[str, Any]:
    sizes: dict[str, Any] = SIZES if method == "star" else {}
    if tensor_parallel > 1:
        star = StarLLM.from_pretrained(
            BUNDLED, dtype="float32", device="cpu", comm=comm, method=method, tensor_parallel=tensor_parallel, **sizes
        )
    else:
        star = StarLLM(bundled_model(), bundled_tokenizer(), comm=comm, method=method, **sizes)
    context = star.encode(sample().context)
    replies = star.generate(context, [query(fact) for fact in facts()], max_new_tokens=ANSWER_TOKENS)
    first = star.logits(context, query(facts()[0]) + replies[0].token_ids[:-1])
    return dict(ids=context.token_ids, tokens=[reply.token_ids for reply in replies], logits=first, texts=[r.text for r in replies])


@functools.cache
def oracle(method: str) -> Any:
    """The keys and values of the context under the law's mask."""
    ids_L = torch.tensor(bundled_tokenizer()(sample().context).input_ids)
    whole = dict(block_size=len(ids_L), anchor_size=len(ids_L))
    return oracle_cache(bundled_model(), ids_L, **(SIZES if method == "star" else whole))


MESHES = [("star", 2, 1), ("star", 4, 1), ("star", 2, 2), ("star", 4, 2), ("ring", 3, 1), ("ring", 4, 2)]


@pytest.mark.parametrize(
    ("method", "ranks", "tensor_parallel"),
    [("star", 3, 1), *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in MESHES)],
)
def test_answers_at_8k_are_the_oracles(pool: Pool, method: str, ranks: int, tensor_parallel: int) -> None:
    results = pool.run(asked, ranks, method=method, tensor_parallel=tensor_parallel)
    assert [result["tokens"] for result in results] == [results[0]["tokens"]] * ranks
    cache, questions = oracle(method), facts()
    assert len(results[0]["ids"]) == cache.get_seq_length()
    for number, (fact, tokens) in enumerate(zip(questions, results[0]["tokens"], strict=True)):
        logits = oracle_answer(bundled_model(), cache, query(fact), tokens)
        assert tokens == logits.argmax(-1).tolist()
        if number == 0:
            scale = max(1.0, logits.abs().max().item())
            ours = results[0]["logits"][-len(tokens) :]
            assert (ours - logits).abs().max().item() <= 1e-4 * scale
    assert sum(right(text, fact) for text, fact in zip(results[0]["texts"], questions, strict=True)) >= QUESTIONS - 1
