"""Cuts a prompt into a context and a query, both as token ids: the rules, the first first."""

from __future__ import annotations

from dataclasses import replace

from star_attention.engine import StarLLM
from star_attention.errors import InvalidInputError
from star_attention.hf.text import literal
from star_attention.hf.text.messages import Message, normalized
from star_attention.hf.text.rendered import RenderedText
from star_attention.hf.text.template import ChatTemplate, check_written
from star_attention.serve import continuing, cut
from star_attention.serve.contexts.entry import Content
from star_attention.serve.contexts.keys import Scope, as_ids
from star_attention.serve.contexts.store import ContextStore
from star_attention.serve.http.fields import Ask
from star_attention.serve.reading import (
    Known,
    Piece,
    checked,
    cut_text,
    going_on,
    raw_content,
    raw_ids,
    reader_of,
    unread,
)
from star_attention.serve.settings import ServeSettings

_LONGEST_QUERY = 4096
"""Tokens that may follow a kept context for which nobody asked: a query is read in one piece."""
_LAST_TOKENS = 512
"""Tokens at the end of a prompt that has no better place for a cut."""


class Cutter:
    """Cuts prompts that name no context.

    Args:
        store: the contexts and conversations that a prompt may begin with.
        settings: the server's.

    Attributes:
        endings: what chat templates write after a user's last word.
    """

    def __init__(self, store: ContextStore, settings: ServeSettings) -> None:
        self._store, self._settings = store, settings
        self.endings = continuing.Endings()

    def chat(self, star: StarLLM, scope: Scope, marked: cut.MarkedChat, ask: Ask) -> Piece:
        """Cut a chat.

        Raises:
            InvalidInputError: messages that cannot be read.
        """
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
        piece = self._cut_chat(star, scope, text, messages, boundaries, ask)
        unsaid, unsaid_tokens = self.endings.of(star, ask.template_kwargs)
        said = text.text.removesuffix(unsaid)
        return replace(piece, text=said, unsaid_tokens=unsaid_tokens)

    def _cut_chat(
        self,
        star: StarLLM,
        scope: Scope,
        text: RenderedText,
        messages: list[Message],
        boundaries: list[cut.Boundary],
        ask: Ask,
    ) -> Piece:
        ends = cut.ends_of_parts(text.text, messages)
        named = cut.named_cut(ends, boundaries, messages)
        if named is not None:
            at, boundary = named
            if ask.tools is not None:
                at = cut.after_tools(text.text, ends, messages, boundary)
            known = self._known(scope)
            return cut_text(star, text, at, boundary.rule, ttl=boundary.ttl, known=known)
        at = cut.likely_cut(text.text, ends, messages) or 0
        begun = self._begun(star, scope, text) if self._is_implicit(ask) else None
        if begun is not None and begun.rule == continuing.RULE:
            return begun
        if begun is not None and begun.content is not None and begun.content.text is not None:
            is_short = len(begun.query_ids) <= _LONGEST_QUERY
            if is_short or at <= len(begun.content.text):
                return begun
        at, rule = self._learned(scope, text, at, ask, raw=False)
        piece = cut_text(star, text, at, rule, known=self._known(scope))
        ids = piece.query_ids
        if piece.content is None and len(ids) > _LONGEST_QUERY:
            # As a query, so much would be read in one piece. Nobody can find it again.
            content = Content(ids=as_ids(ids[:-_LAST_TOKENS]))
            return Piece(content=content, query_ids=ids[-_LAST_TOKENS:], rule="none", keep=False)
        return self._long_enough(piece, ask)

    def _begun(
        self, star: StarLLM, scope: Scope, text: RenderedText, *, raw: bool = False
    ) -> Piece | None:
        """Return the cut where a conversation was, or after a kept context; None for neither.

        The one that makes more tokens known.
        """
        store = self._store
        kept = store.prefix_of(scope, unread(text, raw=raw))
        continued = continuing.of_text(
            star, store.talks, scope, text, raw=raw, most_new=_LONGEST_QUERY
        )
        if continued is not None and (kept is None or len(kept) <= continued.tokens):
            return continued.piece
        if kept is None or kept.text is None:
            return None
        query_ids = going_on(star, kept, text)
        if query_ids is None:
            return None
        return Piece(content=kept, query_ids=query_ids, rule="prefix")

    def _learned(
        self, scope: Scope, text: RenderedText, at: int, ask: Ask, *, raw: bool
    ) -> tuple[int, str]:
        """Return where a text is cut that begins with no kept context, and by which rule."""
        if at and self._is_implicit(ask):
            shared = self._store.shared_text(scope, unread(text, raw=raw))
            learned = cut.learned_cut(text.text, shared, at)
            if learned is not None:
                return learned, "learned"
        return at, "implicit"

    def _known(self, scope: Scope) -> Known:
        return lambda head: self._store.of_text(scope, unread(head))

    def text(self, star: StarLLM, scope: Scope, prompt: str | list[int], ask: Ask) -> Piece:
        """Cut a text, or token ids.

        Raises:
            InvalidInputError: ids outside the vocabulary, or no tokens.
        """
        piece = self._cut_text(star, scope, prompt, ask)
        return replace(piece, text=prompt, raw=True) if isinstance(prompt, str) else piece

    def _cut_text(self, star: StarLLM, scope: Scope, prompt: str | list[int], ask: Ask) -> Piece:
        head, rule, store = 0, "implicit", self._store
        if isinstance(prompt, str):
            text = reader_of(star).raw(prompt, "prompt")
            begun = self._begun(star, scope, text, raw=True) if self._is_implicit(ask) else None
            if begun is not None and len(begun.query_ids) <= _LONGEST_QUERY:
                return begun
            ids, head = raw_ids(star, prompt), cut.line_break(prompt)
            head, rule = self._learned(scope, text, head, ask, raw=True)
        else:
            ids = checked(star, prompt)
        if self._is_implicit(ask):
            kept = store.prefix_of(scope, Content(ids=as_ids(ids)))
            continued = continuing.of_ids(store.talks, scope, ids, most_new=_LONGEST_QUERY)
            if continued is not None and (kept is None or len(kept) <= continued.tokens):
                return continued.piece
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
        piece = Piece(content=content, query_ids=ids[tokens:], rule=rule)
        return self._long_enough(piece, ask)

    def _is_implicit(self, ask: Ask) -> bool:
        return self._settings.implicit and not ask.explicit

    def _long_enough(self, piece: Piece, ask: Ask) -> Piece:
        """Return what nobody named: kept if it may be, or else for this request alone.

        A short one is not a context.
        """
        content, least = piece.content, self._settings.min_context_tokens
        if content is None or len(content) < max(least, 1):
            before = [] if content is None else content.ids.tolist()
            return Piece(content=None, query_ids=before + piece.query_ids, rule="none")
        if self._is_implicit(ask):
            return piece
        return Piece(content=content, query_ids=piece.query_ids, rule="none", keep=False)
