"""Checks that a loaded tokenizer is what its files say, where transformers may see it otherwise."""

from __future__ import annotations

import warnings
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from star_attention.errors import quote
from star_attention.hf.text import special, tokens

_LINE = "Der Käfer  sat on\n\nthe mat.\n"
"""Words, two spaces, line breaks and a letter beyond ASCII, which a tokenizer should give back."""


def as_filed(tokenizer: Any, path: Any, location: dict[str, Any]) -> Any:
    """Return a tokenizer that does what its files say, and say where it does not.

    Some classes of tokenizers replace the rules of their tokenizer.json, and drop all spaces of a
    file that was made for others; and a BOS that tokenizer_config.json asks for counts, whatever
    tokenizer.json adds.

    Args:
        tokenizer: what transformers made of the files.
        path: where they are.
        location: the arguments of `from_pretrained` that it was loaded with.
    """
    text = _given_back(tokenizer)
    if text != _LINE:
        other = _by_rules(path, location)
        if other is not None and _given_back(other) == _LINE:
            warnings.warn(
                f"transformers {transformers.__version__} reads the tokenizer at {path} as a"
                f" {type(tokenizer).__name__}, which makes {quote(text)} of {quote(_LINE)}; the"
                " rules of its tokenizer.json are used instead: write"
                ' "tokenizer_class": "PreTrainedTokenizerFast" into its tokenizer_config.json',
                stacklevel=2,
            )
            tokenizer = other
        else:
            warnings.warn(
                f"the tokenizer at {path} changes texts: it makes {quote(text)} of {quote(_LINE)};"
                " if that is not meant, check its files, or update transformers (now"
                f" {transformers.__version__})",
                stacklevel=2,
            )
    _write_bos(tokenizer, path, location)
    return tokenizer


def _given_back(tokenizer: Any) -> str:
    """Return what a tokenizer makes of the line, there and back."""
    # Some write a space before every text.
    return tokens.decode(tokenizer, special.plain_ids(tokenizer, _LINE)).removeprefix(" ")


def _by_rules(path: Any, location: dict[str, Any]) -> Any:
    """Return the tokenizer that tokenizer.json describes, None if there is no such file."""
    try:
        return PreTrainedTokenizerFast.from_pretrained(path, **location)
    except Exception:
        # Whatever is missing or odd: the tokenizer that could be loaded is there.
        return None


def _write_bos(tokenizer: Any, path: Any, location: dict[str, Any]) -> None:
    """Let a tokenizer write the BOS that its config asks for, if it writes nothing else."""
    try:
        asks = get_tokenizer_config(path, **location).get("add_bos_token") is True
    except (OSError, ValueError):
        return
    has_setting = hasattr(type(tokenizer), "add_bos_token") and tokenizer.bos_token_id is not None
    if asks and has_setting and not special.prefix_ids(tokenizer):
        tokenizer.add_bos_token = True
