"""CUDA graphs with collectives inside: answers are those of one rank and of plain forwards."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import SoloComm
from tests.families import FIRST_TOKEN, LAST_TOKEN, build
from tests.gpu import ranks

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parents[2] / "models" / "needle-17m"
TOKENS = 6000
LENGTH: dict[str, Any] = dict(ignore_eos=True, max_new_tokens=20)


def ids(tokens: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 4096, (tokens,), generator=generator).tolist()


def answers(star: StarLLM) -> dict[str, Any]:
    """Answer in every way that steps token by token, and in some that do not."""
    context, other = star.encode(ids(TOKENS)), star.encode(ids(3000, seed=2))
    first = star.generate(context, ids(9, seed=3), return_logits=True, **LENGTH)
    batch = star.generate(context, [ids(tokens, seed=4) for tokens in (9, 30, 2)], **LENGTH)
    sampled = star.generate(
        context, ids(5), do_sample=True, seed=7, num_return_sequences=3, top_k=50, **LENGTH
    )
    streams = [star.stream(on, ids(7), **LENGTH) for on in (context, other)]
    while any([next(stream, None) is not None for stream in streams]):
        pass
    tokens = [
        first.token_ids,
        *(reply.token_ids for reply in batch),
        *(reply.token_ids for reply in sampled),
        *(stream.result.token_ids for stream in streams),
        star.generate(context, ids(300), max_new_tokens=5).token_ids,
        star.generate(context, ids(5), repetition_penalty=1.3, **LENGTH).token_ids,
        star.generate(context, ids(5), num_beams=2, **LENGTH).token_ids,
        # The tail moves as it grows.
        star.generate(context, ids(5), ignore_eos=True, max_new_tokens=100).token_ids,
    ]
    # As an array, because a tensor's memory would go with its process.
    return dict(tokens=tokens, logits=None if star.rank else first.logits.numpy())


def answers_of(comm: Any, device: str, compile: Any, **settings: Any) -> dict[str, Any]:
    """Answer with the bundled model; `compile` may differ between ranks."""
    of_rank = compile if isinstance(compile, bool) else compile[comm.rank]
    star = StarLLM.from_pretrained(
        MODEL, dtype="float32", device=device, comm=comm, compile=of_rank, **settings
    )
    result = answers(star)
    graphs = star.runtime.handle.graphs
    return result | dict(captured=None if graphs is None else graphs.captured)


def solo(**settings: Any) -> dict[str, Any]:
    settings.pop("tensor_parallel", None)
    if settings.get("method") == "ring":
        settings["method"] = "dense"
    return answers_of(SoloComm(), "cuda", False, **settings)


def check(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for result in results:
        assert result["tokens"] == expected["tokens"]
    difference = np.abs(results[0]["logits"] - expected["logits"]).max()
    print(f"largest difference of a logit: {difference:.1e}")
    assert difference <= 1e-4 * max(1.0, np.abs(expected["logits"]).max())


def check_captured(results: list[dict[str, Any]]) -> None:
    """One token and a query, of one row and of several, are graphs on every rank."""
    for result in results:
        print(result["captured"])
        kinds = {key[:2] for key, captured in result["captured"].items() if captured}
        assert {(1, 1), (1, 16), (3, 1), (3, 32)} <= kinds
        assert all(result["captured"].values())


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (2, dict(block_size=1024)),
        (3, dict(block_size=1024)),
        # One block: the other ranks are idle.
        (2, dict(block_size=8192)),
        (2, dict(method="ring")),
        (2, dict(block_size=1024, kv_dtype="fp8")),
        (2, dict(block_size=1024, tensor_parallel=2)),
        (4, dict(block_size=1024, tensor_parallel=2)),
    ],
    ids=str,
)
def test_graphs_on_ranks(size: int, settings: dict[str, Any]) -> None:
    results = ranks.run(answers_of, size, compile=True, **settings)
    check(results, solo(**settings))
    check_captured(results)


@pytest.mark.parametrize("with_graphs", [(True, False), (False, True)])
def test_ranks_with_graphs_and_without(with_graphs: tuple[bool, bool]) -> None:
    settings: dict[str, Any] = dict(block_size=1024)
    check(ranks.run(answers_of, 2, compile=with_graphs, **settings), solo(**settings))


# ---------------------------------------------------------------------- families


FAMILIES = ("gemma3", "gpt_oss", "qwen3", "gemma3n")


def family_answers(comm: Any, device: str, compile: bool) -> list[Any]:
    results = []
    for name in FAMILIES:
        star = StarLLM(
            build(name).to(device),
            comm=comm,
            compile=compile,
            block_size=24,
            anchor_size=10,
            tokens_per_forward=48,
        )
        generator = torch.Generator().manual_seed(1)
        text = torch.randint(FIRST_TOKEN, LAST_TOKEN + 1, (108,), generator=generator).tolist()
        reply = star.generate(star.encode(text[:101]), text[101:], return_logits=True, **LENGTH)
        results.append((reply.token_ids, None if star.rank else reply.logits.numpy()))
    return results


def test_families() -> None:
    """Windows, sinks, norms of heads, layers that share keys."""
    expected = family_answers(SoloComm(), "cuda", compile=False)
    results = ranks.run(family_answers, 3, compile=True)
    for result in results:
        assert [tokens for tokens, _ in result] == [tokens for tokens, _ in expected]
    for name, (_, logits), (_, right) in zip(FAMILIES, results[0], expected, strict=True):
        difference = np.abs(logits - right).max()
        print(f"{name}: largest difference of a logit {difference:.1e}")
        assert difference <= 2e-4 * max(1.0, np.abs(right).max())


# ---------------------------------------------------------------------- memory and time


def measure(comm: Any, device: str, **settings: Any) -> dict[str, Any]:
    star = StarLLM.from_pretrained(
        MODEL, dtype="bfloat16", device=device, comm=comm, block_size=1024, **settings
    )
    context = star.encode(ids(TOKENS))

    def answer(tokens: int) -> None:
        star.generate(context, ids(9), max_new_tokens=tokens, ignore_eos=True)

    def used() -> tuple[int, int]:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    before = used()
    answer(4)
    star.generate(context, [ids(250), ids(200)], max_new_tokens=4)
    after_capture = used()
    start = time.perf_counter()
    answer(1)
    after_first = time.perf_counter()
    answer(201)
    token_s = (time.perf_counter() - after_first - (after_first - start)) / 200
    middle = used()
    for _ in range(200):
        answer(2)
        # A stream left half-way, and one that is closed.
        with contextlib.closing(star.stream(context, ids(5), max_new_tokens=4)) as stream:
            next(stream, None)
    return dict(
        graphs_bytes=after_capture[1] - before[1],
        leaked_bytes=used()[0] - middle[0],
        token_ms=token_s * 1e3,
    )


@pytest.mark.parametrize(("size", "tensor_parallel"), [(2, 1), (2, 2)])
def test_memory_over_200_answers(size: int, tensor_parallel: int) -> None:
    settings = dict(tensor_parallel=tensor_parallel) if tensor_parallel > 1 else {}
    for rank, result in enumerate(ranks.run(measure, size, **settings)):
        print(f"rank {rank} of {size}, tensor_parallel {tensor_parallel}: {result}")
        assert result["graphs_bytes"] <= 300 * 2**20
        assert result["leaked_bytes"] <= 2**20
