"""Phase 2 on several ranks: everything that one process can do, with the same results on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention import engine as engine_module
from star_attention.distributed import SoloComm, TorchComm
from star_attention.errors import ContextLengthError, InvalidInputError, RankError, TokenError
from tests.dist.pool import Pool
from tests.engines import CONTEXT, bundled_model, bundled_tokenizer, engine, ids, text_model, tiny
from tests.families import build

SIZES = dict(block_size=24, anchor_size=10)
WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "greedy": ([7, 8, 9], {}),
    "sampling": ([7, 8, 9], dict(do_sample=True, temperature=1.3, top_p=0.9, seed=5)),
    "beams": ([7, 8, 9], dict(num_beams=3)),
    "sampled beams": ([7, 8, 9], dict(num_beams=2, do_sample=True, seed=3)),
    "several answers": ([7, 8, 9], dict(num_return_sequences=4, do_sample=True, seed=2)),
    "several beams": ([7, 8, 9], dict(num_beams=3, num_return_sequences=2)),
    "padded batch": ([[7], [8, 9, 10, 11, 12], [13, 14, 15]], {}),
    "padded batch of beams": ([[7], [8, 9, 10, 11, 12]], dict(num_beams=2)),
    "prompt lookup": ([7, 8, 9, 7, 8], dict(prompt_lookup_num_tokens=3)),
    "penalties": ([7, 8, 9], dict(repetition_penalty=1.5, no_repeat_ngram_size=2)),
    "end of sequence": ([7, 8, 9], dict(eos_token_id=list(range(3, 60)))),
}


def flat(replies: Any) -> list[Any]:
    return [reply for one in replies for reply in flat(one)] if isinstance(replies, list) else [replies]


def all_ways(comm: Any, name: str) -> dict[str, Any]:
    star = StarLLM(tiny(name), comm=comm, **SIZES)
    context = star.encode(ids(CONTEXT))
    torch.manual_seed(comm.rank)  # rank 0 alone draws
    found = {}
    for way, (query, words) in WAYS.items():
        replies = star.generate(context, query, max_new_tokens=9, **words)
        found[way] = [(reply.token_ids, reply.finish_reason) for reply in flat(replies)]
    return found


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_way_is_as_on_one_rank(pool: Pool, name: str, ranks: int) -> None:
    expected = all_ways(SoloComm(), name)
    assert any(reason == "stop" for _, reason in expected["end of sequence"])
    for found in pool.run(all_ways, ranks, name=name):
        assert found == expected


# ------------------------------------------------------------------------------------------------- streams


def streamed(comm: TorchComm) -> dict[str, Any]:
    """Two interleaved streams, a call between their pieces, and one that rank 0's reader leaves early."""
    star = StarLLM(text_model(), bundled_tokenizer(), comm=comm, block_size=32)
    context = star.encode("The hill is tall. " * 20)
    first = star.stream(context, "A dog", max_new_tokens=12, ignore_eos=True)
    second = star.stream(context, "Stars", max_new_tokens=12, ignore_eos=True)
    pieces = [next(first), next(second), next(first)]
    between = star.generate(context, "Nobody", max_new_tokens=3).token_ids
    pieces += [*second, *first]
    with star.stream(context, "Rain", max_new_tokens=50, ignore_eos=True) as left:
        early = [next(left)]
    stopped = star.generate(context, "A dog", max_new_tokens=30, ignore_eos=True, stop=first.result.text[3:6])
    return dict(
        pieces=pieces,
        between=between,
        texts=[first.result.text, second.result.text, left.result.text],
        tokens=[first.result.token_ids, second.result.token_ids, left.result.token_ids],
        timings=first.result.timings,
        early=early,
        stopped=(stopped.text, stopped.finish_reason),
    )


def test_streams_yield_the_same_pieces_everywhere(pool: Pool) -> None:
    solo = streamed(SoloComm())
    results = pool.run(streamed, 3)
    for result in results:
        assert result["timings"] == results[0]["timings"], "one answer, not one for each rank"
        assert {**result, "timings": None} == {**solo, "timings": None}
    assert "".join(solo["early"]) == solo["texts"][2]
    assert 1 <= len(solo["tokens"][2]) < 50


def closed_by_rank_0(comm: TorchComm) -> tuple[list[str], str, int]:
    star = StarLLM(text_model(), bundled_tokenizer(), comm=comm, block_size=32)
    context = star.encode("The hill is tall. " * 20)
    stream = star.stream(context, "A dog", max_new_tokens=40, ignore_eos=True)
    pieces = [next(stream), next(stream)]
    if comm.rank == 0:
        stream.close()
    pieces += list(stream)  # on the other ranks this ends, because rank 0's did
    return pieces, stream.result.text, len(star.generate(context, "x", max_new_tokens=2, ignore_eos=True).token_ids)


