"""Requests of phase 2: checked queries on a context become what the phase runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import LogitsProcessorList

from star_attention import inputs, methods
from star_attention.errors import InvalidInputError
from star_attention.generation.conversation import Conversation
from star_attention.generation.json_answers import JsonProcessor
from star_attention.generation.known_tokens import known_tokens
from star_attention.generation.settings import GenerationSettings, ResolvedSettings
from star_attention.generation.sources import SourceFinder
from star_attention.generation.turns import Turn, prompts_after
from star_attention.hf.execution import slices
from star_attention.hf.execution.request import Request
from star_attention.hf.text.answer import Reading
from star_attention.hf.text.tokens import is_several
from star_attention.inputs import ContextInput, Prepared
from star_attention.planning.sizes import counted
from star_attention.runtime import Runtime
from star_attention.storage.context import EncodedContext, check_place


def later_check(runtime: Runtime, context: EncodedContext) -> Callable[[], None] | None:
    """Do of `Runtime.check_context` what comes before a forward on a context; return the rest.

    Looking at all weights takes milliseconds, in which a device works if the rest is called once
    the forward has been issued. None where nothing is left to look at.

    Raises:
        InvalidInputError, ContextMismatchError: as `Runtime.check_context`; so may the rest.
    """
    check_place(context, runtime.comm)
    if runtime.handle.is_frozen:
        return None
    return runtime.identities.later_check(context, runtime.tokenizer, runtime.device)


def check_room(runtime: Runtime, talk: Conversation, prepared: Prepared) -> None:
    """Raise an error unless checked queries and their answers fit after a conversation."""
    assert prepared.settings is not None, "rank 0 prepares"
    runtime.positions.check_room(
        len(talk.context),
        talk.context.rope_length,
        prepared.prompts,
        prepared.settings.max_new_tokens,
        len(talk.turns),
    )


def prepared(
    runtime: Runtime,
    context: EncodedContext,
    query: Any,
    options: dict[str, Any],
    turns: Sequence[Turn] = (),
) -> Prepared:
    """Return checked queries on a context, with the settings of their answers.

    The model is not compared with the one that encoded the context.

    Args:
        runtime: the engine's.
        context: the context to ask.
        query: a query, a list of them, or `Prepared`.
        options: keywords of `generate`.
        turns: those of a conversation before the queries.
    """
    prepared = _prepared(runtime, context, query, options, turns)
    assert prepared.settings is not None, "rank 0 prepares"
    vocab_size = runtime.handle.vocab_size
    settings = prepared.settings.reading_calls(context.chat, runtime.tokenizer, vocab_size)
    prepared = replace(prepared, settings=settings)
    settings.check_method(methods.get(context.method))
    settings.check_windows(runtime.handle.windows, len(context), context.kv.kv_format.windows)
    return prepared


def _prepared(
    runtime: Runtime,
    context: EncodedContext,
    query: Any,
    options: dict[str, Any],
    turns: Sequence[Turn],
) -> Prepared:
    if isinstance(query, Prepared):
        if turns:
            raise InvalidInputError(
                "a prepared query follows its context, and cannot follow"
                f" {counted(len(turns), 'turn')} of a conversation; give the query itself"
            )
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
        prompts=prompts_after(runtime, after, turns, queries, settings),
        settings=settings,
        several_queries=is_several(query),
        queries=queries,
    )


def for_answers(
    runtime: Runtime,
    context: EncodedContext,
    prompts: list[list[int]],
    settings: ResolvedSettings,
    **others: Any,
) -> Request:
    """Return a request for answers to prompts, after checking that there are positions for them.

    Args:
        runtime: the engine's.
        context: the context.
        prompts: token ids after it, of each query.
        settings: settings of the answers.
        others: fields of a request about keys and values that were kept, and about looks.
    """
    return checked(
        runtime,
        context,
        prompts,
        settings.max_new_tokens,
        generation_kwargs=settings.generation_kwargs,
        seed=settings.arguments.seed,
        logits_processor=_processors(runtime, settings, prompts),
        stopping_criteria=settings.arguments.stopping_criteria,
        second_look=settings.second_look,
        **others,
    )


def source_finder(
    runtime: Runtime, context: EncodedContext, settings: ResolvedSettings, earlier_tokens: int = 0
) -> SourceFinder | None:
    """Return what finds the sources of answers; None if none are wanted.

    `earlier_tokens` are those of earlier turns, which do not count.
    """
    if not settings.sources:
        return None
    return SourceFinder(
        tokenizer=runtime.tokenizer,
        context=ContextInput.of(context),
        most=settings.sources,
        tokens_per_forward=runtime.tokens_per_forward,
        earlier_tokens=earlier_tokens,
    )


def on(runtime: Runtime, context: EncodedContext, **decided: Any) -> Request:
    """Return a request on a context, with the fields that rank 0 has decided of it."""
    return Request(
        handle=runtime.handle,
        context_ids_L=context.token_ids,
        plan=context.plan,
        shard=context.kv,
        rope_length=context.rope_length,
        comm=runtime.comm,
        **{"tokens_per_forward": runtime.tokens_per_forward} | decided,
    )


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


def checked(
    runtime: Runtime,
    context: EncodedContext,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    has_looked: bool = False,
    **options: Any,
) -> Request:
    """Return a request of phase 2, after checking that there are positions for its answers."""
    runtime.positions.check_room(len(context), context.rope_length, prompts, max_new_tokens)
    return on(
        runtime,
        context,
        queries=prompts,
        sliced=slices.choose(
            runtime.handle, runtime.comm, runtime.config.slice_weights, looked=has_looked
        ),
        has_looked=has_looked,
        **options,
    )
