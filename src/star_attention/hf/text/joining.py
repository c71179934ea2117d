"""Context and query tokenized as one text, although the context is encoded before the query is
known.

Where the end of a context would be tokenized differently together with what follows (spaces, line
breaks, a punctuation mark that a tokenizer merges with a line break), that end is *held back*: it
is not encoded, and begins the text of every query. Which ends these are is found by showing them to
the tokenizer together with likely beginnings of a query. Only the last characters of a context are
looked at.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from star_attention.hf.text.rendered import RenderedText
from star_attention.hf.text.special import continued_ids, plain_ids, rendered_ids

_WINDOW = 100
"""Characters at the end of a context that are tokenized together with what follows."""

_LONGEST_WINDOW = 1000
"""The same, where no word begins before."""

_LONGEST_SPACE = 10_000
"""White space at the end of a context that is looked at, where the words before it have to be."""

_LAST_IDS = 48
"""Token ids at the end of a context whose text is looked at, if ids are all there is."""

_AFTER_SPACE: tuple[str, ...] = (
    "a",
    "w",
    "W",
    "1",
    ".",
    "<",
    " W",
    "  a",
    "\n",
    "\na",
    "\n\n",
    "\r\n",
    "\t",
)
_AFTER_MARK: tuple[str, ...] = ("a", "w", "W", " W", "\n", "\n\n", "\r\n")
_AFTER_LETTER: tuple[str, ...] = (" W", "\n", "\n\n", "\r\n")
"""What a query may begin with; a letter glued to the context's last word is the user's doing."""


@dataclass(frozen=True, kw_only=True)
class ContextEnd:
    """The end of a context, which is tokenized together with what follows.

    Attributes:
        text: its last characters, those held back included.
        encoded: the number of these characters that are encoded; the others are held back.
        ids: the token ids of the encoded ones.
        held_ids: the token ids of those held back, if nothing or only token ids follow.
    """

    text: RenderedText
    encoded: int
    ids: list[int]
    held_ids: list[int]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, as saved contexts store them."""
        return {
            "text": self.text.text,
            "literal": [list(span) for span in self.text.literal],
            "encoded": self.encoded,
            "ids": self.ids,
            "held_ids": self.held_ids,
        }

    @classmethod
    def of(cls, values: dict[str, Any]) -> ContextEnd:
        """Return the end that `as_dict` described."""
        literal = tuple((start, end) for start, end in values["literal"])
        return cls(
            text=RenderedText(values["text"], literal),
            **{name: values[name] for name in ("encoded", "ids", "held_ids")},
        )


def hold_back(
    tokenizer: Any, text: RenderedText, ids: list[int], most: int
) -> tuple[list[int], ContextEnd | None]:
    """Cut what is held back from the token ids of a context.

    Args:
        tokenizer: a transformers tokenizer.
        text: the context, or its last characters.
        ids: its token ids.
        most: the most token ids to hold back; nothing is, where it would take more.

    Returns:
        The token ids to encode, and the end of the context; None for a text that the tokenizer
        writes differently at its end than alone.
    """
    for start in _window_starts(text.text):
        cut = _cut(tokenizer, text.slice(start), ids, most)
        if cut is not None:
            return cut
    return ids, None


def _cut(
    tokenizer: Any, end: RenderedText, ids: list[int], most: int
) -> tuple[list[int], ContextEnd] | None:
    """Return what `hold_back` does for this end of the text; None if its ids are not the text's."""
    end_ids = rendered_ids(tokenizer, end)
    stable = _stable_tokens(tokenizer, end, end_ids) if most else len(end_ids)
    held, characters = 0, len(end)
    if stable < len(end_ids):
        stable, characters = _character_cut(tokenizer, end, end_ids, stable)
        held = len(end_ids) - stable
    # One token before the cut must agree, too: there the window continues the context.
    agree = min(held + 1, len(end_ids))
    if not end_ids or ids[len(ids) - agree :] != end_ids[len(end_ids) - agree :]:
        return None
    if held > most:
        held, stable, characters = 0, len(end_ids), len(end)
    kept = len(ids) - held
    return ids[:kept], ContextEnd(
        text=end, encoded=characters, ids=end_ids[:stable], held_ids=end_ids[stable:]
    )


