"""The turns of a conversation, and the token ids of a query that follows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from star_attention import inputs
from star_attention.errors import InvalidInputError, TokenError
from star_attention.generation.settings import ResolvedSettings
from star_attention.hf.text.checks import check_words, for_each
from star_attention.hf.text.conversation import ChatContext, after_turns, answered, query_messages
from star_attention.hf.text.messages import Message, is_messages, normalized
from star_attention.hf.text.tokens import checked_ids
from star_attention.inputs import ContextInput
from star_attention.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A query and its answer, in the form in which the next query continues them.

    Attributes:
        answer: text of the answer, with the `answer_prefix` that it was made to begin with.
        messages: in a chat, the messages of the query, and the answer as the last one.
        text: after a text, query and answer as one text.
        ids: of token ids, those of query and answer.

    Of the last three, those of the conversation's other forms are None.
    """

    answer: str
    messages: list[Message] | None = None
    text: str | None = None
    ids: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Said:
    """An answer as a conversation goes on from it.

    Attributes:
        text: what the user saw of it, without special tokens in a chat.
        reasoning: the model's reasoning, None for none.
        token_ids: all its token ids.
    """

    text: str
    reasoning: str | None
    token_ids: list[int]


def said_messages(turns: Sequence[Turn]) -> list[Message]:
    """Return the messages of a chat's turns."""
    return [message for turn in turns for message in turn.messages or []]


def prompts_after(
    runtime: Runtime,
    context: ContextInput,
    turns: Sequence[Turn],
    queries: list[Any],
    settings: ResolvedSettings,
) -> list[list[int]]:
    """Return the checked token ids after a context, earlier turns included, for each query.

    They are those of the whole conversation: what its chat template writes, or its text as one.

    Raises:
        InvalidInputError: a query in another form than the turns before it.
        TokenError: an empty query.
    """
    if not turns:
        return inputs.query_prompts(runtime, context, queries, settings)
    return for_each(
        "query", queries, lambda query: _prompt_after(runtime, context, turns, query, settings)
    )


def _prompt_after(
    runtime: Runtime,
    context: ContextInput,
    turns: Sequence[Turn],
    query: Any,
    settings: ResolvedSettings,
) -> list[int]:
    turns, query = answer_replaced(turns, query)
    first, is_text = turns[0], isinstance(query, str)
    prefix, kwargs = settings.answer_prefix, settings.chat_template_kwargs
    earlier: list[Message] = []
    if first.messages is not None:
        _check_form("a chat", query is None or is_text or is_messages(query), "text or messages")
        earlier = said_messages(turns)
    elif query is None or len(query) == 0:
        raise TokenError("the query is empty; give at least 1 token")
    elif first.text is not None:
        _check_form("a text", is_text, "text")
        check_words(query, "query")
        query = "".join(turn.text or "" for turn in turns) + query
    else:
        _check_form("token ids", not (is_text or is_messages(query)), "token ids")
        ids = checked_ids(query, "query", runtime.handle.vocab_size).tolist()
        query = [*_said_ids(turns), *ids]
    return inputs.prompt_ids(
        runtime, context, query, prefix, template_kwargs=kwargs, earlier=earlier
    )


def _check_form(name: str, fits: bool, expected: str) -> None:
    if not fits:
        raise InvalidInputError(
            f"this conversation is {name}, so that its next query is {expected}; give that, or"
            " begin another conversation from the context"
        )


def _said_ids(turns: Sequence[Turn]) -> list[int]:
    return [token for turn in turns for token in turn.ids or []]


def answer_replaced(turns: Sequence[Turn], query: Any) -> tuple[Sequence[Turn], Any]:
    """Return turns and query, after a query of messages that begins with the answer before it.

    Clients that parse an answer give it back so, as a call of tools for instance.
    """
    if not (turns and is_messages(query) and len(query) > 1):
        return turns, query
    last = turns[-1]
    (first,) = normalized(query[:1])
    if last.messages is None or first["role"] != "assistant":
        return turns, query
    changed = replace(last, messages=[*last.messages[:-1], first])
    return [*turns[:-1], changed], query[1:]


def with_turn(
    context: ContextInput,
    turns: Sequence[Turn],
    query: Any,
    prompt: list[int],
    prefix: str,
    said: Said,
) -> tuple[Turn, ...]:
    """Return turns with another one.

    Args:
        context: the context.
        turns: those before.
        query: the query, as given.
        prompt: its token ids after the context, as `prompts_after` returned them.
        prefix: text that the answer was made to begin with.
        said: the answer.
    """
    turns, query = answer_replaced(turns, query)
    text = prefix + said.text
    is_text = query is None or isinstance(query, str)
    if context.chat is not None and (is_text or is_messages(query)):
        chat = ChatContext.from_dict(context.chat)
        more = query_messages(after_turns(chat, said_messages(turns)), query)
        turn = Turn(answer=text, messages=answered(more, text, said.reasoning))
    elif is_text:
        turn = Turn(answer=text, text=query + text)
    else:
        start = len(context.held_ids) + len(_said_ids(turns))
        turn = Turn(answer=text, ids=prompt[start:] + said.token_ids)
    return (*turns, turn)
