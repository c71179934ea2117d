"""Tokens to text, one at a time: whole characters, in linear time whatever bytes come."""

from __future__ import annotations

from typing import Any

from star_attention.hf.text.tokens import decoder

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MOST_PENDING = 4
"""Tokens after which text is no longer held back: a character has at most four bytes."""


class Detokenizer:
    """Convert tokens to text one at a time; no piece of text ends inside a character.

    Each piece is decoded together with a few earlier tokens, because some tokenizers write a token
    differently at the start of a text. Incomplete byte sequences are held back.

    Args:
        tokenizer: a transformers tokenizer.
        skip_special_tokens: leave special tokens out.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decode = decoder(tokenizer, skip_special_tokens=skip_special_tokens)
        # Tokens that are decoded together: some whose text is out already, then the pending ones.
        self._window: list[int] = []
        self._pending = 0
        # The part of the window's text that is out.
        self._shown = ""

    def push(self, token: int) -> str:
        """Add a token, and return the text that it completes, which may be empty."""
        self._window.append(token)
        self._pending += 1
        piece = self._unshown()
        if not piece and self._is_invisible(token):
            self._window.pop()
            self._pending -= 1
            return ""
        if self._pending < _MOST_PENDING:
            if not piece or piece.endswith(REPLACEMENT):
                return ""
            self._advance()
            return piece
        # Bytes that form no character, or tokens that split every character. Only the last one may
        # still be completed.
        self._advance()
        self._shown = self._shown.removesuffix(REPLACEMENT)
        return piece.removesuffix(REPLACEMENT)

    def flush(self) -> str:
        """Return the text held back, for an answer that ends inside a character."""
        piece = self._unshown()
        self._window, self._pending, self._shown = [], 0, ""
        return piece

    def _advance(self) -> None:
        self._window = self._window[-self._pending :]
        self._pending = 0
        self._shown = self._decode(self._window)

    def _unshown(self) -> str:
        text = self._decode(self._window)
        if REPLACEMENT in text and not text.startswith(self._shown):
            # Some decoders give up a whole run of bytes for an invalid one, characters that are out
            # included.
            return self._decode(self._window[len(self._window) - self._pending :])
        return text[len(self._shown) :]

    def _is_invisible(self, token: int) -> bool:
        """True for a special token that is left out, and for an id without a token."""
        if not self._tokenizer.convert_ids_to_tokens(token):
            return True
        return self._skip_special_tokens and bool(
            self._tokenizer.decode([token], skip_special_tokens=False) and not self._decode([token])
        )
