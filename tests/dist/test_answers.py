"""Phase 2 on several ranks: all that one process can do, with the same results on every rank."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import SoloComm, TorchComm
from star_attention.errors import InvalidInputError
from tests.dist.pool import Pool
from tests.engines import CONTEXT, bundled_model, bundled_tokenizer, ids, text_model, tiny
from tests.tiers import in_turn

SIZES = dict(block_size=24, anchor_size=10)
MODES: dict[str, tuple[Any, dict[str, Any]]] = {
    "greedy": ([7, 8, 9], {}),
    "sampling": ([7, 8, 9], dict(do_sample=True, temperature=1.3, top_p=0.9, seed=5)),
    "beams": ([7, 8, 9], dict(num_beams=3)),
    "sampled beams": ([7, 8, 9], dict(num_beams=2, do_sample=True, seed=3)),
    "several answers": ([7, 8, 9], dict(num_return_sequences=4, do_sample=True, seed=2)),
    "several beams": ([7, 8, 9], dict(num_beams=3, num_return_sequences=2)),
    "padded batch": ([[7], [8, 9, 10, 11, 12], [13, 14, 15]], {}),
    "sampled batch": ([[7], [8, 9, 10], [7]], dict(do_sample=True, temperature=1.3, seed=5)),
    "sampled answers in a batch": (
        [[7], [8, 9, 10]],
        dict(num_return_sequences=2, do_sample=True, seed=2),
    ),
    "padded batch of beams": ([[7], [8, 9, 10, 11, 12]], dict(num_beams=2)),
    "prompt lookup": ([7, 8, 9, 7, 8], dict(prompt_lookup_num_tokens=3)),
    "penalties": ([7, 8, 9], dict(repetition_penalty=1.5, no_repeat_ngram_size=2)),
    "end of sequence": ([7, 8, 9], dict(eos_token_id=list(range(3, 60)))),
}


def flatten(replies: Any) -> list[Any]:
    if not isinstance(replies, list):
        return [replies]
    return [reply for part in replies for reply in flatten(part)]


def answer_in_all_modes(comm: Any, name: str) -> dict[str, Any]:
    star = StarLLM(tiny(name), comm=comm, **SIZES)
    context = star.encode(ids(CONTEXT))
    torch.manual_seed(comm.rank)  # rank 0 alone samples
    answers = {}
    for mode, (query, settings) in MODES.items():
        replies = star.generate(context, query, max_new_tokens=9, **settings)
        answers[mode] = [(reply.token_ids, reply.finish_reason) for reply in flatten(replies)]
    reply = star.generate(context, [7, 8, 9], max_new_tokens=9, logprobs=2)
    answers["logprobs"] = [(token.id, round(token.logprob, 3)) for token in reply.logprobs]
    return answers


@pytest.mark.parametrize(("name", "ranks"), in_turn(3, ["llama", "gemma3", "deepseek_v3"], [2, 3]))
def test_every_mode_is_as_on_one_rank(pool: Pool, name: str, ranks: int) -> None:
    expected = answer_in_all_modes(SoloComm(), name)
    assert any(reason == "stop" for _, reason in expected["end of sequence"])
    for answers in pool.run(answer_in_all_modes, ranks, name=name):
        assert answers == expected


# ------------------------------------------------------------------ streams


def interleave_streams(comm: TorchComm) -> dict[str, Any]:
    """Interleave two streams and another call, and leave a third stream early."""
    star = StarLLM(text_model(), bundled_tokenizer(), comm=comm, block_size=32)
    context = star.encode("The hill is tall. " * 20)
    first = star.stream(context, "A dog", max_new_tokens=12, ignore_eos=True)
    second = star.stream(context, "Stars", max_new_tokens=12, ignore_eos=True)
    pieces = [next(first), next(second), next(first)]
    between = star.generate(context, "Nobody", max_new_tokens=3).token_ids
    pieces += [*second, *first]
    with star.stream(context, "Rain", max_new_tokens=50, ignore_eos=True) as third:
        third_pieces = [next(third)]
    stopped = star.generate(
        context, "A dog", max_new_tokens=30, ignore_eos=True, stop=first.result.text[3:6]
    )
    return dict(
        pieces=pieces,
        between=between,
        texts=[first.result.text, second.result.text, third.result.text],
        tokens=[first.result.token_ids, second.result.token_ids, third.result.token_ids],
        timings=first.result.timings,
        third_pieces=third_pieces,
        stopped=(stopped.text, stopped.finish_reason),
    )


def test_streams_yield_the_same_pieces_everywhere(pool: Pool) -> None:
    solo = interleave_streams(SoloComm())
    results = pool.run(interleave_streams, 3)
    for result in results:
        assert result["timings"] == results[0]["timings"], "one answer, not one for each rank"
        assert {**result, "timings": None} == {**solo, "timings": None}
    assert "".join(solo["third_pieces"]) == solo["texts"][2]
    assert 1 <= len(solo["tokens"][2]) < 50


def close_on_rank_0(comm: TorchComm) -> tuple[list[str], str, int]:
    star = StarLLM(text_model(), bundled_tokenizer(), comm=comm, block_size=32)
    context = star.encode("The hill is tall. " * 20)
    stream = star.stream(context, "A dog", max_new_tokens=40, ignore_eos=True)
    pieces = [next(stream), next(stream)]
    if comm.rank == 0:
        stream.close()
    # On the other ranks this ends, because rank 0's stream did.
    pieces += list(stream)
    next_reply = star.generate(context, "x", max_new_tokens=2, ignore_eos=True)
    return pieces, stream.result.text, len(next_reply.token_ids)


def test_closing_rank_0s_stream_ends_all(pool: Pool) -> None:
    (pieces, text, next_tokens), *others = pool.run(close_on_rank_0, 3)
    assert next_tokens == 2
    assert "".join(pieces) == text
    assert others == [(pieces, text, next_tokens)] * 2


def leave_on_rank_0(comm: TorchComm, close_late: bool) -> tuple[list[str], list[int]]:
    """Leave a stream on rank 0 alone (a `break`), and make another call."""
    star = StarLLM(text_model(), bundled_tokenizer(), comm=comm, block_size=32)
    context = star.encode("The hill is tall. " * 20)
    stream = star.stream(context, "A dog", max_new_tokens=40, ignore_eos=True)
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if comm.rank == 0 and len(pieces) == 2:
            break
    tokens = star.generate(context, "x", max_new_tokens=4, ignore_eos=True).token_ids
    if close_late:
        stream.close()
    elif comm.rank:
        with pytest.raises(InvalidInputError, match="rank 0 left this stream before its end"):
            stream.result  # noqa: B018
    again = star.generate(context, "x", max_new_tokens=4, ignore_eos=True).token_ids
    assert again == tokens
    return pieces, tokens


@pytest.mark.parametrize("close_late", [False, True])
def test_leaving_rank_0s_stream_ends_all(pool: Pool, close_late: bool) -> None:
    (pieces, tokens), *others = pool.run(leave_on_rank_0, 3, close_late=close_late)
    assert len(pieces) == 2
    assert len(tokens) == 4
    assert others == [(pieces, tokens)] * 2


# ------------------------------------------------------------------ contexts


def grow_contexts(comm: Any, name: str) -> dict[str, Any]:
    """Encode several contexts as a batch, and extend one of them twice."""
    star = StarLLM(tiny(name), comm=comm, reserve_tokens=64, **SIZES)
    first, second, third = star.encode([ids(CONTEXT), ids(CONTEXT, seed=4), ids(50)])
    longer = star.extend(first, ids(40, seed=9))
    longest = star.extend(longer, ids(3, seed=8))
    joined = star.encode(ids(CONTEXT) + ids(40, seed=9) + ids(3, seed=8))
    contexts = (first, second, third, longer, longest)
    return dict(
        logits=[star.logits(context, [5, 6, 7]) for context in (*contexts, joined)],
        answers=[
            star.generate(context, [7, 8], max_new_tokens=4).token_ids for context in contexts
        ],
        stored=[context.kv.tokens for context in (first, longer, longest)],
    )


@pytest.mark.parametrize(
    ("name", "ranks"), in_turn(2, ["llama", "gemma2", "deepseek_v3", "gemma3n"], [2, 3])
)
def test_batches_and_growing_contexts(pool: Pool, name: str, ranks: int) -> None:
    solo = grow_contexts(SoloComm(), name)
    results = pool.run(grow_contexts, ranks, name=name)
    for logits, expected in zip(results[0]["logits"], solo["logits"], strict=True):
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    *_, longest, joined = solo["logits"]
    torch.testing.assert_close(longest, joined, atol=2e-4, rtol=1e-4)
    for result in results:
        assert result["answers"] == solo["answers"]
    shards = zip(*(result["stored"] for result in results), strict=True)
    assert [sum(tokens) for tokens in shards] == solo["stored"]


# ------------------------------------------------------------------ the bundled model


def retrieve(comm: Any) -> list[str]:
    star = StarLLM(bundled_model(), bundled_tokenizer(), comm=comm, block_size=1024)
    filler = "The tea is hot and the cup is blue.\n" * 120
    numbers = {"petal-kiss": "4910508", "lyric-known": "8081780", "summery-fillet": "3821004"}
    text = filler + "".join(
        f"The secret number for {key} is {number}.\n{filler}" for key, number in numbers.items()
    )
    context = star.encode(text)
    queries = [
        f"<|q|>What is the secret number for {key}?<|a|>The secret number for {key} is"
        for key in numbers
    ]
    replies = star.generate(context, queries, max_new_tokens=12)
    assert [reply.text.strip() for reply in replies] == list(numbers.values())
    return [str(reply.token_ids) for reply in replies]


@pytest.mark.slow
def test_the_bundled_model_retrieves_over_ranks(pool: Pool) -> None:
    solo = retrieve(SoloComm())
    for ranks in (2, 4):
        assert pool.run(retrieve, ranks) == [solo] * ranks


# ------------------------------------------------------------------ asyncio


def await_answers(comm: Any) -> list[Any]:
    """Encode, answer and stream from one event loop; rank 0 leaves a stream early."""
    star = StarLLM(text_model(), bundled_tokenizer(), comm=comm, block_size=32)

    async def main() -> list[Any]:
        context = await star.aencode("The hill is tall. " * 20)
        reply = await star.agenerate(context, "A dog", max_new_tokens=6)
        stream = star.astream(context, "Stars", max_new_tokens=6, ignore_eos=True)
        pieces = [piece async for piece in stream]
        async with star.astream(context, "Rain", max_new_tokens=50, ignore_eos=True) as third:
            await anext(third)
        again = await star.agenerate(context, "A dog", max_new_tokens=6)
        return [reply.text, pieces, stream.result.text, third.result.token_ids, again.token_ids]

    return asyncio.run(main())


def test_awaited_calls_are_as_on_one_rank(pool: Pool) -> None:
    expected = await_answers(SoloComm())
    assert pool.run(await_answers, 2) == [expected] * 2