def end_of_ids(tokenizer: Any, ids: list[int]) -> ContextEnd | None:
    """Return the end of a context of token ids, nothing of which is held back.

    None if its text, tokenized, does not give these ids.
    """
    ids = ids[-_LAST_IDS:]
    try:
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text_ids = plain_ids(tokenizer, text)
    except Exception:
        # Ids that the tokenizer does not know: each tokenizer has an error of its own for them.
        return None
    # The first tokens may depend on what is not there any more.
    agree = min(len(ids), len(text_ids), max(1, len(ids) // 2))
    if not text or text_ids[len(text_ids) - agree :] != ids[len(ids) - agree :]:
        return None
    return ContextEnd(text=RenderedText(text), encoded=len(text), ids=text_ids, held_ids=[])


def following_ids(
    tokenizer: Any, end: ContextEnd | None, more: RenderedText
) -> tuple[list[int], bool]:
    """Tokenize what follows a context together with the context's end.

    Args:
        tokenizer: a transformers tokenizer.
        end: the end of the context, None if it is unknown.
        more: the text that follows.

    Returns:
        The token ids after the encoded ones, those held back first; and whether they are those of
        the joined text. They are not where the text goes on inside of a token.
    """
    if end is None:
        return continued_ids(tokenizer, more), True
    joined = rendered_ids(tokenizer, end.text + more)
    if joined[: len(end.ids)] == end.ids:
        return joined[len(end.ids) :], True
    return continued_ids(tokenizer, end.text.slice(end.encoded) + more), False


def warn_about_cut(end: ContextEnd | None, more: RenderedText, name: str, warned: set[str]) -> None:
    """Warn that a context ends inside of a token of the joined text.

    Args:
        end: the end of the context.
        more: what follows.
        name: what that is, as messages call it.
        warned: names that have been warned of, to say it once.
    """
    if end is None or name in warned:
        return
    warned.add(name)
    warnings.warn(
        f"the text is tokenized differently across the cut between context and {name}"
        f" ({end.text.text[-12:]!r} | {more.text[:12]!r}), which is inside of a token; end the"
        " context with a line break or a whole word to avoid it",
        stacklevel=2,
    )


def _window_starts(text: str) -> Iterator[int]:
    """Yield where the end of a text may begin, the best place first."""
    start = _window_start(text)
    yield start
    # Tokenizers that strip a text write nothing for white space at its end, however long it is.
    words = text.rstrip()
    if words and len(text) - len(words) <= _LONGEST_SPACE and _window_start(words) < start:
        yield _window_start(words)


def _window_start(text: str) -> int:
    """Return where the end of a text begins: where possible, with a space before a word."""
    last = max(0, len(text) - _WINDOW)
    for start in range(last, max(0, len(text) - _LONGEST_WINDOW), -1):
        if text[start] == " " and not text[start - 1].isspace() and text[start + 1].isalpha():
            return start
    return last if len(text) > _LONGEST_WINDOW else 0


def _stable_tokens(tokenizer: Any, end: RenderedText, ids: list[int]) -> int:
    """Return the number of tokens of `end` that stay the same whatever follows."""
    last = end.text[-1:]
    if not last:
        return 0
    is_word = unicodedata.category(last)[0] in "LNM"
    probes = _AFTER_SPACE if last.isspace() else _AFTER_LETTER if is_word else _AFTER_MARK
    stable = len(ids)
    for probe in probes:
        joined = rendered_ids(tokenizer, end + RenderedText(probe))
        shared = 0
        while shared < min(stable, len(joined)) and joined[shared] == ids[shared]:
            shared += 1
        stable = min(stable, shared)
    return stable


def _character_cut(
    tokenizer: Any, end: RenderedText, ids: list[int], stable: int
) -> tuple[int, int]:
    """Return a number of tokens, at most `stable`, and the characters that they are made of.

    A token may end inside of a character; then the cut is before it.
    """
    for characters in range(len(end) - 1, -1, -1):
        before = rendered_ids(tokenizer, end.slice(0, characters))
        if len(before) <= stable and before == ids[: len(before)]:
            return len(before), characters
    return 0, 0
