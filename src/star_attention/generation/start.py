"""The start of a call of phase 2: rank 0 checks and tokenizes, the other ranks follow it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from star_attention import inputs, phase2
from star_attention.distributed.messages import END
from star_attention.errors import InvalidInputError, explained_by
from star_attention.generation import requests, stock
from star_attention.generation.batching.run import RowsRun, serves
from star_attention.generation.conversation import (
    Ask,
    Conversation,
    Keeper,
    LeadingKeeper,
    reusable,
    said_tokens,
)
from star_attention.generation.following import FollowerRun, RepeaterRun
from star_attention.generation.result import Asked, Generation, talk_after
from star_attention.generation.run import GenerationRun, Shape
from star_attention.generation.stream import Stream
from star_attention.hf.execution.request import Program, Request, look_at
from star_attention.hf.text.answer import TextSettings
from star_attention.hf.text.tokens import is_several
from star_attention.inputs import ContextInput, Prepared
from star_attention.runtime import Runtime
from star_attention.storage.context import EncodedContext
from star_attention.storage.kept import KeptTail


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
        kept: key of the keys and values of earlier turns; None for none.
    """

    key: int
    number: int
    shape: Shape
    program: Program | None = None
    text: TextSettings | None = None
    is_last: bool = True
    kept: int | None = None


Run = GenerationRun | RowsRun | FollowerRun | RepeaterRun


