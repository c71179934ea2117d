"""Texts become token ids by the settings of an engine."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from star_attention.errors import quote
from star_attention.hf.text import joining, special
from star_attention.hf.text.checks import checked_text
from star_attention.hf.text.joining import ContextEnd
from star_attention.hf.text.rendered import RenderedText

_NAMED_TOKENS = 100
"""Special tokens in a text of which a warning names the different ones."""


@dataclass(frozen=True)
class Reader:
    """A tokenizer, and what special tokens that users write are to it.

    Args:
        tokenizer: a transformers tokenizer.
        allow_special_tokens: True reads them as special tokens, False as text, None as text where
            a chat template writes its own.
    """

    tokenizer: Any
    allow_special_tokens: bool | None = None

    def raw(self, text: str, name: str) -> RenderedText:
        """Return a checked text that no template wrote; `name` is what messages call it."""
        text = checked_text(text, f"the {name}")
        is_literal = self.allow_special_tokens is False and bool(text)
        return RenderedText(text, ((0, len(text)),) if is_literal else ())

    def message(self, text: str, name: str) -> RenderedText:
        """Return a checked text that continues a user's message."""
        text = checked_text(text, f"the {name}")
        return self.rendered(RenderedText(text, ((0, len(text)),) if text else ()))

    def rendered(self, text: str | RenderedText) -> RenderedText:
        """Return what a template rendered, with the spans that are text."""
        if isinstance(text, str):
            return RenderedText(text)
        return RenderedText(text.text) if self.allow_special_tokens else text

    def raw_context(self, text: RenderedText) -> tuple[list[int], ContextEnd | None]:
        """Tokenize a raw context after what the tokenizer writes before every text.

        Returns:
            The token ids to encode, and the end of the text, with what is held back.
        """
        prefix = special.prefix_ids(self.tokenizer)
        text_ids = special.rendered_ids(self.tokenizer, text)
        ids = special.with_prefix(prefix, text_ids)
        self._warn_about_unknown(text, text_ids)
        if self.allow_special_tokens is None:
            spelled = special.spelled(self.tokenizer, text.text, text_ids)
            # What all texts begin with does not count.
            brought = len(prefix) - (len(ids) - len(text_ids))
            _warn_about_special_tokens(spelled[brought:])
        return joining.hold_back(self.tokenizer, text, ids, len(ids) - 1)

    def chat_context(self, head: str | RenderedText) -> tuple[list[int], ContextEnd | None]:
        """Tokenize the rendered beginning of a chat, as `raw_context` does."""
        text = self.rendered(head)
        ids = special.rendered_ids(self.tokenizer, text)
        self._warn_about_unknown(text, ids)
        return joining.hold_back(self.tokenizer, text, ids, len(ids) - 1)

    def end_of_chat(self, head: str | RenderedText, ids: list[int]) -> ContextEnd | None:
        """Return the end of a chat of which nothing was held back; `ids` are its last ones."""
        return joining.hold_back(self.tokenizer, self.rendered(head), ids, 0)[1]

    def extension(
        self, end: ContextEnd | None, more: RenderedText
    ) -> tuple[list[int], ContextEnd | None, bool]:
        """Tokenize a text that continues a context.

        Returns:
            The token ids to encode, none where all is held back; the new end of the context; and
            whether the ids are those of the joined text.
        """
        ids, is_joined = joining.following_ids(self.tokenizer, end, more)
        if self.allow_special_tokens is None and not more.literal:
            _warn_about_special_tokens(special.spelled(self.tokenizer, more.text, ids))
        before = [] if end is None else end.ids
        text = more if end is None else end.text + more
        kept, new_end = joining.hold_back(self.tokenizer, text, before + ids, len(ids))
        return kept[len(before) :], new_end, is_joined

    def _warn_about_unknown(self, text: RenderedText, ids: list[int]) -> None:
        """Warn of characters that the tokenizer does not know, and that the model does not see."""
        token = self.tokenizer.unk_token
        count = 0 if token is None else ids.count(self.tokenizer.unk_token_id)
        if count and count > text.text.count(token):
            warnings.warn(
                f"the tokenizer does not know all characters of the text: {count:,} tokens of the"
                f" context are {token}, which the model sees in their place; write these characters"
                " in another way, or leave them out",
                stacklevel=2,
            )


def _warn_about_special_tokens(spelled: list[str]) -> None:
    if not spelled:
        return
    names = ", ".join(quote(name) for name in dict.fromkeys(spelled[:_NAMED_TOKENS]))
    warnings.warn(
        f"the text spells {len(spelled):,} special {'token' if len(spelled) == 1 else 'tokens'}"
        f" ({names}), which the model takes as control tokens; allow_special_tokens=False makes"
        " them text, True keeps them without this warning",
        stacklevel=2,
    )
