"""The start of a call of phase 2: rank 0 checks and tokenizes, the other ranks follow it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from star_attention import inputs, phase2
from star_attention.distributed.messages import END
from star_attention.errors import InvalidInputError
from star_attention.generation import requests, stock
from star_attention.generation.following import FollowerRun, RepeaterRun
from star_attention.generation.result import Generation
from star_attention.generation.run import GenerationRun, Shape
from star_attention.generation.stream import Stream
from star_attention.hf.execution.request import Program, Request
from star_attention.hf.text.answer import TextSettings
from star_attention.hf.text.tokens import is_several
from star_attention.inputs import ContextInput, Prepared
from star_attention.runtime import Runtime
from star_attention.storage.context import EncodedContext


@dataclass(frozen=True, kw_only=True)
class Start:
    """What rank 0 tells the other ranks of a call of phase 2, once at its start.

    Attributes:
        key: key of the context.
        number: the call's number on all ranks.
        shape: grouping of the answers.
        program: the steps; None where rank 0 runs transformers' loops, or no loop.
        text: how a stream's answer becomes text; None without a stream.
        is_last: False if another run of the same call follows.
    """

    key: int
    number: int
    shape: Shape
    program: Program | None = None
    text: TextSettings | None = None
    is_last: bool = True


def generate(runtime: Runtime, context: EncodedContext, query: Any, options: dict[str, Any]) -> Any:
    """Answer one query or several on a context. Collective.

    Args:
        runtime: the engine's.
        context: the context to ask.
        query: a query, a list of them, or `Prepared`.
        options: keywords of `generate`.

    Returns:
        The answers, grouped as `Shape` says.
    """
    answers: list[Generation] = []
    for run in _runs(runtime, context, query, options):
        for _ in run.pieces():
            pass
        answers += run.generations()
        shape = run.shape
    return shape.group(answers)


def stream(
    runtime: Runtime, context: EncodedContext, query: Any, options: dict[str, Any]
) -> Stream:
    """Start a stream; arguments as for `generate`. Collective."""
    run = next(_runs(runtime, context, query, options, streamed=True))
    assert not isinstance(run, RepeaterRun), "transformers' loops do not stream"
    runtime.comm.streams.add(run)
    return Stream(run, runtime.comm)


def _runs(
    runtime: Runtime,
    context: EncodedContext,
    query: Any,
    options: dict[str, Any],
    *,
    streamed: bool = False,
) -> Iterator[GenerationRun | FollowerRun | RepeaterRun]:
    """Start the runs of one call of phase 2, each after the one before has ended. Collective."""
    leading = _leading_runs(runtime, context, query, options, streamed=streamed)
    runs: list[GenerationRun] = []

    def begin() -> Start:
        run, is_last = next(leading)
        runs.append(run)
        return Start(
            key=context.key,
            number=run.number,
            shape=run.shape,
            program=run.program,
            text=run.settings.text if streamed else None,
            is_last=is_last,
        )

    is_last = False
    while not is_last:
        message: Start = runtime.comm.run_on_rank_0(begin)
        is_last = message.is_last
        yield runs.pop() if runs else _following_run(runtime, message)


def _leading_runs(
    runtime: Runtime,
    context: EncodedContext,
    query: Any,
    options: dict[str, Any],
    *,
    streamed: bool,
) -> Iterator[tuple[GenerationRun, bool]]:
    """Yield the runs of one call on rank 0, after checking all of it; True with the last one."""
    if streamed:
        _check_streamed(runtime, query)
    prepared = requests.prepared(runtime, context, query, options)
    settings = prepared.settings
    assert settings is not None, "rank 0 prepares"
    groups = [prepared.prompts]
    if settings.second_look:
        # It chooses for one query, and its copy of the context is for that one alone.
        groups = [[prompt] for prompt in prepared.prompts]
        runtime.positions.check_room(
            len(context), context.rope_length, prepared.prompts, settings.max_new_tokens
        )
    for number, prompts in enumerate(groups, start=1):
        run = _leading_run(runtime, context, replace(prepared, prompts=prompts))
        if streamed and (run.program is None or run.shape.answers_per_query > 1):
            raise InvalidInputError(
                "a stream is one answer by greedy search or sampling; use generate for beams and"
                " several answers"
            )
        yield run, number == len(groups)


def _leading_run(runtime: Runtime, context: EncodedContext, prepared: Prepared) -> GenerationRun:
    settings = prepared.settings
    assert settings is not None, "rank 0 prepares"
    request = requests.for_answers(runtime, context, prepared.prompts, settings)
    return GenerationRun(
        request,
        settings,
        Shape(
            several_queries=prepared.several_queries,
            answers_per_query=settings.answers_per_query,
        ),
        tokenizer=runtime.tokenizer,
        encode_s=context.encode_s,
        number=runtime.comm.streams.new_number(),
        finder=requests.source_finder(runtime, context, settings),
    )


def _following_run(runtime: Runtime, message: Start) -> FollowerRun | RepeaterRun:
    context: EncodedContext = runtime.comm.contexts.get(message.key)
    program = message.program
    if program is None:
        return RepeaterRun(lambda: _repeat(runtime, context), message.shape)
    request = replace(
        requests.bare(runtime, context),
        queries=program.queries,
        tokens_per_forward=program.tokens_per_forward,
        sliced=program.sliced,
        second_look=program.second_look,
    )
    answer = None
    if message.text is not None:
        reading = message.text.reading(runtime.need_tokenizer("a stream of text"))
        (answer,) = message.text.answers(reading, program.queries)
    follower = phase2.Follower(request, program)
    return FollowerRun(follower, answer, message.shape, message.number, runtime.comm)


def _repeat(runtime: Runtime, context: EncodedContext) -> Any:
    """Repeat rank 0's forwards; return what its last message holds."""
    return stock.follow(requests.bare(runtime, context))


def logits(runtime: Runtime, context: EncodedContext, continuation: Any) -> Tensor | None:
    """Return the logits of every token of a continuation; None on ranks other than 0. Collective.

    Args:
        runtime: the engine's.
        context: the context that is continued.
        continuation: text or token ids.
    """
    ready: list[Request] = []
    held: list[int] = []

    def prepare() -> int:
        runtime.check_context(context)
        after = ContextInput.of(context)
        prompt = inputs.prompt_ids(runtime, after, continuation)
        held.append(inputs.held_tokens(after, prompt))
        ready.append(requests.checked(runtime, context, [prompt], 0))
        return context.key

    comm = runtime.comm
    key = comm.run_on_rank_0(prepare)
    if comm.rank:
        _repeat(runtime, comm.contexts.get(key))
        return None
    logits_QV = phase2.logits(ready[0])
    comm.broadcast_object((END, comm.streams.new_number(), None))
    return logits_QV[held[0] :]


def _check_streamed(runtime: Runtime, query: Any) -> None:
    count = len(query.prompts) if isinstance(query, Prepared) else len(inputs.as_queries(query))
    several = query.several_queries if isinstance(query, Prepared) else is_several(query)
    if several:
        raise InvalidInputError(
            f"a stream answers one query, got {count}; use generate for several"
        )
    runtime.need_tokenizer("a stream of text")
