"""Conversations: what was said after a context, and its keys and values for the next turn."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from star_attention.errors import InvalidInputError
from star_attention.generation.settings import ResolvedSettings
from star_attention.generation.turns import Said, Turn, said_messages, with_turn
from star_attention.hf.text.answer import AnswerText
from star_attention.hf.text.conversation import ChatContext, joined
from star_attention.hf.text.messages import Message
from star_attention.inputs import ContextInput
from star_attention.phase2 import Leader
from star_attention.planning.sizes import counted
from star_attention.storage import talks
from star_attention.storage.context import EncodedContext
from star_attention.storage.kept import KeptTail
from star_attention.storage.kv import Pair
from star_attention.storage.transient import Transient

Ask = Callable[["Conversation", Any, dict[str, Any]], Any]
"""Answers a query after a conversation, with keywords of `generate`."""


@dataclass(kw_only=True, eq=False)
class Conversation(Transient):
    """A context with the turns that followed it; `generate` and `stream` take it like a context.

    Answers generated with `keep=True` have one. It never changes, so that it can be continued
    any number of times, in different directions. It keeps the keys and values of all queries and
    answers in memory, `nbytes` of them, so that the next turn computes only what is new. The
    memory is free when the conversation is dropped, or after `forget`.

    Attributes:
        context: the context.
        turns: queries with their answers.
    """

    context: EncodedContext
    turns: tuple[Turn, ...]
    _ids: list[int] = field(repr=False)
    _ask: Ask = field(repr=False)
    _tail: KeptTail | None = field(default=None, repr=False)

    _instead_of_pickling = (
        "write it with conversation.save(path), and read it there with star.load_conversation(path)"
    )
    _instead_of_deepcopy = "share it, since nothing changes it"

    def __repr__(self) -> str:
        """Return e.g. `Conversation(2 turns on 4,096 tokens, 57 tokens kept)`."""
        turns = counted(len(self.turns), "turn")
        on = f"{turns} on {len(self.context):,} tokens"
        return f"Conversation({on}, {counted(self.kept_tokens, 'token')} kept)"

    @property
    def messages(self) -> list[Message] | None:
        """The whole chat as messages, those of the context included; None outside of chats."""
        if self.context.chat is None or any(turn.messages is None for turn in self.turns):
            return None
        chat = ChatContext.from_dict(self.context.chat)
        said = said_messages(self.turns)
        return joined(chat, said) if said else list(chat.messages)

    @property
    def kept_tokens(self) -> int:
        """Tokens after the context whose keys and values are kept."""
        return 0 if self._tail is None else len(self._ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the kept keys and values on this rank."""
        return 0 if self._tail is None else self._tail.nbytes

    def undo(self, turns: int = 1) -> Conversation:
        """Return the conversation without its last turns; this one stays as it is.

        Raises:
            InvalidInputError: it has fewer turns.
        """
        most = len(self.turns)
        if isinstance(turns, bool) or not isinstance(turns, int) or not 0 <= turns <= most:
            raise InvalidInputError(
                f"turns {turns} cannot be undone: the conversation has {most}; give 0..{most}"
            )
        return replace(self, turns=self.turns[: most - turns])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the conversation, to be loaded by `StarLLM.load_conversation`.

        The file holds the turns with their keys and values, and the context: as a reference to its
        file if it was loaded from one, otherwise all of it, so that `load_context` loads it from
        there, too. On several ranks the context is always in it, and keys and values of the turns
        are not: they are computed again. The file contains the text and all turns: protect it like
        them.

        Args:
            path: the file, or on several ranks the folder. An earlier conversation there is
                replaced, a saved context is not.

        Raises:
            ContextSaveError: the conversation cannot be written.
        """
        context = self.context
        layers = None if self._tail is None or context.comm.size > 1 else self._tail.layers
        values = {"turns": [asdict(turn) for turn in self.turns], "ids": self._ids}
        talks.write(path, context, values, layers)

    def forget(self) -> None:
        """Free the keys and values. The next turn computes them again, where it needs them."""
        self._tail = None


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A conversation as rank 0 sends it: `key` names the tails of all ranks, 0 for none."""

    turns: tuple[Turn, ...]
    ids: list[int]
    key: int


def answer_to(conversation: Conversation, query: Any, options: dict[str, Any]) -> Any:
    """Return the answer to the next query, with keywords of `generate`."""
    return conversation._ask(conversation, query, options)


def said_tokens(conversation: Conversation, prompt: list[int]) -> int:
    """Count the first tokens of a prompt that are those of earlier turns, all but one."""
    return _shared_tokens(conversation, prompt) if conversation.turns else 0


def reusable(conversation: Conversation, prompt: list[int]) -> tuple[KeptTail | None, int]:
    """Return what is kept, and for how many of the first tokens of a prompt it holds."""
    tail, tokens = conversation._tail, _shared_tokens(conversation, prompt)
    return (tail, tokens) if tail is not None and tokens else (None, 0)


