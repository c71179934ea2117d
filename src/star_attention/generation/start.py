"""The start of a call of phase 2: rank 0 checks and tokenizes, the other ranks follow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList

from star_attention import inputs, phase2
from star_attention.distributed.messages import END
from star_attention.errors import InvalidInputError
from star_attention.generation.json_answers import JsonProcessor
from star_attention.generation.known_tokens import known_tokens
from star_attention.generation.run import Follower, FollowerRun, GenerationRun, Shape
from star_attention.generation.settings import GenerationSettings, ResolvedSettings
from star_attention.hf.text.answer import Reading
from star_attention.inputs import ContextInput, Prepared
from star_attention.runtime import Runtime
from star_attention.storage.context import EncodedContext


def start(
    runtime: Runtime,
    context: EncodedContext,
    query: Any,
    options: dict[str, Any],
    *,
    streamed: bool = False,
) -> GenerationRun | FollowerRun:
    """Start one call of phase 2, which rank 0 leads. Collective.

    Args:
        runtime: the engine's.
        context: the context to ask.
        query: a query, a list of them, or `Prepared`.
        options: keywords of `generate`.
        streamed: True for `stream`, which answers one query.
    """
    runs: list[GenerationRun] = []

    def prepare() -> tuple[int, Shape]:
        if streamed:
            _check_streamed(runtime, query)
        runtime.check_context(context)
        prepared = _prepared(runtime, context, query, options)
        settings = prepared.settings
        assert settings is not None, "rank 0 prepares"
        request = _phase2_request(
            runtime,
            context,
            prepared.prompts,
            settings.max_new_tokens,
            generation_kwargs=settings.generation_kwargs,
            seed=settings.arguments.seed,
            logits_processor=_processors(runtime, settings, prepared.prompts),
            stopping_criteria=settings.arguments.stopping_criteria,
        )
        shape = Shape(
            several_queries=prepared.several_queries,
            answers_per_query=settings.answers_per_query,
        )
        run = GenerationRun(
            request,
            settings,
            shape,
            tokenizer=runtime.tokenizer,
            encode_s=context.encode_s,
            streamed=streamed,
        )
        if streamed and (not settings.uses_own_loop or shape.answers_per_query > 1):
            raise InvalidInputError(
                "a stream is one answer by greedy search or sampling; use generate for beams and"
                " several answers"
            )
        runs.append(run)
        return context.key, shape

    follower, shape = _start_on_followers(runtime, prepare)
    return runs[0] if follower is None else FollowerRun(follower, shape)


def _processors(
    runtime: Runtime, settings: ResolvedSettings, prompts: list[list[int]]
) -> LogitsProcessorList | None:
    """Return the user's logits processors, and ours after them."""
    own = [*known_tokens(runtime.tokenizer, runtime.handle.vocab_size, settings.eos_ids)]
    if settings.grammar is not None:
        reading = Reading(runtime.tokenizer, [], settings.answer_prefix)
        readers = [
            reading.reader(prompt) for prompt in prompts for _ in range(settings.answers_per_query)
        ]
        own.append(JsonProcessor(settings.grammar, readers))
    processors = settings.arguments.logits_processor
    return LogitsProcessorList([*(processors or []), *own]) if own else processors


def _start_on_followers(
    runtime: Runtime, prepare: Callable[[], tuple[int, Any]]
) -> tuple[Follower | None, Any]:
    """Run `prepare` on rank 0 and broadcast its result, a context's key and a value.

    Returns:
        The work of a follower (None on rank 0), and the value.
    """
    key, value = runtime.comm.run_on_rank_0(prepare)
    if runtime.comm.rank == 0:
        return None, value
    context: EncodedContext = runtime.comm.contexts.get(key)
    tokens_before = len(context.token_ids)
    follower = phase2.follow(
        runtime.handle, context.kv, tokens_before, context.rope_length, runtime.comm
    )
    return follower, value


def _phase2_request(
    runtime: Runtime,
    context: EncodedContext,
    prompts: list[list[int]],
    max_new_tokens: int,
    **options: Any,
) -> phase2.Request:
    """Return a request of phase 2, after checking that there are positions for its answers."""
    runtime.positions.check_room(len(context), context.rope_length, prompts, max_new_tokens)
    return phase2.Request(
        handle=runtime.handle,
        context_ids_L=context.token_ids,
        shard=context.kv,
        rope_length=context.rope_length,
        queries=prompts,
        tokens_per_forward=runtime.tokens_per_forward,
        comm=runtime.comm,
        **options,
    )


def logits(runtime: Runtime, context: EncodedContext, continuation: Any) -> Tensor | None:
    """Return the logits of every token of a continuation; None on ranks other than 0. Collective.

    Args:
        runtime: the engine's.
        context: the context that is continued.
        continuation: text or token ids.
    """
    requests: list[phase2.Request] = []
    held: list[int] = []

    def prepare() -> tuple[int, None]:
        runtime.check_context(context)
        after = ContextInput.of(context)
        prompt = inputs.prompt_ids(runtime, context.chat, continuation, after=after)
        held.append(inputs.held_tokens(after, prompt))
        requests.append(_phase2_request(runtime, context, [prompt], 0))
        return context.key, None

    follower, _ = _start_on_followers(runtime, prepare)
    if follower is not None:
        for _ in follower:
            pass
        return None
    logits_QV = phase2.logits(requests[0])
    runtime.comm.broadcast_object((END, None))
    return logits_QV[held[0] :]


def _prepared(
    runtime: Runtime, context: EncodedContext, query: Any, options: dict[str, Any]
) -> Prepared:
    if isinstance(query, Prepared):
        if options:
            raise InvalidInputError(
                f"a prepared query brings its own settings, got {', '.join(options)} too; give"
                " them to prepare()"
            )
        query.check_fits(context)
        return query
    settings = GenerationSettings.of(**options).resolve(
        runtime.handle, runtime.tokenizer, chat=context.chat is not None
    )
    queries, after = inputs.as_queries(query), ContextInput.of(context)
    return Prepared(
        contexts=(),
        prompts=[
            inputs.prompt_ids(
                runtime,
                context.chat,
                inputs.checked_query(query),
                settings.answer_prefix,
                after=after,
                template_kwargs=settings.chat_template_kwargs,
            )
            for query in queries
        ],
        settings=settings,
        several_queries=inputs.is_several(query),
    )


def _check_streamed(runtime: Runtime, query: Any) -> None:
    count = len(query.prompts) if isinstance(query, Prepared) else len(inputs.as_queries(query))
    several = query.several_queries if isinstance(query, Prepared) else inputs.is_several(query)
    if several:
        raise InvalidInputError(
            f"a stream answers one query, got {count}; use generate for several"
        )
    runtime.need_tokenizer("a stream of text")
