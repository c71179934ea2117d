"""Streams on several ranks, suspended, resumed, closed and left between steps without messages.

Every case runs as on CPU ranks, where Python looks at a token before the next forward, and as on
GPU ranks (`is_ahead`), where the forward is issued first.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.distributed import SoloComm, TorchComm
from star_attention.errors import InvalidInputError
from tests.dist.pool import STALL_S, Pool
from tests.engines import bundled_tokenizer, text_model

AHEAD = pytest.mark.parametrize("is_ahead", [False, True])
OPTIONS: dict[str, Any] = dict(max_new_tokens=12, ignore_eos=True)


def engine(comm: Any, is_ahead: bool) -> StarLLM:
    star = StarLLM(text_model(), bundled_tokenizer(), comm=comm, block_size=32)
    star.runtime.comm.is_asynchronous = is_ahead
    return star


def story(comm: Any, is_ahead: bool) -> tuple[StarLLM, Any]:
    """Return an engine and a context."""
    star = engine(comm, is_ahead)
    return star, star.encode("The hill is tall. " * 20)


def answer_all_kinds(comm: Any, is_ahead: bool) -> list[Any]:
    """Return answers that end in every way, in calls and in streams."""
    star, context = story(comm, is_ahead)
    whole = star.generate(context, "A dog", **OPTIONS)
    kinds: list[dict[str, Any]] = [
        OPTIONS,
        OPTIONS | dict(stop=whole.text[5:8]),
        OPTIONS | dict(stop=whole.text[-3:]),
        OPTIONS | dict(max_new_tokens=1),
        OPTIONS | dict(do_sample=True, temperature=1.5, seed=3),
        dict(max_new_tokens=12, eos_token_id=whole.token_ids[4]),
    ]
    results: list[Any] = []
    for kind in kinds:
        stream = star.stream(context, "A dog", **kind)
        pieces = list(stream)
        reply = star.generate(context, "A dog", **kind)
        assert "".join(pieces) == stream.result.text == reply.text
        assert stream.result.token_ids == reply.token_ids
        results.append((pieces, reply.token_ids, reply.finish_reason))
    batch = star.generate(context, ["A dog", "Stars", "x"], **OPTIONS | dict(stop=whole.text[5:8]))
    return [*results, [(reply.token_ids, reply.text) for reply in batch]]


@AHEAD
@pytest.mark.parametrize("ranks", [2, 3])
def test_answers_end_alike_on_all_ranks(pool: Pool, ranks: int, is_ahead: bool) -> None:
    expected = answer_all_kinds(SoloComm(), is_ahead=False)
    assert answer_all_kinds(SoloComm(), is_ahead=True) == expected
    assert {1, 12} < {len(tokens) for _, tokens, _ in expected[:-1]}
    assert pool.run(answer_all_kinds, ranks, is_ahead=is_ahead) == [expected] * ranks


def interleave(comm: Any, is_ahead: bool, star: StarLLM | None = None) -> Any:
    """Suspend streams for each other, for calls, for a failing call, and close one of them."""
    star = star or engine(comm, is_ahead)
    context = star.encode("The hill is tall. " * 20)
    streams = [star.stream(context, query, **OPTIONS) for query in ("A dog", "Stars", "Rain")]
    pieces = [next(stream) for stream in streams for _ in range(2)]
    between = star.generate(context, "Nobody", max_new_tokens=3).token_ids
    with pytest.raises(InvalidInputError):
        star.generate(context, "x", top_p=7)
    pieces += [next(stream) for _ in range(2) for stream in reversed(streams)]
    # While another one is active.
    streams[1].close()
    longer = star.extend(context, "It rains. ")
    pieces += [*streams[2], *streams[0]]
    last = star.generate(longer, "A dog", **OPTIONS).token_ids
    results = [stream.result for stream in streams]
    return pieces, between, last, [(result.token_ids, result.text) for result in results]


@AHEAD
def test_interleaved_streams_are_as_on_one_rank(pool: Pool, is_ahead: bool) -> None:
    expected = interleave(SoloComm(), is_ahead)
    assert len(expected[3][1][0]) < 12
    assert pool.run(interleave, 3, is_ahead=is_ahead) == [expected] * 3


def interleave_alone(comm: TorchComm) -> Any:
    """The other ranks follow; they hold streams for as long as rank 0 does."""
    star = engine(comm, is_ahead=False)
    if comm.rank == 0:
        result = interleave(comm, is_ahead=False, star=star)
        star.close()
        return result
    held = []
    heed = comm.streams.heed

    def heed_and_count(news: list[int]) -> None:
        heed(news)
        gc.collect()
        held.append(len(comm.streams.news()))

    comm.streams.heed = heed_and_count  # type: ignore[method-assign]
    star.follow()
    comm.streams.heed = heed  # type: ignore[method-assign]
    return held


def test_ranks_that_follow_resume_streams(pool: Pool) -> None:
    expected = interleave(SoloComm(), is_ahead=False)
    leading, *others = pool.run(interleave_alone, 3)
    assert leading == expected
    # encode and three streams; two calls; one is closed: extend; all have ended: generate, close
    assert others == [[0, 0, 1, 2, 3, 3, 2, 0, 0]] * 2


def close_where_others_do_not(comm: TorchComm, is_ahead: bool) -> list[Any]:
    """Rank 0 closes an active and a suspended stream; the others hear of it in the next call."""
    star, context = story(comm, is_ahead)
    first, second = (star.stream(context, query, **OPTIONS) for query in ("A dog", "Stars"))
    pieces = [next(first), next(second)]
    if comm.rank == 0:
        second.close()
        first.close()
    tokens = star.generate(context, "x", **OPTIONS).token_ids
    # Nothing is sent for streams that have ended.
    pieces += [*first, *second]
    return [pieces, tokens, first.result.token_ids, second.result.token_ids]


@AHEAD
def test_a_stream_that_rank_0_closes_has_its_result_everywhere(pool: Pool, is_ahead: bool) -> None:
    first, *others = pool.run(close_where_others_do_not, 3, is_ahead=is_ahead)
    assert others == [first] * 2
    assert all(1 <= len(tokens) < 12 for tokens in first[2:])


def fail_in_between(comm: TorchComm, is_ahead: bool) -> list[Any]:
    """An exception in another call leaves a suspended stream alone; one in its step ends it."""
    star, context = story(comm, is_ahead)
    handle = star.runtime.handle
    stream, doomed = (star.stream(context, query, **OPTIONS) for query in ("A dog", "Stars"))
    pieces = [next(stream), next(doomed)]

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("planted")

    real = handle.encode
    for call in (lambda: star.generate(context, "x", **OPTIONS), lambda: list(doomed)):
        if comm.rank == 1:
            handle.encode = fail  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError, match="planted"):
            call()
        handle.encode = real  # type: ignore[method-assign]
    with pytest.raises(InvalidInputError, match="this stream has failed; ask again"):
        next(doomed)
    pieces += stream
    return [pieces, star.generate(context, "x", **OPTIONS).token_ids]


@AHEAD
def test_an_exception_elsewhere_does_not_harm_a_suspended_stream(
    pool: Pool, is_ahead: bool
) -> None:
    results = pool.run(fail_in_between, 3, is_ahead=is_ahead)
    star, context = story(SoloComm(), is_ahead)
    whole, other = (list(star.stream(context, query, **OPTIONS)) for query in ("A dog", "Stars"))
    expected = [whole[0], other[0], *whole[1:]]
    tokens = star.generate(context, "x", **OPTIONS).token_ids
    assert results == [[expected, tokens]] * 3


def pause(comm: TorchComm, port: int, is_ahead: bool) -> list[str]:
    """Let rank 0 think for longer than the stall limit, while the others wait for the next step."""
    own = TorchComm(comm.rank, comm.size, "127.0.0.1", port, name=f"pausing {is_ahead}", stall_s=1)
    # The limit, and with it how often ranks look at each other, is for the pause: on a busy machine
    # a forward may take a second.
    watchdog = own.world.watchdog
    limit_s, watchdog._stall_s = watchdog._stall_s, STALL_S
    star, context = story(own, is_ahead)
    stream = star.stream(context, "A dog", **OPTIONS)
    pieces = [next(stream)]
    watchdog._stall_s = limit_s
    if comm.rank == 0:
        time.sleep(2.5)
        watchdog._stall_s = STALL_S
    pieces.append(next(stream))
    watchdog._stall_s = STALL_S
    pieces += stream
    own.close()
    return pieces


def test_a_pause_of_rank_0_is_no_fault(pool: Pool) -> None:
    results = pool.run(pause, 3, port=pool.port, is_ahead=False)
    assert results == [results[0]] * 3


def count_messages(comm: TorchComm, is_ahead: bool) -> list[tuple[int, int]]:
    """Return the messages and packets that rank 0 sends for answers of 2 and of 12 tokens."""
    star, context = story(comm, is_ahead)
    own = star.runtime.comm
    sent = dict(messages=0, packets=0)
    send_message, send_packet = own.broadcast_object, own.broadcast_step

    def count_message(message: Any) -> None:
        sent["messages"] += 1
        send_message(message)

    def count_packet(packet: Any) -> Any:
        sent["packets"] += 1
        assert packet.numel() == 3
        return send_packet(packet)

    own.broadcast_object, own.broadcast_step = count_message, count_packet
    counts = []
    for tokens in (2, 12):
        sent.update(messages=0, packets=0)
        pieces = list(star.stream(context, "A dog", **OPTIONS | dict(max_new_tokens=tokens)))
        assert pieces
        counts.append((sent["messages"], sent["packets"]))
    return counts


@AHEAD
def test_a_token_takes_one_packet_and_no_message(pool: Pool, is_ahead: bool) -> None:
    (short, long), *_ = pool.run(count_messages, 2, is_ahead=is_ahead)
    assert (short[1], long[1]) == (2, 12)
    # The call, its start, the first piece and the end.
    assert short[0] == long[0] == 4
