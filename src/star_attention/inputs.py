"""Text, token ids and chat messages become checked token ids here, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from star_attention.errors import ContextLengthError, InvalidInputError, TokenError
from star_attention.generation.settings import GenerationSettings, ResolvedSettings
from star_attention.hf.text import chat, tokens
from star_attention.runtime import Runtime
from star_attention.storage.context import EncodedContext
from star_attention.storage.kv import as_tensor_ids

Message = chat.Message
TextOrIds = str | Sequence[int] | Tensor
Content = TextOrIds | Sequence[Message]
"""A context or a query: text, token ids, or chat messages."""
Contents = list[str] | list[list[int]] | list[Tensor] | list[list[Message]] | tuple[Content, ...]
"""Several contexts or queries."""

_MORE_POSITIONS = "or use a model with more positions"


@dataclass(frozen=True, kw_only=True)
class ContextInput:
    """A context that is ready to be encoded.

    Attributes:
        ids_L: checked token ids, int64 on CPU.
        chat: how the chat continues after the context, or None for raw text.
    """

    ids_L: Tensor
    chat: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A context and its queries, checked and tokenized: the result of `StarLLM.prepare`.

    Attributes:
        contexts: the context, as a tuple with one element.
        prompts: token ids of each query, with what the chat template adds.
        settings: the settings of the answers.
        several_queries: True if the queries came as a list.

    On ranks other than 0, whose arguments do not count, it is empty.
    """

    contexts: tuple[ContextInput, ...] = ()
    prompts: list[list[int]] = field(default_factory=list)
    settings: ResolvedSettings | None = None
    several_queries: bool = False

    def check_fits(self, context_ids_L: Tensor) -> None:
        """Raise `InvalidInputError` for a context other than the one prepared."""
        if self.contexts and not torch.equal(self.contexts[0].ids_L, context_ids_L):
            raise InvalidInputError(
                f"the query was prepared for another context of {len(self.contexts[0].ids_L):,}"
                f" tokens, got one of {len(context_ids_L):,}; encode the prepared one, or give the"
                " query itself"
            )


