"""Checks of texts as they come in from Python: whole characters, words, no other kind of file."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from star_attention.errors import InvalidInputError, TextError, TokenError, quote
from star_attention.files.kinds import DAMAGED, FileKind, recognize

_T = TypeVar("_T")

_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_LONGEST_FILE_NAME = 255
_SURROGATE = re.compile("[\ud800-\udfff]")
_ARCHIVE = FileKind("a zip archive, Word file or EPUB", document=".zip")
_WIDE = 0.3
"""Share of NULs from which on a text was UTF-16, read in another encoding."""


def checked_text(text: str, name: str) -> str:
    """Return a text as `whole_characters` does, after `check_is_text`."""
    check_is_text(text, name)
    return whole_characters(text, name)


def whole_characters(text: str, name: str) -> str:
    """Return a text whose pairs of surrogates are the characters that they stand for.

    Args:
        text: the text.
        name: what it is, as messages call it: "the context", "the query".

    Raises:
        TextError: a surrogate without its other half, which no tokenizer can read.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # Blanks of the same length: offsets stay those of the user's text.
        lone = _SURROGATE.search(_PAIR.sub("  ", text))
        if lone is None:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        raise TextError(
            f"{name} has a lone surrogate (half a character), U+{ord(text[lone.start()]):04X}, at"
            f" offset {lone.start():,} of {len(text):,}; read the text again in its own encoding,"
            " or replace the surrogate with"
            ' text.encode("utf-8", "replace").decode()'
        ) from None
    return text


def check_is_text(text: str, name: str) -> None:
    """Raise `TextError` for what was read from a file of another kind; `name` says of what.

    Such texts begin like a PDF, an archive or an image, or have NULs.
    """
    kind = _kind_of(text)
    if kind is not None:
        raise TextError(f"{name} is {kind.name}, read as if it were a text; {_remedy(kind)}")
    nuls = text.count("\0")
    if not nuls:
        return
    found = (
        f"{name} has {nuls:,} NUL {'character' if nuls == 1 else 'characters'}, the first at offset"
        f" {text.index(chr(0)):,} of {len(text):,}, and so is not plain text"
    )
    if 1 < nuls >= _WIDE * len(text):
        raise TextError(
            f"{found}; it looks like UTF-16 that was read in another encoding: read it again with"
            ' open(path, encoding="utf-16")'
        )
    raise TextError(f'{found}; give a text, or remove them with text.replace("\\0", "")')


def bytes_remedy(data: bytes | bytearray) -> str:
    """Return what to do with bytes in place of a text."""
    kind = recognize(bytes(data))
    if kind is not None:
        return f"they are {kind.name}: {_remedy(kind)}"
    return "decode them, for example with data.decode()"


def _kind_of(text: str) -> FileKind | None:
    """Return the kind of file that a text was read from by mistake."""
    kind = recognize(text[:1024].encode("latin-1", "replace"))
    if kind is not DAMAGED:
        return kind
    # Read as Latin-1, as it often is, an archive still has all its bytes.
    kind = recognize(text.encode("latin-1", "replace"))
    return _ARCHIVE if kind is DAMAGED else kind


def _remedy(kind: FileKind) -> str:
    if kind.document:
        return "give star_attention.read_document(path)"
    return kind.advice("FILE")


def for_each(name: str, items: list[Any], call: Callable[[Any], _T]) -> list[_T]:
    """Return what `call` makes of each item; an error says which of several it is about."""
    results = []
    for number, item in enumerate(items, 1):
        try:
            results.append(call(item))
        except InvalidInputError as error:
            if len(items) > 1:
                error.args = (f"{name} {number} of {len(items)}: {error}",)
            raise
    return results


_TOKENIZER = ("__call__", "decode", "all_special_ids", "convert_ids_to_tokens", "get_added_vocab")


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `InvalidInputError` for what is no tokenizer of transformers, and not None."""
    if tokenizer is None or all(hasattr(tokenizer, name) for name in _TOKENIZER):
        return
    remedy = "load one with transformers.AutoTokenizer.from_pretrained"
    if hasattr(tokenizer, "tokenizer"):
        remedy = "give the tokenizer inside of it, processor.tokenizer"
    elif type(tokenizer).__module__.startswith("tokenizers"):
        remedy = "wrap it: transformers.PreTrainedTokenizerFast(tokenizer_object=...)"
    raise InvalidInputError(
        f"the tokenizer is of type {type(tokenizer).__name__}, expected a tokenizer of"
        f" transformers; {remedy}"
    )


def check_words(text: str, name: str) -> None:
    """Raise `TokenError` for a text that is empty or white space; `name` says of what."""
    if not text:
        raise TokenError(f"the {name} is empty; give at least 1 token")
    if not text.strip():
        raise TokenError(f"the {name} is only white space, {quote(text)}; give at least one word")


def check_no_path(content: object) -> None:
    """Raise `TokenError` for a path in place of a text."""
    if isinstance(content, os.PathLike):
        path = quote(os.fspath(content))
        raise TokenError(
            f"the context is a path, {path}; to encode what is in the file, give"
            f" star_attention.read_document({path})"
        )


def warn_about_file_name(text: object) -> None:
    """Warn about a context that is the name of a file here: the name would be encoded."""
    if not isinstance(text, str):
        return
    if len(text) > _LONGEST_FILE_NAME or "\n" in text or "\0" in text:
        return
    if os.path.isfile(text):
        warnings.warn(
            f"the context is the text {quote(text)}, which is also the name of a file here; to"
            f" encode what is in it, give star_attention.read_document({quote(text)})",
            stacklevel=2,
        )
