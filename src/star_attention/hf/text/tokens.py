"""Text to token ids and back: ids of contexts and queries."""

from __future__ import annotations

from typing import Any


def context_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a context with the tokenizer's defaults, but with at most one BOS and no added EOS.

    Args:
        tokenizer: a transformers tokenizer.
        text: the context.
    """
    # Not verbose: we check lengths ourselves.
    ids: list[int] = tokenizer(text, verbose=False).input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    # The text may begin with a BOS of its own.
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if (
        eos is not None
        and eos != bos
        and ids
        and ids[-1] == eos
        and not text.endswith(tokenizer.eos_token)
    ):
        ids = ids[:-1]
    return ids


def query_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize text that follows a context, without adding special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def decode(tokenizer: Any, ids: list[int], *, skip_special_tokens: bool = True) -> str:
    """Return the text of token ids, by default without special tokens."""
    text: str = tokenizer.decode(
        ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    return text
