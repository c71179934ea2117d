"""Special tokens: those that a tokenizer writes by itself, and those that texts spell out.

A chat template writes control tokens (`<|im_start|>`), and so may anybody who writes a document.
Text in the literal spans of a `RenderedText` stays text, whatever it spells.
"""

from __future__ import annotations

import copy
import itertools
import re
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from star_attention.hf.text.rendered import RenderedText

_NEUTRAL = ("\n", "a", ".")
"""Texts that a tokenizer may be shown before another, to see how that one continues a text."""

_markers: weakref.WeakKeyDictionary[Any, tuple[tuple[int, str], dict[str, int]]] = (
    weakref.WeakKeyDictionary()
)
_splitters: weakref.WeakKeyDictionary[Any, tuple[int, Any]] = weakref.WeakKeyDictionary()
_splitters_lock = threading.Lock()


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a text without adding special tokens; those that it spells out are special."""
    # Not verbose: we check lengths ourselves.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def continued_ids(tokenizer: Any, text: RenderedText) -> list[int]:
    """Tokenize a text as the continuation of another: without a dummy space before it."""
    for before in _NEUTRAL:
        start = plain_ids(tokenizer, before)
        joined = rendered_ids(tokenizer, RenderedText(before) + text)
        if joined[: len(start)] == start:
            return joined[len(start) :]
    return rendered_ids(tokenizer, text)


def prefix_ids(tokenizer: Any) -> list[int]:
    """Return the special tokens that a tokenizer writes before every text: a BOS, or several."""
    with_special: list[int] = tokenizer("a", verbose=False).input_ids
    text = plain_ids(tokenizer, "a")
    for start in range(len(with_special) - len(text) + 1):
        if with_special[start : start + len(text)] == text:
            return with_special[:start]
    return []


def with_prefix(prefix: list[int], ids: list[int]) -> list[int]:
    """Return the ids after the prefix, which a text that brings all or its end gets once."""
    shared = next((n for n in range(len(prefix), 0, -1) if prefix[len(prefix) - n :] == ids[:n]), 0)
    return prefix[: len(prefix) - shared] + ids


def markers(tokenizer: Any) -> dict[str, int]:
    """Return the control tokens that a text could spell out, with their ids.

    These are the special tokens, and other added tokens that the chat template names: some
    checkpoints do not mark those as special.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    version = (len(tokenizer), template)
    cached = _markers.get(tokenizer)
    if cached is not None and cached[0] == version:
        return cached[1]
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    added = {
        str(token.content): int(index)
        for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
        if token.special or token.content in template
    }
    known = {text: index for text, index in (special | added).items() if text.strip()}
    _markers[tokenizer] = (version, known)
    return known


def spelled(tokenizer: Any, text: str, ids: list[int]) -> list[str]:
    """Return the control tokens that a text spells out, in order.

    Args:
        tokenizer: a transformers tokenizer.
        text: the text.
        ids: its token ids.
    """
    known = markers(tokenizer)
    # Nearly always there are none, which the ids say faster than the text.
    if set(known.values()).isdisjoint(ids):
        return []
    return _pattern(known).findall(text)


def rendered_ids(tokenizer: Any, rendered: RenderedText) -> list[int]:
    """Tokenize a text without adding special tokens, its literal spans as text.

    A text whose literal spans spell no control token is tokenized in one piece, as always.
    Otherwise the pieces between the template's control tokens are tokenized one by one, as
    tokenizers themselves do.
    """
    ids = plain_ids(tokenizer, rendered.text)
    if not rendered.literal:
        return ids
    known = markers(tokenizer)
    values = set(known.values())
    if not known or values.isdisjoint(ids):
        return ids
    pattern = _pattern(known)
    own = [
        (start + match.start(), start + match.end())
        for start, end in _gaps(rendered)
        for match in pattern.finditer(rendered.text[start:end])
    ]
    if sum(token in values for token in ids) <= len(own):
        return ids
    return _ids_by_piece(tokenizer, rendered, own, pattern)


def _pattern(known: dict[str, int]) -> re.Pattern[str]:
    """Return a pattern of all control tokens; of several at one place the longest counts."""
    return re.compile("|".join(re.escape(text) for text in sorted(known, key=len, reverse=True)))


def _gaps(rendered: RenderedText) -> Iterator[tuple[int, int]]:
    """Yield the spans that the template wrote."""
    start = 0
    for low, high in rendered.literal:
        if start < low:
            yield start, low
        start = high
    if start < len(rendered.text):
        yield start, len(rendered.text)


def _ids_by_piece(
    tokenizer: Any,
    rendered: RenderedText,
    own: list[tuple[int, int]],
    pattern: re.Pattern[str],
) -> list[int]:
    """Tokenize a text whose literal spans spell control tokens.

    Args:
        tokenizer: a transformers tokenizer.
        rendered: the text.
        own: spans of the template's own control tokens.
        pattern: matches control tokens.
    """
    text = rendered.text
    ids: list[int] = []
    start = piece_start = 0
    for low, high in [*own, (len(text), len(text))]:
        piece = text[piece_start:low]
        if pattern.search(piece):
            ids += plain_ids(tokenizer, text[start:piece_start])
            before = text[own[0][0] : own[0][1]] if piece_start else ""
            ids += _literal_ids(tokenizer, piece, pattern, before)
            start = low
        piece_start = high
    return ids + plain_ids(tokenizer, text[start:])


def _literal_ids(tokenizer: Any, text: str, pattern: re.Pattern[str], before: str) -> list[int]:
    """Tokenize a text that spells control tokens, as text.

    Args:
        tokenizer: a transformers tokenizer.
        text: the text.
        pattern: matches control tokens.
        before: a control token that precedes the text, "" at the beginning.
    """
    # Some tokenizers write a dummy space after a control token, others at the beginning alone.
    starts_anew = not before or plain_ids(tokenizer, before + "a")[1:] == plain_ids(tokenizer, "a")
    values = set(markers(tokenizer).values())
    with _splitters_lock:
        splitter = _splitter(tokenizer)
        if splitter is not None:
            ids = _piece_ids(splitter, text, starts_anew=starts_anew)
            if values.isdisjoint(ids):
                return ids
    # Nothing spells a control token without its first character.
    cuts = [0, *(match.start() + 1 for match in pattern.finditer(text)), len(text)]
    ids = []
    for start, end in itertools.pairwise(cuts):
        ids += _piece_ids(tokenizer, text[start:end], starts_anew=start == 0 and starts_anew)
    return ids


def _piece_ids(tokenizer: Any, text: str, *, starts_anew: bool) -> list[int]:
    if starts_anew:
        return plain_ids(tokenizer, text)
    return continued_ids(tokenizer, RenderedText(text))


def _splitter(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer that reads special tokens as text; None where none can be made.

    A copy, because other threads use the tokenizer at the same time.
    """
    size, splitter = _splitters.get(tokenizer, (-1, None))
    if size != len(tokenizer):
        try:
            splitter = copy.deepcopy(tokenizer)
        except Exception:
            # Tokenizers of other libraries may hold what cannot be copied.
            splitter = None
        else:
            splitter.split_special_tokens = True
        _splitters[tokenizer] = (len(tokenizer), splitter)
    return splitter
