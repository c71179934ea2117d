"""What a request asks: its prompt as token ids, cut into a context and a query."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from star_attention.engine import StarLLM
from star_attention.errors import InvalidInputError
from star_attention.generation.conversation import KeptTokens
from star_attention.serve import cut
from star_attention.serve.contexts.entry import Content, Wanted
from star_attention.serve.contexts.keys import Scope, as_ids
from star_attention.serve.contexts.lease import Lease
from star_attention.serve.contexts.talks import Prompt, Talk
from star_attention.serve.cutter import Cutter
from star_attention.serve.http.fields import Ask
from star_attention.serve.http.problems import about
from star_attention.serve.lanes import LONG_CHARACTERS, MESSAGE_CHARACTERS
from star_attention.serve.reading import Piece, Source, after, document, on_context
from star_attention.serve.refusals import RefusalError
from star_attention.serve.service import Service
from star_attention.serve.values import characters_in


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A prompt, cut in two.

    Attributes:
        tenant: whose it is.
        rule: what decided the cut; "none" for a prompt that is a query as a whole.
        wanted: its context; None for one that is named by its id, or none at all.
        context_id: the context's id, if it is named.
        first_ids: the first token, where the rest is the query.
        context_tokens: tokens of the context.
        query_ids: token ids after it.
        is_chat: True if the end of a turn ends the answer.
        param: the field that the prompt came in.
        prompt: the prompt as later ones go on with it; None to keep nothing of its answer.
        talk: the conversation that it goes on with; None for none.
        kept_tokens: its first query tokens that the conversation has kept.
        documents: the files of a chat.
    """

    tenant: str
    rule: str
    wanted: Wanted | None = None
    context_id: str | None = None
    first_ids: tuple[int, ...] = ()
    context_tokens: int
    query_ids: list[int]
    is_chat: bool
    param: str
    prompt: Prompt | None = None
    talk: Talk | None = None
    kept_tokens: int = 0
    documents: tuple[cut.Document, ...] = ()

    @property
    def is_kept(self) -> bool:
        """True if the context outlives the request."""
        return self.context_id is not None or (self.wanted is not None and self.wanted.keep)

    @property
    def said_tokens(self) -> int:
        """Tokens that a conversation has kept, beside those of a kept context."""
        return self.kept_tokens + len(self.first_ids) if self.kept_tokens else 0

    @property
    def prompt_tokens(self) -> int:
        return self.context_tokens + len(self.query_ids)


