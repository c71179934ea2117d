"""`aencode`, `agenerate` and `astream`: the same answers, without blocking the event loop."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from star_attention import EncodedContext, StarLLM
from star_attention.errors import InvalidInputError, UnknownOptionError
from tests.engines import bundled_tokenizer, text_model
from tests.spelling import CONTEXT, QUERY
from tests.talkers import byte_level, talker

_T = TypeVar("_T")
LONG: dict[str, Any] = dict(ignore_eos=True, max_new_tokens=1900)


def run(main: Coroutine[Any, Any, _T]) -> _T:
    return asyncio.run(asyncio.wait_for(main, timeout=20))


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return StarLLM(text_model(), bundled_tokenizer(), block_size=16, anchor_size=16)


@pytest.fixture(scope="module")
def context(star: StarLLM) -> EncodedContext:
    context: EncodedContext = star.encode(CONTEXT)
    return context


class Gate(LogitsProcessor):
    """Counts steps, and lets the first one wait for a signal."""

    def __init__(self) -> None:
        self.steps, self.started, self.goes_on = 0, threading.Event(), threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        self.started.set()
        assert self.goes_on.wait(10)
        return scores

    @property
    def options(self) -> dict[str, Any]:
        return LONG | dict(logits_processor=LogitsProcessorList([self]))

    async def is_reached(self) -> None:
        while not self.started.is_set():
            await asyncio.sleep(0.001)


def test_the_answers_are_those_of_generate(star: StarLLM, context: EncodedContext) -> None:
    options: dict[str, Any] = dict(max_new_tokens=8, do_sample=True, seed=3)

    async def main() -> None:
        encoded = await star.aencode(CONTEXT)
        assert torch.equal(encoded.token_ids, context.token_ids)
        contexts = await star.aencode([CONTEXT, CONTEXT], progress=False)
        assert len(contexts) == 2
        replies = await asyncio.gather(
            *(star.agenerate(encoded, QUERY, **options) for _ in range(3)),
            star.agenerate(encoded, [QUERY, "Stars"], **options),
        )
        expected = star.generate(context, QUERY, **options).text
        assert [reply.text for reply in replies[:3]] == [expected] * 3
        assert replies[3][0].text == expected
        prepared = star.prepare(CONTEXT, QUERY, **options)
        assert (await star.agenerate(await star.aencode(prepared), prepared)).text == expected
        beams = await star.agenerate(encoded, QUERY, num_beams=2, max_new_tokens=5)
        plain = star.generate(context, QUERY, num_beams=2, max_new_tokens=5)
        assert beams.token_ids == plain.token_ids

    run(main())


def test_streams_take_turns(star: StarLLM, context: EncodedContext) -> None:
    options: dict[str, Any] = dict(max_new_tokens=12, ignore_eos=True)
    order: list[str] = []

    async def read(query: str) -> str:
        pieces = []
        async for piece in (stream := star.astream(context, query, **options)):
            pieces.append(piece)
            order.append(query)
        assert stream.result.text == "".join(pieces)
        return stream.result.text

    async def main() -> None:
        texts = await asyncio.gather(read("Stars"), read("A hill"))
        for query, text in zip(["Stars", "A hill"], texts, strict=True):
            assert text == star.generate(context, query, **options).text

    run(main())
    assert len({*order[:4]}) == 2


def test_the_event_loop_goes_on_meanwhile(star: StarLLM, context: EncodedContext) -> None:
    """Forbids an answer that blocks everything else."""
    gate = Gate()

    async def main() -> None:
        task = asyncio.create_task(
            star.agenerate(context, QUERY, **gate.options | LONG | dict(max_new_tokens=3))
        )
        await gate.is_reached()
        assert not task.done()
        gate.goes_on.set()
        assert len((await task).token_ids) == 3

    run(main())


@pytest.mark.parametrize("kind", ["answer", "stream", "prepared"])
def test_a_canceled_answer_ends(kind: str, star: StarLLM, context: EncodedContext) -> None:
    """Forbids work that nobody waits for."""
    gate = Gate()

    async def consume() -> None:
        if kind == "stream":
            async for _ in star.astream(context, QUERY, **gate.options):
                pass
        elif kind == "prepared":
            prepared = star.prepare(context.token_ids, QUERY, **gate.options)
            await star.agenerate(context, prepared)
        else:
            await star.agenerate(context, QUERY, **gate.options)

    async def main() -> None:
        task = asyncio.create_task(consume())
        await gate.is_reached()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.goes_on.set()
        # The next call has the model to itself soon.
        assert len((await star.agenerate(context, QUERY, max_new_tokens=2)).token_ids) <= 2

    run(main())
    assert gate.steps <= 2


def test_a_call_that_waits_can_be_canceled(star: StarLLM, context: EncodedContext) -> None:
    gate, never = Gate(), Gate()

    async def main() -> None:
        first = asyncio.create_task(
            star.agenerate(context, QUERY, **gate.options | dict(max_new_tokens=2))
        )
        await gate.is_reached()
        second = asyncio.create_task(star.agenerate(context, QUERY, **never.options))
        await asyncio.sleep(0.01)
        second.cancel()
        gate.goes_on.set()
        assert len((await first).token_ids) == 2
        with pytest.raises(asyncio.CancelledError):
            await second

    run(main())
    assert never.steps == 0


def test_a_stream_can_be_left_early(star: StarLLM, context: EncodedContext) -> None:
    async def main() -> None:
        stream = star.astream(context, QUERY, **LONG)
        with pytest.raises(InvalidInputError, match="the stream has not begun"):
            _ = stream.result
        async with stream:
            first = await anext(stream)
            with pytest.raises(InvalidInputError, match="the stream has not ended"):
                _ = stream.result
        assert stream.result.text.startswith(first)
        assert stream.result.finish_reason == "length"
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    run(main())


def test_errors_reach_the_caller(star: StarLLM, context: EncodedContext) -> None:
    async def main() -> None:
        with pytest.raises(UnknownOptionError, match="did you mean 'temperature'"):
            await star.agenerate(context, QUERY, temprature=1)
        with pytest.raises(InvalidInputError, match="stopping_criteria: expected a list"):
            await star.agenerate(context, QUERY, stopping_criteria=3)
        with pytest.raises(InvalidInputError, match="a stream answers one query, got 2"):
            await anext(star.astream(context, [QUERY, QUERY]))
        with pytest.raises(InvalidInputError):
            await star.aencode("")

    run(main())


def test_a_model_is_freed_with_its_thread() -> None:
    async def main(star: StarLLM) -> None:
        await star.agenerate(await star.aencode("the cat"), "what", max_new_tokens=1)

    star = talker(byte_level())
    run(main(star))
    model = weakref.ref(star.model)
    del star
    # The thread drops a call a moment after it has answered it.
    for _ in range(500):
        gc.collect()
        if model() is None:
            return
        time.sleep(0.01)
    raise AssertionError("the model is still there")
