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
from star_attention.errors import RankError
from tests.families import FIRST_TOKEN, LAST_TOKEN, build
from tests.gpu import ranks

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parents[2] / "models" / "needle-17m"
TOKENS = 4000
LENGTH: dict[str, Any] = dict(ignore_eos=True, max_new_tokens=8)


def ids(tokens: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 4096, (tokens,), generator=generator).tolist()


def answers(star: StarLLM) -> dict[str, Any]:
    """Answer in every way that steps token by token, and in some that do not."""
    context, other = star.encode(ids(TOKENS)), star.encode(ids(2500, seed=2))
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
        star.generate(context, ids(300), max_new_tokens=2).token_ids,
        star.generate(context, ids(5), repetition_penalty=1.3, **LENGTH).token_ids,
        star.generate(context, ids(5), num_beams=2, max_new_tokens=3).token_ids,
        # The tail moves as it grows.
        star.generate(context, ids(5), ignore_eos=True, max_new_tokens=90).token_ids,
    ]
    # As an array, because a tensor's memory would go with its process.
    return dict(tokens=tokens, logits=None if star.rank else first.logits.numpy())


Settings = dict[str, Any]
STAR: Settings = dict(block_size=1024)
ON_TWO_RANKS: list[Settings] = [
    STAR,
    # One block: the last rank, which holds the tail, has no part of the context.
    dict(block_size=8192),
    dict(method="ring"),
    dict(block_size=1024, kv_dtype="fp8"),
    dict(block_size=1024, tensor_parallel=2),
]


def answers_of(
    comm: Any, device: str, compile: tuple[bool, ...], settings: Settings
) -> dict[str, Any]:
    """Answer with the bundled model.

    Args:
        comm: the ranks.
        device: the GPU.
        compile: for each rank, True for compiled layers and graphs.
        settings: of the engine.
    """
    started = time.perf_counter()
    star = StarLLM.from_pretrained(
        MODEL,
        dtype="float32",
        device=device,
        comm=comm,
        compile=compile[comm.rank % len(compile)],
        **settings,
    )
    result = answers(star)
    graphs = star.runtime.handle.graphs
    return result | dict(
        captured=None if graphs is None else graphs.captured,
        steps=None if graphs is None else graphs.of_rows.captured,
        seconds=time.perf_counter() - started,
    )


def check(results: list[dict[str, Any]], settings: Settings) -> None:
    """Compare all ranks' answers with those of one rank without graphs."""
    alone = {name: value for name, value in settings.items() if name != "tensor_parallel"}
    if alone.get("method") == "ring":
        alone["method"] = "dense"
    expected = answers_of(SoloComm(), "cuda", (False,), alone)
    difference = np.abs(results[0]["logits"] - expected["logits"]).max()
    print(
        f"{len(results)} ranks {settings}: largest difference of a logit {difference:.1e},"
        f" {results[0]['seconds']:.1f} s, captured {[result['captured'] for result in results]}"
    )
    for result in results:
        assert result["tokens"] == expected["tokens"]
    assert difference <= 1e-4 * max(1.0, np.abs(expected["logits"]).max())


def check_captured(results: list[dict[str, Any]]) -> None:
    """A token of one row and of several, and their queries, are graphs on every rank."""
    for result in results:
        kinds = {key[:2] for key, captured in result["captured"].items() if captured}
        assert {(1, 1), (1, 16), (3, 32)} <= kinds
        assert all(result["captured"].values())
        assert result["steps"], "no step of several rows was captured"
        assert all(result["steps"].values())


@pytest.mark.parametrize("settings", ON_TWO_RANKS, ids=str)
def test_graphs_on_two_ranks(settings: Settings) -> None:
    results = ranks.run(answers_of, 2, compile=(True,), settings=settings)
    check(results, settings)
    check_captured(results)


@pytest.mark.parametrize(
    ("size", "settings"), [(3, STAR), (4, dict(block_size=1024, tensor_parallel=2))]
)
def test_graphs_on_more_ranks(size: int, settings: Settings) -> None:
    results = ranks.run(answers_of, size, compile=(True,), settings=settings)
    check(results, settings)
    check_captured(results)


