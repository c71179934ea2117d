"""Text, token ids and chat messages become checked token ids here, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from star_attention.errors import ContextLengthError, InvalidInputError, TokenError
from star_attention.generation.known_tokens import warn_about_unknown_ids
from star_attention.generation.settings import GenerationSettings, ResolvedSettings
from star_attention.hf.text import chat, joining, tokens
from star_attention.hf.text.checks import (
    check_no_path,
    check_words,
    checked_text,
    for_each,
    warn_about_file_name,
)
from star_attention.hf.text.joining import ContextEnd
from star_attention.hf.text.reading import Reader
from star_attention.hf.text.rendered import RenderedText
from star_attention.hf.text.template import check_unused
from star_attention.hf.text.tokens import checked_ids, is_several
from star_attention.runtime import Runtime
from star_attention.storage.context import EncodedContext

Message = chat.Message
TextOrIds = str | Sequence[int] | Tensor
Content = TextOrIds | Sequence[Message]
"""A context or a query: text, token ids, or chat messages."""
Contents = list[str] | list[list[int]] | list[Tensor] | list[list[Message]] | tuple[Content, ...]
"""Several contexts or queries."""

_END_IDS = 400
"""Token ids at the end of a context that its text is compared with."""

_MORE_POSITIONS = "or use a model with more positions"


@dataclass(frozen=True, kw_only=True)
class ContextInput:
    """A context that is ready to be encoded.

    Attributes:
        ids_L: checked token ids, int64 on CPU.
        chat: how the chat continues after the context, or None for raw text.
        end: the end of its text, as a `ContextEnd` describes itself; None for token ids.
        text: its text; None for chat messages and token ids.
        needed: tokens of context, longest query and answer; None if those are not known.
        warned: what has been warned of, to say it once.
    """

    ids_L: Tensor
    chat: dict[str, Any] | None
    end: dict[str, Any] | None = None
    text: str | None = None
    needed: int | None = None
    warned: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, context: EncodedContext) -> ContextInput:
        """Return what an encoded context was made of."""
        return cls(
            ids_L=context.token_ids,
            chat=context.chat,
            end=context.end,
            text=context.text,
            warned=context.warned,
        )

    @property
    def held_ids(self) -> list[int]:
        """The token ids that are held back of the context."""
        return [] if self.end is None else list(self.end["held_ids"])


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A context and its queries, checked and tokenized: the result of `StarLLM.prepare`.

    Attributes:
        contexts: the context, as a tuple with one element.
        prompts: token ids of each query, with what the chat template adds.
        settings: the settings of the answers.
        several_queries: True if the queries came as a list.
        queries: the queries themselves.

    On ranks other than 0, whose arguments do not count, it is empty.
    """

    contexts: tuple[ContextInput, ...] = ()
    prompts: list[list[int]] = field(default_factory=list)
    settings: ResolvedSettings | None = None
    several_queries: bool = False
    queries: list[Any] = field(default_factory=list)

    def check_fits(self, context: EncodedContext) -> None:
        """Raise `InvalidInputError` for a context other than the one prepared."""
        if not self.contexts:
            return
        own, ids_L = self.contexts[0], context.token_ids
        is_same = own.ids_L is ids_L or torch.equal(own.ids_L, ids_L)
        if not is_same or own.held_ids != ContextInput.of(context).held_ids:
            raise InvalidInputError(
                f"the query was prepared for another context of {len(own.ids_L):,} tokens, got one"
                f" of {len(ids_L):,}; encode the prepared one, or give the query itself"
            )


def as_queries(query: Any) -> list[Any]:
    """Return the queries as a list; a single query becomes a list of one element."""
    return list(query) if is_several(query) else [query]


def prepare(runtime: Runtime, content: Any, query: Any, options: dict[str, Any]) -> Prepared:
    """Check and tokenize a context with its queries, before anything is encoded."""
    if is_several(content):
        raise InvalidInputError(
            f"prepare takes one context, got {len(content)}; prepare them one by one"
        )
    settings = GenerationSettings.of(**options).resolve(
        runtime.handle, runtime.tokenizer, chat=chat.is_messages(content)
    )
    queries = as_queries(query)
    context, prompts = _prepare_one(
        runtime, content, queries, settings, settings.chat_template_kwargs, warn=True
    )
    return Prepared(
        contexts=(context,),
        prompts=prompts,
        settings=settings,
        several_queries=is_several(query),
        queries=queries,
    )