class Prompts:
    """Reads the prompts of requests.

    Args:
        service: the server's state.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._cutter = Cutter(service.store, service.settings)

    def open(self, plan: Plan) -> Lease | None:
        """Return a hold on a plan's context; None if it is a first token alone."""
        store = self._service.store
        lease: Lease | None = None
        if plan.context_id is not None:
            lease = store.lease(plan.tenant, plan.context_id)
        elif plan.wanted is not None:
            lease = store.acquire(plan.wanted)
        return lease

    def reopening(self, plan: Plan) -> Callable[[], Lease] | None:
        """Return what opens a plan's context again; None for one that the client has named."""
        wanted = plan.wanted
        return None if wanted is None else lambda: self._service.store.acquire(wanted)

    def conversation(
        self, plan: Plan
    ) -> tuple[KeptTokens | None, Callable[[KeptTokens], None] | None]:
        """Return what is kept of a plan's query, and what takes what its answer keeps."""
        talks, prompt, talk = self._service.store.talks, plan.prompt, plan.talk
        if talk is not None:
            talks.use(talk)
        begun = None if talk is None else talk.kept
        if prompt is None:
            return begun, None
        first = prompt if talk is None else talk.first
        return begun, lambda kept: talks.add(prompt, first, kept)

    def content(self, plan: Plan) -> Content | None:
        """Return what the kept context of a plan is made of; None if nothing is kept."""
        if plan.context_id is not None:
            return self._service.store.content(plan.tenant, plan.context_id)
        return plan.wanted.content if plan.wanted is not None and plan.is_kept else None

    def cached_tokens(self, plan: Plan) -> int:
        """Return the tokens of a plan's prompt that are kept already."""
        return self._cached_context(plan) + plan.said_tokens

    def _cached_context(self, plan: Plan) -> int:
        if plan.context_id is not None:
            return plan.context_tokens
        if plan.wanted is None:
            return 0
        scope, content = plan.wanted.scope, plan.wanted.content
        # Its own context is the longest one that a longer prompt begins with.
        ids = np.concatenate([content.ids, as_ids(plan.query_ids)])
        kept = self._service.store.prefix_of(scope, Content(ids=ids))
        return plan.context_tokens if kept and len(kept) == len(content) else 0

    # ------------------------------------------------------------------------------ requests

    async def of_chat(self, tenant: str, messages: list[Any], ask: Ask) -> Plan:
        """Return the plan of a chat.

        Raises:
            Problem: messages that cannot be read.
        """
        with about(ask.name("messages")):
            return await self._of_chat(tenant, messages, ask)

    async def _of_chat(self, tenant: str, messages: list[Any], ask: Ask) -> Plan:
        named = self._named(tenant, ask)
        marked = await self._unmarked(tenant, messages)
        scope, chats = Scope(tenant=tenant, salt=ask.salt), self._service.chats

        def read(star: StarLLM) -> Piece:
            if named is None:
                return self._cutter.chat(star, scope, marked, ask)
            piece = on_context(chats, star, named, marked.messages, ask.template_kwargs)
            _, unsaid_tokens = self._cutter.endings.of(star, ask.template_kwargs)
            return replace(piece, unsaid_tokens=unsaid_tokens)

        kept = 0 if named is None else len(named.text or "")
        # With tools or other arguments a template may write something else altogether.
        kind = "chat", named is None, bool(ask.template_kwargs)
        # Schemas of tools are as long as texts.
        size = _size(marked.messages, ask.template_kwargs)
        piece = await self._service.lanes.run(size, read, kept=kept, kind=kind)
        plan = self._plan(piece, scope, ask, is_chat=True)
        return replace(plan, documents=tuple(marked.documents))

    async def of_text(self, tenant: str, prompt: str | list[int], ask: Ask) -> Plan:
        """Return the plan of a text or of token ids.

        Raises:
            Problem: ids outside the vocabulary, or no tokens.
        """
        with about(ask.name("prompt")):
            return await self._of_text(tenant, prompt, ask)

    async def _of_text(self, tenant: str, prompt: str | list[int], ask: Ask) -> Plan:
        named = self._named(tenant, ask)
        scope = Scope(tenant=tenant, salt=ask.salt)

        def read(star: StarLLM) -> Piece:
            if named is not None:
                return Piece(content=named, query_ids=after(star, named, prompt), rule="context")
            return self._cutter.text(star, scope, prompt, ask)

        piece = await self._service.lanes.run(len(prompt), read, kind="text")
        return self._plan(piece, scope, ask, is_chat=False)

    async def of_document(
        self, tenant: str, salt: str, source: Source, ttl: float | None
    ) -> Wanted:
        """Return the context that a document makes.

        Raises:
            InvalidInputError: it cannot be read.
        """
        size = len(source.text or source.token_ids or ())
        size += _size(source.messages or [], source.template_kwargs)
        # All of a chat that goes on is rendered again.
        kept = 0 if source.after is None else len(source.after.text or source.after)
        chats = self._service.chats
        content = await self._service.lanes.run(
            size, lambda star: document(chats, star, source), kept=kept, kind="document"
        )
        self._service.star.runtime.positions.check(
            len(content), "the context has", "cut the document"
        )
        return Wanted(scope=Scope(tenant=tenant, salt=salt), content=content, ttl=ttl)

    def _plan(self, piece: Piece, scope: Scope, ask: Ask, *, is_chat: bool) -> Plan:
        content, ids = piece.content, piece.query_ids
        shared: dict[str, Any] = dict(
            tenant=scope.tenant,
            rule=piece.rule,
            is_chat=is_chat,
            param=ask.name("messages" if is_chat else "prompt"),
            **self._continued(piece, scope, ask),
        )
        if content is None:
            if len(ids) < 2:
                # A context and a query need a token each; the second one is answered from both.
                raise InvalidInputError(f"prompt: expected at least 2 tokens, got {len(ids)}")
            return Plan(first_ids=(ids[0],), context_tokens=1, query_ids=ids[1:], **shared)
        if piece.rule == "context":
            return Plan(
                context_id=ask.context, context_tokens=len(content), query_ids=ids, **shared
            )
        wanted = Wanted(scope=scope, content=content, keep=piece.keep, ttl=piece.ttl)
        return Plan(wanted=wanted, context_tokens=len(content), query_ids=ids, **shared)

    def _continued(self, piece: Piece, scope: Scope, ask: Ask) -> dict[str, Any]:
        """Return the fields of a plan about its conversation."""
        talks, content, ids = self._service.store.talks, piece.content, piece.query_ids
        if not talks.is_on or ask.explicit or not piece.keep:
            return {}
        if content is None:
            content, ids = Content(ids=as_ids(ids[:1])), ids[1:]
        text = None if piece.text is None else piece.text[len(content.text or "") :]
        prompt = Prompt(
            scope=scope,
            content=content,
            ids=ids,
            text=text,
            raw=piece.raw,
            unsaid_tokens=piece.unsaid_tokens,
        )
        talk, kept_tokens = talks.after(prompt)
        # Of several answers nobody knows which is gone on with.
        own = prompt if ask.answers == 1 else None
        return {"prompt": own, "talk": talk, "kept_tokens": kept_tokens}

    def _named(self, tenant: str, ask: Ask) -> Content | None:
        """Return what the context is made of that a request names; None where it names none.

        Raises:
            RefusalError: there is none.
        """
        if ask.context is None:
            return None
        try:
            return self._service.store.content(tenant, ask.context)
        except RefusalError as error:
            error.param = "context"
            raise

    async def _unmarked(self, tenant: str, messages: list[Any]) -> cut.MarkedChat:
        """Return messages without marks and files, which are read beside the event loop."""
        sent = {id(file): await self._sent(tenant, file) for file in cut.sent_files(messages)}

        def read() -> cut.MarkedChat:
            return cut.unmarked(messages, lambda part: self._file(tenant, part, sent))

        is_long = characters_in(messages, most=LONG_CHARACTERS) >= LONG_CHARACTERS
        return await asyncio.to_thread(read) if is_long else read()

    async def _sent(self, tenant: str, file: dict[str, Any]) -> cut.Document:
        """Return a file that is in a message itself, in base64."""
        name = _name_of(file)
        data = await asyncio.to_thread(_decoded, file["file_data"])
        text = await self._service.documents.text_of(data, name or "file", tenant)
        return cut.Document(text=text, name=name)

    def _file(
        self, tenant: str, part: dict[str, Any], sent: dict[int, cut.Document]
    ) -> cut.Document:
        """Return a message's file: one that was uploaded, or in the message itself."""
        file = part.get("file")
        file = file if isinstance(file, dict) else {}
        if id(file) in sent:
            return sent[id(file)]
        if isinstance(file.get("text"), str):
            return cut.Document(text=file["text"], name=_name_of(file))
        if isinstance(file.get("file_id"), str):
            kept = self._service.files.get(tenant, file["file_id"])
            return cut.Document(text=kept.text, name=kept.name, file_id=kept.id)
        raise InvalidInputError(
            "a part of type file has neither file_id nor file_data nor text; give one of them"
        )


def _name_of(file: dict[str, Any]) -> str | None:
    name = file.get("filename")
    return name[:255] if isinstance(name, str) else None


def _decoded(data: str) -> bytes:
    """Return the bytes of a data URL, or of base64 alone."""
    try:
        return base64.b64decode(data.rpartition(",")[2], validate=True)
    except (binascii.Error, ValueError):
        raise InvalidInputError(
            "file_data is not base64; give a data URL such as data:text/plain;base64,..."
        ) from None


def _size(messages: list[Any], template_kwargs: dict[str, Any]) -> int:
    """Return the characters that a chat template has work with, as far as that matters."""
    characters = characters_in(messages, template_kwargs, most=LONG_CHARACTERS)
    return characters + MESSAGE_CHARACTERS * len(messages)
