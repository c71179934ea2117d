"""Passages of a context: sentences and lines as runs of tokens, and where their text is.

Contexts keep token ids, not texts. Passages begin and end between tokens, with whole words where
the text has any, and with whole characters always.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from star_attention.hf.text import special
from star_attention.hf.text.detokenizer import REPLACEMENT
from star_attention.hf.text.messages import Message, texts
from star_attention.hf.text.tokens import decode

_MOST_TOKENS = 96
"""Tokens after which a passage is cut, where its text has no end of a sentence."""

_LEAST_TOKENS = 4
"""Tokens before which a full stop ends no passage: `Dr. Smith`, `1. First`."""

_RUN_TOKENS = 32
"""Tokens of a passage where there is no tokenizer."""

_ENDS = (".", "!", "?", "…")
"""Ends of sentences before white space."""

_ENDS_ALONE = tuple("\u3002\uff61\uff01\uff1f\u0964\u104b\u17d4")
"""Ends of sentences whatever follows: in Chinese and Japanese, Hindi, Burmese and Khmer."""

_CLOSERS = "\"'”’»)]}*_"


@dataclass(frozen=True, kw_only=True)
class Place:
    """The text of a passage, and where it is.

    Attributes:
        text: the text, without white space around it.
        start_char, stop_char: its characters in the text of the context, or in the content of the
            message; None where that is unknown.
        message: number of the message in a chat, from 0; None outside of messages.
    """

    text: str = ""
    start_char: int | None = None
    stop_char: int | None = None
    message: int | None = None


def passages(tokenizer: Any, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Cut a context into sentences and lines, `(start, stop)` in tokens.

    Control tokens and white space alone are in none. Without a tokenizer they are short runs.
    """
    if tokenizer is None:
        cuts = [*range(0, len(ids), _RUN_TOKENS), len(ids)]
        return list(pairwise(cuts))
    pieces = _pieces(tokenizer, ids)
    return [
        part
        for start, stop in _sentences([pieces[token] for token in ids])
        for part in _cut(tokenizer, ids, pieces, start, stop)
    ]


def _pieces(tokenizer: Any, ids: Sequence[int]) -> dict[int, str | None]:
    """Return what each token writes inside of a text; None for control tokens."""
    control = {*special.markers(tokenizer).values(), *tokenizer.all_special_ids}
    # Some tokenizers write less at the beginning of a text.
    before = special.plain_ids(tokenizer, "a")[-1:]
    skipped = len(decode(tokenizer, before, skip_special_tokens=False))
    return {
        token: None
        if token in control
        else decode(tokenizer, [*before, token], skip_special_tokens=False)[skipped:]
        for token in set(ids)
    }


def _sentences(pieces: list[str | None]) -> Iterator[tuple[int, int]]:
    """Yield sentences and lines, of what the tokens of a text write."""
    start: int | None = None
    end = _End()
    for index, piece in enumerate(pieces):
        is_blank = piece is not None and not piece.strip()
        if start is not None and (piece is None or (not is_blank and end.is_before(piece))):
            yield start, index
            start = None
        if piece is None or (start is None and is_blank):
            continue
        if start is None:
            start, end = index, _End()
        end.push(piece, index + 1 - start)
    if start is not None:
        yield start, len(pieces)


class _End:
    """Tells whether the text so far ends a sentence or a line."""

    def __init__(self) -> None:
        self._of_line = self._of_sentence = self._alone = self._spaced = False

    def push(self, piece: str, tokens: int) -> None:
        """Add a piece; `tokens` is the number of those so far."""
        core = piece.rstrip()
        space = piece[len(core) :]
        if core.strip().strip(_CLOSERS):
            core = core.rstrip(_CLOSERS)
            self._of_line = False
            self._alone = core.endswith(_ENDS_ALONE)
            self._of_sentence = core.endswith(_ENDS) and tokens >= _LEAST_TOKENS
        self._of_line |= "\n" in space
        self._spaced = bool(space)

    def is_before(self, piece: str) -> bool:
        """True if a new sentence or line begins with this piece."""
        space = piece[: len(piece) - len(piece.lstrip())]
        is_apart = bool(space) or self._spaced
        return self._of_line or "\n" in space or self._alone or (self._of_sentence and is_apart)