def _shared_tokens(conversation: Conversation, prompt: list[int]) -> int:
    pairs = zip(conversation._ids, prompt[:-1], strict=False)
    most = min(len(conversation._ids), len(prompt) - 1)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), most)


@dataclass(frozen=True, kw_only=True)
class KeptTokens:
    """What a conversation keeps, without its context: it holds after any context equal to that.

    Attributes:
        ids: token ids after the context.
        tail: their keys and values.
    """

    ids: list[int]
    tail: KeptTail

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values on this rank."""
        return self.tail.nbytes


def kept_by(conversation: Conversation | None) -> KeptTokens | None:
    """Return what a conversation keeps; None for nothing."""
    if conversation is None or conversation._tail is None:
        return None
    return KeptTokens(ids=conversation._ids, tail=conversation._tail)


def beginning_with(conversation: Conversation, kept: KeptTokens) -> Conversation:
    """Return a conversation without turns, after which a query may begin with kept tokens."""
    return replace(conversation, turns=(), _ids=kept.ids, _tail=kept.tail)


def sent(conversation: Conversation) -> Sent:
    """Return what the other ranks need to have this conversation, too."""
    tail = conversation._tail
    key = 0 if tail is None else tail.key
    return Sent(turns=conversation.turns, ids=conversation._ids, key=key)


@dataclass(frozen=True, kw_only=True)
class Keeper:
    """Makes the conversations of one call's answers.

    Attributes:
        context: the context on this rank.
        ask: answers their next queries.
    """

    context: EncodedContext
    ask: Ask

    def conversation(
        self,
        turns: tuple[Turn, ...],
        ids: list[int],
        layers: list[Pair | None] | None,
        key: int | None = None,
    ) -> Conversation:
        """Return a conversation.

        Args:
            turns: its turns.
            ids: token ids after the context whose keys and values are known.
            layers: these keys and values, on this rank; None to keep none.
            key: names them to the other ranks; None for a new name.
        """
        tail = None
        if layers is not None:
            tail = KeptTail(layers)
            comm = self.context.comm
            if comm.size > 1:
                tail.key = comm.contexts.add(tail, key)
        return Conversation(context=self.context, turns=turns, _ids=ids, _ask=self.ask, _tail=tail)


@dataclass(frozen=True, kw_only=True)
class LeadingKeeper(Keeper):
    """Makes them on rank 0, which knows what was asked.

    Attributes:
        tokenizer: the model's, or None.
        settings: settings of the answers.
        turns: turns before the queries.
        queries: the queries, as given.
    """

    tokenizer: Any
    settings: ResolvedSettings
    turns: tuple[Turn, ...]
    queries: list[Any]

    @classmethod
    def of(
        cls,
        talk: Conversation,
        queries: list[Any],
        settings: ResolvedSettings,
        tokenizer: Any,
        ask: Ask,
    ) -> LeadingKeeper | None:
        """Return what keeps the answers to queries after a conversation; None to keep none."""
        if not settings.arguments.keep:
            return None
        return cls(
            context=talk.context,
            ask=ask,
            tokenizer=tokenizer,
            settings=settings,
            turns=talk.turns,
            queries=queries,
        )

    def after_answer(
        self, row: int, prompt: list[int], answer: AnswerText, leader: Leader | None
    ) -> Conversation:
        """Return the conversation after an answer.

        Args:
            row: number of the answer in its call.
            prompt: token ids of the query, earlier turns included.
            answer: the answer.
            leader: the steps of the call, whose keys and values are kept; None where transformers'
                loops ran. A second look's are not: its choice is for one query.
        """
        ids, layers = prompt, None
        if leader is not None and answer.token_ids and leader.request.looked is None:
            ids = prompt + answer.token_ids[: leader.forwarded_tokens]
            layers = leader.kept_row(row, len(ids))
        return self.after(row, prompt, answer, ids, layers)

    def after(
        self,
        row: int,
        prompt: list[int],
        answer: AnswerText,
        ids: list[int],
        layers: list[Pair | None] | None,
    ) -> Conversation:
        """Return the conversation after an answer, with keys and values of some token ids."""
        context = ContextInput.of(self.context)
        said = self._said(prompt, answer, is_chat=context.chat is not None)
        query = self.queries[row // self.settings.answers_per_query]
        turns = with_turn(context, self.turns, query, prompt, self.settings.answer_prefix, said)
        return self.conversation(turns, ids, layers)

    def _said(self, prompt: list[int], answer: AnswerText, *, is_chat: bool) -> Said:
        text, reasoning = answer.text, answer.reasoning
        if is_chat and not self.settings.arguments.skip_special_tokens:
            # The template writes the turn's end, and decides about reasoning.
            settings = replace(self.settings.text, skip_special_tokens=True)
            (reread,) = settings.answers(settings.reading(self.tokenizer), [prompt])
            for token in answer.token_ids:
                if reread.finish_reason is None:
                    reread.push(token)
            reread.end("length")
            text, reasoning = reread.text, reread.reasoning
        return Said(text=text, reasoning=reasoning, token_ids=answer.token_ids)