def generate(runtime: Runtime, context: Asked, query: Any, options: dict[str, Any]) -> Any:
    """Answer one query or several on a context. Collective.

    Args:
        runtime: the engine's.
        context: the context to ask, or a conversation to continue.
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


def stream(runtime: Runtime, context: Asked, query: Any, options: dict[str, Any]) -> Stream:
    """Start a stream; arguments as for `generate`. Collective."""
    run = next(_runs(runtime, context, query, options, streamed=True))
    assert isinstance(run, GenerationRun | FollowerRun), "other runs do not stream"
    runtime.comm.streams.add(run)
    return Stream(run, runtime.comm)


def _runs(
    runtime: Runtime,
    asked: Asked,
    query: Any,
    options: dict[str, Any],
    *,
    streamed: bool = False,
) -> Iterator[Run]:
    """Start the runs of one call of phase 2, each after the one before has ended. Collective."""
    leading = _leading_runs(runtime, asked, query, options, streamed=streamed)
    runs: list[GenerationRun | RowsRun] = []

    def begin() -> Start:
        start, run = next(leading)
        runs.append(run)
        return start

    if runtime.comm.rank:
        # While rank 0 prepares the call.
        look_at(runtime.handle, runtime.comm, later=streamed)
    is_last = False
    while not is_last:
        message: Start = runtime.comm.run_on_rank_0(begin)
        is_last = message.is_last
        yield runs.pop() if runs else _following_run(runtime, message)


def _leading_runs(
    runtime: Runtime,
    asked: Asked,
    query: Any,
    options: dict[str, Any],
    *,
    streamed: bool,
) -> Iterator[tuple[Start, GenerationRun | RowsRun]]:
    """Yield the runs of one call on rank 0, after checking all of it, and their messages."""
    if streamed:
        _check_streamed(runtime, query)
    talk = talk_after(asked, ask_with(runtime))
    context = talk.context
    check = requests.later_check(runtime, context)
    look_at(runtime.handle, runtime.comm, later=streamed)
    # A changed model or tokenizer may be the reason why queries fail.
    with explained_by(check):
        groups = _groups(runtime, talk, query, options)
    for number, group in enumerate(groups, start=1):
        if not (streamed or talk.turns) and serves(runtime, context, group):
            rows = RowsRun(runtime, context, group, runtime.comm.streams.new_number(), check)
            yield Start(key=context.key, number=rows.number, shape=rows.shape), rows
            continue
        # The first run's check is of the whole call.
        check = check if number == 1 else None
        run, kept = _leading_run(runtime, talk, group, check, streamed=streamed)
        if streamed and (run.program is None or run.shape.answers_per_query > 1):
            raise InvalidInputError(
                "a stream is one answer by greedy search or sampling; use generate for beams and"
                " several answers"
            )
        start = Start(
            key=context.key,
            number=run.number,
            shape=run.shape,
            program=run.program,
            text=run.settings.text if streamed else None,
            is_last=number == len(groups),
            kept=None if kept is None else kept.key,
        )
        yield start, run


def _groups(
    runtime: Runtime, talk: Conversation, query: Any, options: dict[str, Any]
) -> list[Prepared]:
    """Return the checked queries of a call, in groups that are answered one after another."""
    options = {"keep": True} | options if talk.turns else options
    prepared = requests.prepared(runtime, talk.context, query, options, talk.turns)
    settings = prepared.settings
    assert settings is not None, "rank 0 prepares"
    # A second look chooses for one query, and its copy of the context is for that one alone. Kept
    # keys begin one query.
    if not (settings.second_look or talk.turns):
        return [prepared]
    requests.check_room(runtime, talk, prepared)
    return [
        replace(prepared, prompts=[prompt], queries=[each])
        for prompt, each in zip(prepared.prompts, prepared.queries, strict=True)
    ]


def ask_with(runtime: Runtime) -> Ask:
    """Return what answers the next query of a conversation, on all ranks."""

    def ask(conversation: Conversation, query: Any, options: dict[str, Any]) -> Any:
        with runtime.collective("generate"):
            return generate(runtime, conversation, query, options)

    return ask


def _leading_run(
    runtime: Runtime,
    talk: Conversation,
    prepared: Prepared,
    check: Callable[[], None] | None,
    *,
    streamed: bool,
) -> tuple[GenerationRun, KeptTail | None]:
    """Return a run on rank 0, and what it takes over from earlier turns.

    `check` is what is left to check of the model.
    """
    settings, context = prepared.settings, talk.context
    assert settings is not None, "rank 0 prepares"
    kept, kept_tokens = None, 0
    if settings.uses_own_loop and not settings.second_look:
        kept, kept_tokens = reusable(talk, prepared.prompts[0])
    request = requests.for_answers(
        runtime,
        context,
        prepared.prompts,
        settings,
        kept=kept,
        kept_tokens=kept_tokens,
        has_looked=True,
        looks_late=streamed,
    )
    is_later = settings.uses_own_loop and (streamed or request.is_ready)
    if check is not None and not is_later:
        check()
        check = None
    run = GenerationRun(
        request,
        settings,
        Shape(
            several_queries=prepared.several_queries,
            answers_per_query=settings.answers_per_query,
        ),
        tokenizer=runtime.tokenizer,
        encode_s=context.encode_s,
        number=runtime.comm.streams.new_number(),
        finder=requests.source_finder(
            runtime, context, settings, said_tokens(talk, prepared.prompts[0])
        ),
        keeper=LeadingKeeper.of(
            talk, prepared.queries, settings, runtime.tokenizer, ask_with(runtime)
        ),
        check=check,
    )
    return run, kept


def _following_run(runtime: Runtime, message: Start) -> FollowerRun | RepeaterRun:
    contexts = runtime.comm.contexts
    context: EncodedContext = contexts.get(message.key)
    keeper = Keeper(context=context, ask=ask_with(runtime))
    program = message.program
    if program is None:
        return RepeaterRun(lambda: _repeat(runtime, context), message.shape, keeper)
    request = requests.on(
        runtime,
        context,
        queries=program.queries,
        tokens_per_forward=program.tokens_per_forward,
        sliced=program.sliced,
        second_look=program.second_look,
        kept=None if message.kept is None else contexts.get(message.kept),
        has_looked=True,
        looks_late=message.text is not None,
    )
    answer = None
    if message.text is not None:
        reading = message.text.reading(runtime.need_tokenizer("a stream of text"))
        (answer,) = message.text.answers(reading, program.queries)
    follower = phase2.Follower(request, program)
    return FollowerRun(follower, answer, message.shape, message.number, keeper)


def _repeat(runtime: Runtime, context: EncodedContext) -> Any:
    """Repeat rank 0's forwards; return what its last message holds."""
    return stock.follow(requests.on(runtime, context, queries=[]))


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
        held.append(_held_tokens(after, prompt))
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


def _held_tokens(source: ContextInput, prompt: list[int]) -> int:
    """Count the tokens at the beginning of a prompt that are the context's, held back of it."""
    held = source.held_ids
    most = min(len(held), len(prompt) - 1)
    return next((n for n in range(most) if prompt[n] != held[n]), most)


def _check_streamed(runtime: Runtime, query: Any) -> None:
    count = len(query.prompts) if isinstance(query, Prepared) else len(inputs.as_queries(query))
    several = query.several_queries if isinstance(query, Prepared) else is_several(query)
    if several:
        raise InvalidInputError(
            f"a stream answers one query, got {count}; use generate for several"
        )
    runtime.need_tokenizer("a stream of text")