def _cut(
    tokenizer: Any, ids: Sequence[int], pieces: dict[int, str | None], start: int, stop: int
) -> Iterator[tuple[int, int]]:
    """Yield the parts of a passage that is too long: whole words, or at least whole characters."""
    while stop - start > _MOST_TOKENS:
        places = range(start + _MOST_TOKENS, start + _MOST_TOKENS // 2, -1)
        words = (place for place in places if (pieces[ids[place]] or "")[:1].isspace())
        whole = (
            place
            for place in places
            if not decode(tokenizer, list(ids[start:place])).endswith(REPLACEMENT)
        )
        place = next(words, None) or next(whole, places[0])
        yield start, place
        start = place
    yield start, stop


def places(
    tokenizer: Any, ids: list[int], spans: list[tuple[int, int]], text: str | None
) -> list[Place]:
    """Return the texts of passages, and where they are in the text of a context.

    Args:
        tokenizer: a transformers tokenizer.
        ids: the context's token ids.
        spans: the passages, in tokens.
        text: the context's text; None where there is none to count characters of.
    """
    first = _prefix_tokens(tokenizer, ids)
    decoded = written(tokenizer, ids)
    found = (_place(tokenizer, ids[first:], decoded, (a - first, b - first)) for a, b in spans)
    return [_in_text(place, decoded, text) for place in found]


def written(tokenizer: Any, ids: list[int]) -> str:
    """Return the text that a context's tokens write, without what the tokenizer puts first."""
    return decode(tokenizer, ids[_prefix_tokens(tokenizer, ids) :], skip_special_tokens=False)


def _prefix_tokens(tokenizer: Any, ids: list[int]) -> int:
    prefix = special.prefix_ids(tokenizer)
    return len(prefix) if ids[: len(prefix)] == prefix else 0


def _in_text(place: Place, decoded: str, text: str | None) -> Place:
    """Return a place in the decoded text as one in the text that the tokens were made of."""
    if text is None:
        return Place(text=place.text)
    if place.stop_char is not None and text.startswith(decoded[: place.stop_char]):
        return place
    # The tokenizer changes the text before.
    if text.count(place.text) != 1:
        return Place(text=place.text)
    start = text.index(place.text)
    return Place(text=place.text, start_char=start, stop_char=start + len(place.text))


def _place(tokenizer: Any, ids: list[int], text: str, span: tuple[int, int]) -> Place:
    start, stop = span
    before, through = (decode(tokenizer, ids[:n], skip_special_tokens=False) for n in span)
    if not (through.startswith(before) and text.startswith(through)):
        # Decoded apart, the tokens write something else: there is nothing to count.
        return Place(text=decode(tokenizer, ids[start:stop], skip_special_tokens=False).strip())
    passage = text[len(before) : len(through)]
    start_char = len(before) + len(passage) - len(passage.lstrip())
    passage = passage.strip()
    return Place(text=passage, start_char=start_char, stop_char=start_char + len(passage))


def chat_places(
    tokenizer: Any,
    ids: list[int],
    spans: list[tuple[int, int]],
    messages: list[Message],
    held: str,
) -> list[Place]:
    """Return the texts of passages, and where they are in the messages of a chat.

    Args:
        tokenizer: a transformers tokenizer.
        ids: the token ids of the rendered chat.
        spans: the passages, in tokens.
        messages: the messages; of content in parts, characters are those of the joined texts.
        held: the end of the rendered text that the ids leave out.
    """
    text = decode(tokenizer, ids, skip_special_tokens=False)
    contents = ["".join(texts(message)) for message in messages]
    starts = _starts(text + held, contents)
    result = []
    for span in spans:
        place = _place(tokenizer, ids, text, span)
        result.append(_in_message(place, contents, starts))
    return result


def _starts(text: str, contents: list[str]) -> dict[int, int]:
    """Return where the contents of messages begin in the rendered text, as far as they are found.

    The longest one is looked for first: a short one may be found in others, too.
    """
    starts: dict[int, int] = {}
    for number in sorted(range(len(contents)), key=lambda n: -len(contents[n])):
        core = contents[number].strip()
        low = max((starts[n] + len(contents[n].strip()) for n in starts if n < number), default=0)
        high = min((starts[n] for n in starts if n > number), default=len(text))
        at = text.find(core, low, high) if core else -1
        if at >= 0:
            starts[number] = at
    return {n: at - contents[n].index(contents[n].strip()) for n, at in starts.items()}


def _in_message(place: Place, contents: list[str], starts: dict[int, int]) -> Place:
    """Return a place in the rendered text as one in the content of the message it is in most.

    What the template wrote before or after the content is no part of it.
    """
    if place.start_char is None or place.stop_char is None:
        return place
    best = Place(text=place.text)
    most = 0
    for number, start in starts.items():
        content = contents[number]
        low, high = max(0, place.start_char - start), min(len(content), place.stop_char - start)
        passage = content[low:high].strip() if low < high else ""
        if len(passage) > most:
            low += content[low:high].index(passage)
            high, most = low + len(passage), len(passage)
            best = Place(text=passage, start_char=low, stop_char=high, message=number)
    return best