def test_closing_rank_0s_stream_ends_all(pool: Pool) -> None:
    (pieces, text, after), *others = pool.run(closed_by_rank_0, 3)
    assert after == 2
    assert "".join(pieces) == text
    assert others == [(pieces, text, after)] * 2


# ------------------------------------------------------------------------------------------------- contexts


def contexts(comm: Any, name: str) -> dict[str, Any]:
    """Several contexts as a batch, and one that grows."""
    star = StarLLM(tiny(name), comm=comm, reserve_tokens=64, **SIZES)
    one, two, three = star.encode([ids(CONTEXT), ids(CONTEXT, seed=4), ids(50)])
    grown = star.extend(one, ids(40, seed=9))
    more = star.extend(grown, ids(3, seed=8))
    joined = star.encode(ids(CONTEXT) + ids(40, seed=9) + ids(3, seed=8))
    logits = [star.logits(context, [5, 6, 7]) for context in (one, two, three, grown, more, joined)]
    answers = [star.generate(context, [7, 8], max_new_tokens=4).token_ids for context in (one, two, three, grown, more)]
    return dict(logits=logits, answers=answers, held=[context.kv.tokens for context in (one, grown, more)])


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3", "gemma3n"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_batches_and_growing_contexts(pool: Pool, name: str, ranks: int) -> None:
    solo = contexts(SoloComm(), name)
    results = pool.run(contexts, ranks, name=name)
    for ours, theirs in zip(results[0]["logits"], solo["logits"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(solo["logits"][4], solo["logits"][5], atol=2e-4, rtol=1e-4)
    for result in results:
        assert result["answers"] == solo["answers"]
    assert [sum(held) for held in zip(*(result["held"] for result in results), strict=True)] == solo["held"]


def left_by_rank_0(comm: TorchComm, closed_late: bool) -> tuple[list[str], list[int]]:
    """Rank 0 alone leaves a stream (a `break`), and asks something else."""
    star = StarLLM(text_model(), bundled_tokenizer(), comm=comm, block_size=32)
    context = star.encode("The hill is tall. " * 20)
    stream = star.stream(context, "A dog", max_new_tokens=40, ignore_eos=True)
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if comm.rank == 0 and len(pieces) == 2:
            break
    tokens = star.generate(context, "x", max_new_tokens=4, ignore_eos=True).token_ids
    if closed_late:
        stream.close()
    elif comm.rank:
        with pytest.raises(InvalidInputError, match="rank 0 left this stream before its end"):
            stream.result  # noqa: B018
    again = star.generate(context, "x", max_new_tokens=4, ignore_eos=True).token_ids
    assert again == tokens
    return pieces, tokens


@pytest.mark.parametrize("closed_late", [False, True])
def test_leaving_rank_0s_stream_ends_all(pool: Pool, closed_late: bool) -> None:
    (pieces, tokens), *others = pool.run(left_by_rank_0, 3, closed_late=closed_late)
    assert len(pieces) == 2
    assert len(tokens) == 4
    assert others == [(pieces, tokens)] * 2


# ------------------------------------------------------------------------------------------------- errors


def different_calls(comm: TorchComm) -> list[str]:
    """Ranks that are not in the same call say so, and go on together."""
    star = engine("llama", comm=comm, **SIZES)
    context = star.encode(ids(CONTEXT))
    said = []
    with pytest.raises(InvalidInputError) as caught:
        star.generate(context, [5], max_new_tokens=3) if comm.rank == 1 else star.encode(ids(CONTEXT))
    said.append(str(caught.value))
    stream = StarLLM(text_model(), bundled_tokenizer(), comm=comm, block_size=32)
    story = stream.encode("The hill is tall. " * 20)
    pieces = stream.stream(story, "A dog", max_new_tokens=5, ignore_eos=True)
    next(pieces)
    with pytest.raises(InvalidInputError) as caught:
        star.generate(context, [5], max_new_tokens=3) if comm.rank == 1 else list(pieces)
    said.append(str(caught.value))
    assert star.generate(context, [5], max_new_tokens=3).token_ids
    return said


def test_ranks_in_different_calls_are_told(pool: Pool) -> None:
    first, *others = pool.run(different_calls, 3)
    assert "rank 0 is in encode, rank 1 in generate: every call is collective" in first[0]
    assert "rank 0 is in the stream of an answer, rank 1 in generate" in first[1]
    assert all("every call is collective" in message for said in others for message in said)


def refusals(comm: TorchComm) -> list[str]:
    """Bad arguments of rank 0, raised everywhere; the ranks stay together."""
    star = engine("llama", comm=comm, **SIZES)
    context = star.encode(ids(CONTEXT))
    said = []
    for kind, call in (
        (TokenError, lambda: star.encode([])),
        (TokenError, lambda: star.encode([500] if comm.rank == 0 else [5])),
        (TokenError, lambda: star.generate(context, [])),
        (ContextLengthError, lambda: star.encode(ids(CONTEXT), query=[5], settings=dict(max_new_tokens=512))),
        (TypeError, lambda: star.generate(context, [5], maximum=3)),
        (InvalidInputError, lambda: star.generate(context, [5], top_p=7)),
        (InvalidInputError, lambda: star.stream(context, [5])),
    ):
        with pytest.raises(kind) as caught:
            call()
        said.append(str(caught.value))
    return [*said, str(star.generate(context, [5], max_new_tokens=3).token_ids)]


def test_refusals_are_raised_on_all_ranks(pool: Pool) -> None:
    first, *others = pool.run(refusals, 3)
    assert len(first) == 8
    assert others == [first] * 2


def one_rank_fails(comm: TorchComm, phase: int) -> tuple[str, str, list[int]]:
    """An exception in the middle of one rank's work reaches all, and the next call works."""
    star = engine("llama", comm=comm, **SIZES)
    context = star.encode(ids(CONTEXT))
    real = star.runtime.handle.encode
    if comm.rank == 1:

        def failing(*arguments: Any, **words: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory, or so")

        star.runtime.handle.encode = failing  # type: ignore[method-assign]
    with pytest.raises(MemoryError) as caught:
        if phase == 1:
            star.encode(ids(CONTEXT, seed=7))
        else:
            star.generate(context, [5, 6], max_new_tokens=3)
    star.runtime.handle.encode = real  # type: ignore[method-assign]
    return type(caught.value).__name__, str(caught.value), star.generate(context, [5, 6], max_new_tokens=3).token_ids


@pytest.mark.parametrize("phase", [1, 2])
def test_an_exception_on_one_rank_is_raised_on_all(pool: Pool, phase: int) -> None:
    results = pool.run(one_rank_fails, 3, phase=phase)
    expected = engine("llama", **SIZES)
    tokens = expected.generate(expected.encode(ids(CONTEXT)), [5, 6], max_new_tokens=3).token_ids
    assert [result[2] for result in results] == [tokens] * 3
    assert all("or so" in message or "out of memory" in message for _, message, _ in results)
    assert "(on rank 1" in results[0][1]
    assert "(on rank 1" in results[2][1]


# ------------------------------------------------------------------------------------------------- the bundled model


def retrieved(comm: Any) -> list[str]:
    star = StarLLM(bundled_model(), bundled_tokenizer(), comm=comm, block_size=1024)
    filler = "The tea is hot and the cup is blue.\n" * 120
    keys = {"petal-kiss": "4910508", "lyric-known": "8081780", "summery-fillet": "3821004"}
    text = filler + "".join(f"The secret number for {key} is {number}.\n{filler}" for key, number in keys.items())
    context = star.encode(text)
    asked = [f"<|q|>What is the secret number for {key}?<|a|>The secret number for {key} is" for key in keys]
    replies = star.generate(context, asked, max_new_tokens=12)
    assert [reply.text.strip() for reply in replies] == list(keys.values())
    return [str(reply.token_ids) for reply in replies]


def test_the_bundled_model_retrieves_over_ranks(pool: Pool) -> None:
    solo = retrieved(SoloComm())
    for ranks in (2, 4):
        assert pool.run(retrieved, ranks) == [solo] * ranks


# ------------------------------------------------------------------------------------------------- the handshake


def shaken(comm: TorchComm, what: str) -> str:
    """An engine whose rank 1 differs."""
    model, settings = tiny("llama"), dict[str, Any](SIZES)
    tokenizer = None
    odd = comm.rank == 1
    if what == "weights":
        model = build("llama", seed=3 if odd else 0)
    elif what == "dtype":
        model = build("llama", torch.bfloat16 if odd else torch.float32)
    elif what == "config.num_hidden_layers":
        model = tiny("llama") if not odd else build("granite")
        what = "config.model_type"
    elif what == "settings.block_size":
        settings["block_size"] = 32 if odd else 24
    elif what == "transformers":
        real = engine_module.transformers.__version__
        engine_module.transformers.__version__ = "0.1" if odd else real
    try:
        with pytest.raises(RankError) as caught:
            StarLLM(model, tokenizer, comm=comm, **settings)
    finally:
        if what == "transformers":
            engine_module.transformers.__version__ = real
    assert caught.value.rank == 1
    assert f"its {what} is " in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("what", ["weights", "dtype", "config.num_hidden_layers", "settings.block_size", "transformers"])
def test_ranks_that_differ_are_refused_at_the_start(pool: Pool, what: str) -> None:
    messages = pool.run(shaken, 3, what=what)
    assert messages == [messages[0]] * 3
    assert len(pool.run(refusals, 3)) == 3, "and the ranks can go on"