def prepare_contexts(
    runtime: Runtime,
    content: Any,
    query: Any = None,
    options: dict[str, Any] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> tuple[bool, list[ContextInput]]:
    """Check and tokenize contexts.

    Args:
        runtime: the engine's.
        content: a context, a list of them, or `Prepared`.
        query: queries that will be asked of each context, where known: one without room for its
            answer is refused here.
        options: keywords of `generate` for these queries.
        template_kwargs: what the chat template reads beside messages.

    Returns:
        True if `content` was a list, and the contexts.
    """
    if isinstance(content, Prepared):
        if query is not None or options is not None or template_kwargs is not None:
            raise InvalidInputError(
                "a prepared context brings its own query and settings, got others too; give them"
                " to prepare()"
            )
        return False, list(content.contexts)
    several, queries = is_several(content), as_queries(query)
    settings = None
    if query is not None or options is not None:
        given = GenerationSettings.of(**(options or {}))
        settings = given.resolve(runtime.handle, runtime.tokenizer)
    return several, for_each(
        "context",
        list(content) if several else [content],
        lambda context: _prepare_one(runtime, context, queries, settings, template_kwargs)[0],
    )


def _prepare_one(
    runtime: Runtime,
    content: Any,
    queries: list[Any],
    settings: ResolvedSettings | None,
    template_kwargs: dict[str, Any] | None,
    *,
    warn: bool = False,
) -> tuple[ContextInput, list[list[int]]]:
    """Return a checked context and, with settings, its checked prompts."""
    source = _context_input(runtime, content, template_kwargs)
    ids_L = source.ids_L
    runtime.positions.check(len(ids_L), "the context has", f"cut the context, {_MORE_POSITIONS}")
    runtime.plan_for(len(ids_L))
    runtime.warn_of_small_blocks(len(ids_L))
    prompts: list[list[int]] = []
    if settings is not None:
        # Raises for a call that cannot be made.
        settings.reading_calls(source.chat, runtime.tokenizer, runtime.handle.vocab_size)
        settings.check_method(runtime.method)
        settings.check_windows(runtime.handle.windows, len(ids_L), runtime.config.kv_windows)
        prompts = query_prompts(runtime, source, queries, settings, warn=warn)
        needed = len(ids_L) + max(map(len, prompts)) + settings.max_new_tokens
        source = replace(source, needed=needed)
        rope_length = runtime.rope_length(len(ids_L), needed)
        runtime.positions.check_room(len(ids_L), rope_length, prompts, settings.max_new_tokens)
    return source, prompts


def _context_input(
    runtime: Runtime, content: Content, template_kwargs: dict[str, Any] | None
) -> ContextInput:
    """Tokenize a context, and hold back the end that depends on what follows."""
    check_no_path(content)
    opened: chat.ChatContext | None = None
    ids: Any = content
    end: ContextEnd | None = None
    if chat.is_messages(content):
        opened = chat.open_context(runtime.tokenizer, list(content), template_kwargs)
        ids, end = _reader(runtime).chat_context(opened.rendered)
        if len(content) == 1:
            warn_about_file_name(content[0].get("content"))  # type: ignore[union-attr]
    else:
        check_unused("context", template_kwargs)
    if isinstance(content, str):
        check_words(content, "context")
        warn_about_file_name(content)
        runtime.need_tokenizer("text")
        reader = _reader(runtime)
        ids, end = reader.raw_context(reader.raw(content, "context"))
    vocab_size = runtime.handle.vocab_size
    ids_L = checked_ids(ids, "context", vocab_size)
    if ids is content:
        warn_about_unknown_ids(runtime.tokenizer, vocab_size, ids_L)
    return ContextInput(
        ids_L=ids_L,
        chat=None if opened is None else opened.as_dict(),
        end=None if end is None else end.as_dict(),
        text=content if isinstance(content, str) else None,
    )


def _reader(runtime: Runtime) -> Reader:
    return Reader(runtime.tokenizer, runtime.config.allow_special_tokens)


def extended(runtime: Runtime, context: EncodedContext, more: TextOrIds) -> ContextInput:
    """Return the input of a context continued with `more`, text or token ids.

    Raises:
        InvalidInputError: the context cannot be extended, or `more` is of another type.
        ContextLengthError: more tokens than there are positions.
    """
    if chat.is_messages(more):
        raise InvalidInputError(
            "extend takes text or token ids, got chat messages; give the text alone (it continues"
            " the chat's open user message), or encode all messages again"
        )
    source = ContextInput.of(context)
    if isinstance(more, str) and more:
        new_ids, chat_state, end = _extension(runtime, source, more)
    else:
        ids_L = checked_ids(more, "extension", runtime.handle.vocab_size)
        text = "" if source.chat is None else tokens.decode(runtime.tokenizer, ids_L.tolist())
        chat_state, end = chat.extended(runtime.tokenizer, source.chat, text), None
        new_ids = source.held_ids + ids_L.tolist()
    new_ids_N = torch.tensor(new_ids, dtype=torch.int64, device="cpu")
    ids_L = torch.cat([context.token_ids, new_ids_N])
    remedy = f"cut the extension, {_MORE_POSITIONS}"
    runtime.positions.check(len(ids_L), "the extended context has", remedy)
    if context.rope_length is not None and len(ids_L) >= context.rope_length:
        raise ContextLengthError(
            f"the extended context has {len(ids_L):,} tokens, but its rotary frequencies are pinned"
            f" to {context.rope_length:,}; encode the joined text again, or encode the first part"
            f" with a larger reserve_tokens (now {runtime.config.reserve_tokens:,})"
        )
    text_is_known = source.text is not None and isinstance(more, str)
    joined = f"{source.text}{more}" if text_is_known else None
    return ContextInput(ids_L=ids_L, chat=chat_state, end=end, text=joined)


def _extension(
    runtime: Runtime, source: ContextInput, more: str
) -> tuple[list[int], dict[str, Any] | None, dict[str, Any] | None]:
    """Return the new token ids of a context that continues with a text, its chat and its end."""
    runtime.need_tokenizer("text")
    reader, name = _reader(runtime), "extension"
    text = reader.raw(more, name) if source.chat is None else reader.message(more, name)
    chat_state = chat.extended(runtime.tokenizer, source.chat, text.text)
    end = _context_end(runtime, source)
    ids, new_end, is_joined = reader.extension(end, text)
    if not is_joined:
        joining.warn_about_cut(end, text, name, source.warned)
    if ids:
        checked_ids(ids, name, runtime.handle.vocab_size)
    return ids, chat_state, None if new_end is None else new_end.as_dict()


def query_prompts(
    runtime: Runtime,
    after: ContextInput,
    queries: list[Any],
    settings: ResolvedSettings,
    *,
    warn: bool = True,
) -> list[list[int]]:
    """Return the checked token ids that follow a context, for each query."""
    kwargs, prefix = settings.chat_template_kwargs, settings.answer_prefix

    def prompt(query: Any) -> list[int]:
        if isinstance(query, str):
            check_words(query, "query")
        return prompt_ids(runtime, after, query, prefix, warn=warn, template_kwargs=kwargs)

    return for_each("query", queries, prompt)


def prompt_ids(
    runtime: Runtime,
    after: ContextInput,
    query: Any,
    answer_prefix: str = "",
    *,
    warn: bool = True,
    template_kwargs: dict[str, Any] | None = None,
    earlier: Sequence[Message] = (),
) -> list[int]:
    """Return the token ids that follow a context: the query and the start of its answer.

    Args:
        runtime: the engine's.
        after: the context; what is held back of it comes first.
        query: text, token ids, chat messages; None for the question that the context came with.
        answer_prefix: text that the answer begins with.
        warn: warn where context and query are tokenized differently than the joined text.
        template_kwargs: what the chat template reads beside messages, where it differs from the
            context's.
        earlier: messages of a chat between context and query.
    """
    reader = _reader(runtime)
    answer_start = reader.raw(answer_prefix, "answer prefix")
    is_text = query is None or isinstance(query, str)
    is_chat = after.chat is not None and (is_text or chat.is_messages(query))
    if not is_chat:
        check_unused("query", template_kwargs)
    if after.chat is not None and is_chat:
        runtime.need_tokenizer("chat messages")
        opened = chat.ChatContext.from_dict(after.chat)
        if isinstance(query, str):
            query = checked_text(query, "the query")
        tail = chat.continue_context(
            runtime.tokenizer,
            opened,
            query,
            template_kwargs,
            earlier=earlier,
            warned=after.warned if warn else set(chat.WARNINGS),
        )
        text = reader.rendered(tail) + answer_start
    elif chat.is_messages(query):
        raise InvalidInputError(
            "a query of chat messages needs a context of chat messages; encode the context as"
            " messages"
        )
    elif query is None or (isinstance(query, str) and query == ""):
        none = " (None)" if query is None else ""
        raise TokenError(f"the query is empty{none}; give at least 1 token")
    elif isinstance(query, str):
        runtime.need_tokenizer("text")
        text = reader.raw(query, "query") + answer_start
    else:
        return _prompt_of_ids(runtime, query, answer_start, after)
    end = _context_end(runtime, after)
    ids, is_joined = joining.following_ids(runtime.tokenizer, end, text)
    if warn and not is_joined:
        joining.warn_about_cut(end, text, "query", after.warned)
    checked: list[int] = checked_ids(ids, "query", runtime.handle.vocab_size).tolist()
    return checked


def _prompt_of_ids(
    runtime: Runtime, query: Any, answer_start: RenderedText, after: ContextInput
) -> list[int]:
    """Return the ids of a query of token ids, after those held back and before the answer's."""
    ids: list[int] = checked_ids(query, "query", runtime.handle.vocab_size).tolist()
    if answer_start.text:
        tokenizer = runtime.need_tokenizer("an answer prefix")
        end = joining.end_of_ids(tokenizer, ids)
        ids += joining.following_ids(tokenizer, end, answer_start)[0]
    return after.held_ids + ids


def _context_end(runtime: Runtime, source: ContextInput) -> ContextEnd | None:
    """Return the end of a context; of one without, what its chat or its ids say."""
    if source.end is not None:
        return ContextEnd.of(source.end)
    ids: list[int] = source.ids_L[-_END_IDS:].tolist()
    if source.chat is not None:
        opened = chat.ChatContext.from_dict(source.chat)
        return _reader(runtime).end_of_chat(opened.rendered, ids)
    return joining.end_of_ids(runtime.tokenizer, ids)