@pytest.mark.parametrize("with_graphs", [(True, False), (False, True)])
def test_ranks_with_graphs_and_without(with_graphs: tuple[bool, bool]) -> None:
    check(ranks.run(answers_of, 2, compile=with_graphs, settings=STAR), STAR)


@pytest.mark.parametrize("settings", [STAR, dict(block_size=1024, tensor_parallel=2)], ids=str)
def test_nccl_inside_graphs(settings: Settings) -> None:
    results = ranks.run(answers_of, 2, nccl_alone=True, compile=(True,), settings=settings)
    check(results, settings)
    check_captured(results)


# ---------------------------------------------------------------------- faults


def lose_rank_1(comm: Any, device: str) -> Any:
    """Hang on rank 1 before a forward that the other ranks replay; return what they notice."""
    star = StarLLM.from_pretrained(
        MODEL, dtype="float32", device=device, comm=comm, compile=True, **STAR
    )
    context = star.encode(ids(TOKENS))
    star.generate(context, ids(9), **LENGTH)
    graphs = star.runtime.handle.graphs
    assert graphs is not None
    replay, replays = graphs.run, []

    def hang(*args: Any, **kwargs: Any) -> Any:
        replays.append(time.perf_counter())
        if len(replays) == 4:
            time.sleep(3 * ranks.STALL_S)
        return replay(*args, **kwargs)

    if comm.rank == 1:
        graphs.run = hang
    started = time.perf_counter()
    with pytest.raises(RankError) as caught:
        star.generate(context, ids(9), ignore_eos=True, max_new_tokens=30)
    return caught.value.rank, time.perf_counter() - started


@pytest.mark.parametrize("nccl_alone", [False, True])
def test_a_rank_that_hangs_before_a_replay(nccl_alone: bool) -> None:
    """The device of the other ranks waits inside a graph, and so does a release of its group."""
    results = ranks.run(lose_rank_1, 2, nccl_alone=nccl_alone)
    print(f"NCCL alone {nccl_alone}: {results}")
    assert results[0][0] == 1
    assert results[0][1] <= 2 * ranks.STALL_S


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


ANSWERS = 200


def measure(comm: Any, device: str, **settings: Any) -> dict[str, Any]:
    star = StarLLM.from_pretrained(
        MODEL, dtype="bfloat16", device=device, comm=comm, block_size=1024, compile=True, **settings
    )
    context = star.encode(ids(TOKENS))

    def used() -> tuple[int, int]:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    def answer(tokens: int) -> float:
        """Return seconds."""
        started = time.perf_counter()
        star.generate(context, ids(9), max_new_tokens=tokens, ignore_eos=True)
        return time.perf_counter() - started

    before = used()
    answer(4)
    star.generate(context, [ids(250), ids(200)], max_new_tokens=4)
    after_capture = used()
    token_s = (-answer(1) + answer(65)) / 64
    first_s, middle = answer(1), used()
    for number in range(ANSWERS):
        # Answers, streams left half-way and streams that are closed.
        stream = star.stream(context, ids(5), max_new_tokens=3)
        if number % 3 == 0:
            answer(1)
        elif number % 3 == 1:
            next(stream, None)
        else:
            with contextlib.closing(stream):
                next(stream, None)
    del stream
    return dict(
        graphs_bytes=after_capture[1] - before[1],
        leaked_bytes=used()[0] - middle[0],
        token_ms=token_s * 1e3,
        first_token_ms=first_s * 1e3,
    )


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_memory_over_200_answers(tensor_parallel: int) -> None:
    settings = dict(tensor_parallel=tensor_parallel) if tensor_parallel > 1 else {}
    for rank, result in enumerate(ranks.run(measure, 2, **settings)):
        print(f"rank {rank} of 2, tensor_parallel {tensor_parallel}: {result}")
        assert result["graphs_bytes"] <= 300 * 2**20
        assert result["leaked_bytes"] <= 2**20
