"""Checks of texts as they come in from Python: whole characters only."""

from __future__ import annotations

import re

from star_attention.errors import TextError

_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def checked_text(text: str, name: str) -> str:
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
            f"{name} has half a character, U+{ord(text[lone.start()]):04X}, at offset"
            f" {lone.start():,} of {len(text):,}: a lone surrogate, which is no text; read the text"
            " again in its own encoding, or replace it with"
            ' text.encode("utf-8", "replace").decode()'
        ) from None
    return text
