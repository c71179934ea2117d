"""What a request asks: its prompt as token ids, cut into a context and a query."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from star_attention.engine import StarLLM
from star_attention.errors import InvalidInputError
from star_attention.hf.text import literal
from star_attention.hf.text.messages import normalized
from star_attention.hf.text.rendered import RenderedText
from star_attention.hf.text.template import ChatTemplate, check_written
from star_attention.serve import cut
from star_attention.serve.contexts.entry import Content, Wanted
from star_attention.serve.contexts.keys import Scope, as_ids
from star_attention.serve.contexts.lease import Lease
from star_attention.serve.http.fields import Ask
from star_attention.serve.http.uploads import text_of
from star_attention.serve.reading import (
    Known,
    Piece,
    Source,
    after,
    checked,
    cut_text,
    document,
    going_on,
    on_context,
    raw_content,
    raw_ids,
    reader_of,
    unread,
)
from star_attention.serve.service import Service

_LONGEST_QUERY = 4096
"""Tokens that may follow a kept context for which nobody asked: a query is read in one piece."""
_LAST_TOKENS = 512
"""Tokens at the end of a prompt that has no better place for a cut."""


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

    @property
    def is_kept(self) -> bool:
        """True if the context outlives the request."""
        return self.context_id is not None or (self.wanted is not None and self.wanted.keep)

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

    def content(self, plan: Plan) -> Content | None:
        """Return what the kept context of a plan is made of; None if nothing is kept."""
        if plan.context_id is not None:
            return self._service.store.content(plan.tenant, plan.context_id)
        return plan.wanted.content if plan.wanted is not None and plan.is_kept else None

    def cached_tokens(self, plan: Plan) -> int:
        """Return the tokens of a plan's context that are kept already."""
        if plan.context_id is not None:
            return plan.context_tokens
        if plan.wanted is None:
            return 0
        scope, content = plan.wanted.scope, plan.wanted.content
        # Its own context is the longest one that a longer prompt begins with.
        ids = as_ids([*content.ids.tolist(), *plan.query_ids])
        kept = self._service.store.prefix_of(scope, Content(ids=ids))
        return plan.context_tokens if kept and len(kept) == len(content) else 0

    # ------------------------------------------------------------------------------ requests

    async def of_chat(self, tenant: str, messages: list[Any], ask: Ask) -> Plan:
        """Return the plan of a chat.

        Raises:
            InvalidInputError: messages that cannot be read.
        """
        named = None if ask.context is None else self._service.store.content(tenant, ask.context)
        marked = cut.unmarked(messages, lambda part: self._file_text(tenant, part))
        scope = Scope(tenant=tenant, salt=ask.salt)

        def read(star: StarLLM) -> Piece:
            if named is not None:
                return on_context(star, named, marked.messages, ask.template_kwargs)
            return self._read_chat(star, scope, marked, ask)

        piece = await self._service.lanes.run(marked.characters, read)
        return self._plan(piece, scope, ask, is_chat=True)

    async def of_text(self, tenant: str, prompt: str | list[int], ask: Ask) -> Plan:
        """Return the plan of a text or of token ids.

        Raises:
            InvalidInputError: ids outside the vocabulary, or no tokens.
        """
        named = None if ask.context is None else self._service.store.content(tenant, ask.context)
        scope = Scope(tenant=tenant, salt=ask.salt)

        def read(star: StarLLM) -> Piece:
            if named is not None:
                return Piece(content=named, query_ids=after(star, named, prompt), rule="context")
            return self._read_text(star, scope, prompt, ask)

        piece = await self._service.lanes.run(len(prompt), read)
        return self._plan(piece, scope, ask, is_chat=False)

    async def of_document(
        self, tenant: str, salt: str, source: Source, ttl: float | None
    ) -> Wanted:
        """Return the context that a document makes.

        Raises:
            InvalidInputError: it cannot be read.
        """
        size = len(source.text or source.token_ids or str(source.messages))
        content = await self._service.lanes.run(size, lambda star: document(star, source))
        self._service.star.runtime.positions.check(
            len(content), "the context has", "cut the document"
        )
        return Wanted(scope=Scope(tenant=tenant, salt=salt), content=content, ttl=ttl)

    # -------------------------------------------------------------------------------- cutting

    def _read_chat(self, star: StarLLM, scope: Scope, marked: cut.MarkedChat, ask: Ask) -> Piece:
        template = ChatTemplate(star.tokenizer, ask.template_kwargs)
        source = str(getattr(star.tokenizer, "chat_template", ""))
        messages = cut.for_template(normalized(marked.messages), source)
        boundaries = marked.boundaries
        try:
            text = literal.render(template, messages)
        except InvalidInputError:
            merged = cut.instructions_first(messages)
            if merged == messages:
                raise
            # Places of marks have moved with the messages.
            messages, boundaries = merged, []
            text = literal.render(template, messages)
        check_written(text.text, messages)
        text = reader_of(star).rendered(text)
        ends = cut.ends_of_parts(text.text, messages)
        named = cut.named_cut(ends, boundaries)
        if named is not None:
            at, boundary = named
            known = self._known(scope)
            return cut_text(star, text, at, boundary.rule, ttl=boundary.ttl, known=known)
        at = cut.likely_cut(text.text, ends, messages) or 0
        begun = self._begun(star, scope, text) if self._is_implicit(ask) else None
        if begun is not None and begun.content is not None and begun.content.text is not None:
            is_short = len(begun.query_ids) <= _LONGEST_QUERY
            if is_short or at <= len(begun.content.text):
                return begun
        piece = cut_text(star, text, at, "implicit", known=self._known(scope))
        ids = piece.query_ids
        if piece.content is None and len(ids) > _LONGEST_QUERY:
            # As a query, so much would be read in one piece. Nobody can find it again.
            content = Content(ids=as_ids(ids[:-_LAST_TOKENS]))
            return Piece(content=content, query_ids=ids[-_LAST_TOKENS:], rule="none", keep=False)
        return self._long_enough(piece, ask)

    def _begun(
        self, star: StarLLM, scope: Scope, text: RenderedText, *, raw: bool = False
    ) -> Piece | None:
        """Return the cut after the longest kept context that a text begins with."""
        kept = self._service.store.prefix_of(scope, unread(text, raw=raw))
        if kept is None or kept.text is None:
            return None
        query_ids = going_on(star, kept, text)
        if query_ids is None:
            return None
        return Piece(content=kept, query_ids=query_ids, rule="prefix")

    def _known(self, scope: Scope) -> Known:
        return lambda head: self._service.store.of_text(scope, unread(head))

    def _read_text(self, star: StarLLM, scope: Scope, prompt: str | list[int], ask: Ask) -> Piece:
        head = 0
        if isinstance(prompt, str):
            text = reader_of(star).raw(prompt, "prompt")
            begun = self._begun(star, scope, text, raw=True) if self._is_implicit(ask) else None
            if begun is not None and len(begun.query_ids) <= _LONGEST_QUERY:
                return begun
            ids, head = raw_ids(star, prompt), cut.line_break(prompt)
        else:
            ids = checked(star, prompt)
        if self._is_implicit(ask):
            kept = self._service.store.prefix_of(scope, Content(ids=as_ids(ids)))
            if kept is not None and len(ids) - len(kept) <= _LONGEST_QUERY:
                return Piece(content=kept, query_ids=ids[len(kept) :], rule="prefix")
        content = None
        if isinstance(prompt, str) and head:
            own = raw_content(star, prompt[:head])
            if own.ids.tolist() == ids[: len(own)] and len(own) < len(ids):
                content = own
        elif len(ids) > _LAST_TOKENS:
            # The question is somewhere at the end.
            content = Content(ids=as_ids(ids[:-_LAST_TOKENS]))
        tokens = 0 if content is None else len(content)
        piece = Piece(content=content, query_ids=ids[tokens:], rule="implicit")
        return self._long_enough(piece, ask)

    def _is_implicit(self, ask: Ask) -> bool:
        return self._service.settings.implicit and not ask.explicit

    def _long_enough(self, piece: Piece, ask: Ask) -> Piece:
        """Return what nobody named: kept if it may be, or else for this request alone.

        A short one is no context at all.
        """
        content, least = piece.content, self._service.settings.min_context_tokens
        if content is None or len(content) < max(least, 1):
            before = [] if content is None else content.ids.tolist()
            return Piece(content=None, query_ids=before + piece.query_ids, rule="none")
        if self._is_implicit(ask):
            return piece
        return Piece(content=content, query_ids=piece.query_ids, rule="none", keep=False)

    def _plan(self, piece: Piece, scope: Scope, ask: Ask, *, is_chat: bool) -> Plan:
        content, ids = piece.content, piece.query_ids
        shared: dict[str, Any] = dict(
            tenant=scope.tenant,
            rule=piece.rule,
            is_chat=is_chat,
            param=ask.name("messages" if is_chat else "prompt"),
        )
        if content is None:
            if len(ids) < 2:
                # A context and a query need a token each; the second one is answered from both.
                raise InvalidInputError(f"the prompt has {len(ids)} tokens; give at least 2")
            return Plan(first_ids=(ids[0],), context_tokens=1, query_ids=ids[1:], **shared)
        if piece.rule == "context":
            return Plan(
                context_id=ask.context, context_tokens=len(content), query_ids=ids, **shared
            )
        wanted = Wanted(scope=scope, content=content, keep=piece.keep, ttl=piece.ttl)
        return Plan(wanted=wanted, context_tokens=len(content), query_ids=ids, **shared)

    def _file_text(self, tenant: str, part: dict[str, Any]) -> str:
        """Return the text of a message's file: one that was uploaded, or in the message itself."""
        file = part.get("file")
        file = file if isinstance(file, dict) else {}
        text = file.get("text")
        if isinstance(text, str):
            return text
        if isinstance(file.get("file_id"), str):
            return self._service.files.get(tenant, file["file_id"]).text
        data = file.get("file_data")
        if not isinstance(data, str):
            raise InvalidInputError(
                "a part of type file has neither file_id nor file_data nor text; give one of them"
            )
        try:
            content = base64.b64decode(data.rpartition(",")[2], validate=True)
        except (binascii.Error, ValueError):
            raise InvalidInputError(
                "file_data is not base64; give a data URL such as data:text/plain;base64,..."
            ) from None
        return text_of(content, str(file.get("filename") or "file")[:255])