def is_several(content: Any) -> bool:
    """Return True for a list of contexts or queries, False for token ids or chat messages."""
    if isinstance(content, Tensor):
        return content.dim() == 2 and content.shape[0] > 1
    if not isinstance(content, (list, tuple)) or chat.is_messages(content):
        return False
    return any(
        item.dim() > 0 if isinstance(item, Tensor) else isinstance(item, Sized) for item in content
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
    context, prompts = _prepare_one(runtime, content, as_queries(query), settings, warn=True)
    return Prepared(
        contexts=(context,),
        prompts=prompts,
        settings=settings,
        several_queries=is_several(query),
    )


def prepare_contexts(
    runtime: Runtime, content: Any, query: Any = None, options: dict[str, Any] | None = None
) -> tuple[bool, list[ContextInput]]:
    """Check and tokenize contexts.

    Args:
        runtime: the engine's.
        content: a context, a list of them, or `Prepared`.
        query: queries that will be asked of each context, where known: one without room for its
            answer is refused here.
        options: keywords of `generate` for these queries.

    Returns:
        True if `content` was a list, and the contexts.
    """
    if isinstance(content, Prepared):
        if query is not None or options is not None:
            raise InvalidInputError(
                "a prepared context brings its own query and settings, got others too; give them"
                " to prepare()"
            )
        return False, list(content.contexts)
    several, queries = is_several(content), as_queries(query)
    settings = None
    if query is not None or options is not None:
        settings = GenerationSettings.of(**(options or {})).resolve(
            runtime.handle, runtime.tokenizer
        )
    contexts = content if several else [content]
    return several, [_prepare_one(runtime, context, queries, settings)[0] for context in contexts]


def _prepare_one(
    runtime: Runtime,
    content: Any,
    queries: list[Any],
    settings: ResolvedSettings | None,
    *,
    warn: bool = False,
) -> tuple[ContextInput, list[list[int]]]:
    """Return a checked context and, with settings, its checked prompts."""
    ids_L, opened = _context_ids(runtime, content)
    check_positions(runtime, len(ids_L), "the context has", f"cut the context, {_MORE_POSITIONS}")
    runtime.plan_for(len(ids_L))
    chat_state = None if opened is None else opened.as_dict()
    prompts: list[list[int]] = []
    if settings is not None:
        prompts = [
            prompt_ids(runtime, chat_state, query, settings.answer_prefix, warn=warn)
            for query in queries
        ]
        rope_length = runtime.rope_length(len(ids_L))
        check_room(runtime, len(ids_L), rope_length, prompts, settings.max_new_tokens)
    return ContextInput(ids_L=ids_L, chat=chat_state), prompts


def _context_ids(runtime: Runtime, content: Content) -> tuple[Tensor, chat.ChatContext | None]:
    vocab_size = runtime.handle.vocab_size
    if chat.is_messages(content):
        opened = chat.open_context(runtime.tokenizer, list(content))
        ids = tokens.query_ids(runtime.tokenizer, opened.head)
        return checked_ids(ids, "context", vocab_size), opened
    if isinstance(content, str):
        if not content:
            raise TokenError(
                "the context is empty; Star Attention needs at least 1 token of context"
            )
        ids = tokens.context_ids(runtime.need_tokenizer("text"), content)
        return checked_ids(ids, "context", vocab_size), None
    return checked_ids(content, "context", vocab_size), None


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
    if isinstance(more, str):
        more = tokens.query_ids(runtime.need_tokenizer("text"), more)
    new_ids = checked_ids(more, "extension", runtime.handle.vocab_size)
    ids_L = torch.cat([context.token_ids, new_ids])
    check_positions(
        runtime,
        len(ids_L),
        "the extended context has",
        f"cut the extension, {_MORE_POSITIONS}",
    )
    if context.rope_length is not None and len(ids_L) >= context.rope_length:
        raise ContextLengthError(
            f"the extended context has {len(ids_L):,} tokens, but its rotary frequencies are pinned"
            f" to {context.rope_length:,}; encode the joined text again, or encode the first part"
            f" with a larger reserve_tokens (now {runtime.config.reserve_tokens:,})"
        )
    return ContextInput(ids_L=ids_L, chat=_extended_chat(runtime, context.chat, new_ids))


def _extended_chat(
    runtime: Runtime, chat_state: dict[str, Any] | None, new_ids: Tensor
) -> dict[str, Any] | None:
    if chat_state is None:
        return None
    opened = chat.ChatContext.from_dict(chat_state)
    if not opened.open:
        raise InvalidInputError(
            "this chat context ends in a closed turn; only an open user message can be extended"
        )
    text = tokens.decode(runtime.tokenizer, new_ids.tolist())
    return chat.extended(runtime.tokenizer, opened, text).as_dict()


def prompt_ids(
    runtime: Runtime,
    chat_state: dict[str, Any] | None,
    query: Any,
    answer_prefix: str = "",
    *,
    warn: bool = True,
) -> list[int]:
    """Return the token ids that follow a context: the query and the start of its answer.

    Args:
        runtime: the engine's.
        chat_state: how the context's chat continues, or None for raw text.
        query: text, token ids, chat messages; None for the question that the context came with.
        answer_prefix: text that the answer begins with.
        warn: warn where context and query are tokenized differently than the joined text.
    """
    is_text = isinstance(query, str)
    if chat_state is not None and (query is None or is_text or chat.is_messages(query)):
        runtime.need_tokenizer("chat messages")
        opened = chat.ChatContext.from_dict(chat_state)
        tail = chat.continue_context(runtime.tokenizer, opened, query).text
        if warn:
            chat.warn_about_cut(runtime.tokenizer, opened.head, tail)
        query = tokens.query_ids(runtime.tokenizer, tail + answer_prefix)
        answer_prefix = ""
    elif chat.is_messages(query):
        raise InvalidInputError(
            "a query of chat messages needs a context of chat messages; encode the context as"
            " messages"
        )
    elif query is None or (query == "" and is_text):
        raise TokenError("the query is empty; give at least 1 token")
    elif is_text:
        query = tokens.query_ids(runtime.need_tokenizer("text"), query + answer_prefix)
        answer_prefix = ""
    ids: list[int] = checked_ids(query, "query", runtime.handle.vocab_size).tolist()
    if answer_prefix:
        ids += tokens.query_ids(runtime.need_tokenizer("an answer prefix"), answer_prefix)
    return ids


def checked_ids(ids: Any, name: str, vocab_size: int) -> Tensor:
    """Return token ids as an int64 tensor `[tokens]` on CPU.

    Raises:
        TokenError: no tokens, ids outside the vocabulary, or another type; `name` says of what.
    """
    if isinstance(ids, (bytes, bytearray, dict, set, frozenset)):
        raise TokenError(
            f"the {name} must be text, token ids or chat messages, got {type(ids).__name__}"
        )
    if not isinstance(ids, Tensor) and hasattr(ids, "input_ids"):
        raise TokenError(f"the {name} is a tokenizer's output; give its input_ids")
    try:
        tensor = ids if isinstance(ids, Tensor) else torch.tensor(list(ids))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TokenError(f"the {name} must be text, token ids or chat messages ({error})") from None
    if tensor.dim() == 2 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() != 1:
        raise TokenError(
            f"the {name} has ids of shape {tuple(tensor.shape)}; give one row of token ids"
        )
    if tensor.numel() == 0:
        raise TokenError(f"the {name} is empty (0 tokens); give at least 1 token")
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise TokenError(f"the {name} has {tensor.dtype} values; token ids are integers")
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or high >= vocab_size:
        raise TokenError(
            f"the {name} has token id {low if low < 0 else high}, outside the model's vocabulary"
            f" 0..{vocab_size - 1}; is the tokenizer the model's own?"
        )
    return as_tensor_ids(tensor)


def check_positions(runtime: Runtime, count: int, subject: str, remedy: str) -> None:
    """Raise `ContextLengthError` for more tokens than the model has positions."""
    limit = runtime.handle.max_positions
    if limit is not None and count > limit:
        raise ContextLengthError(
            f"{subject} {count:,} tokens, more than the model's {limit:,} positions; {remedy}"
        )


def check_room(
    runtime: Runtime,
    context_tokens: int,
    rope_length: int | None,
    prompts: list[list[int]],
    max_new_tokens: int,
) -> None:
    """Raise `ContextLengthError` where context, query and answer need too many positions."""
    longest = context_tokens + max(len(prompt) for prompt in prompts) + max_new_tokens
    subject = f"context ({context_tokens:,}), query and answer ({max_new_tokens:,}) need"
    check_positions(
        runtime,
        longest,
        subject,
        "lower max_new_tokens, or shorten the query or the context",
    )
    if rope_length is not None and longest > rope_length:
        raise ContextLengthError(
            f"{subject} {longest:,} tokens, but the context's rotary frequencies are pinned to"
            f" {rope_length:,}; lower max_new_tokens, or encode the context with a larger"
            f" reserve_tokens (now {runtime.config.reserve_tokens:,})"
        )
