"""Tokens that end an answer: stop strings that are tokens, and the end of an assistant's turn."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.hf.text.template import ChatTemplate

_ANSWER = "\u2063star-attention-answer\u2063"
_ANSWERED = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
_LAST_OF_CHANNELS = ("<|return|>", "<|call|>")
"""What ends the last message of a turn in channels: an answer, or the call of a tool."""


def token_id(tokenizer: Any, text: str) -> int | None:
    """Return the id of the token that is written exactly so, or None if there is none."""
    token: int | None = tokenizer.convert_tokens_to_ids(text)
    return None if token == tokenizer.unk_token_id and text != tokenizer.unk_token else token


def has_channels(tokenizer: Any) -> bool:
    """True if answers consist of messages in channels (gpt-oss): `<|channel|>final<|message|>`."""
    return None not in (token_id(tokenizer, "<|channel|>"), token_id(tokenizer, "<|message|>"))


def stop_tokens(tokenizer: Any, stops: Iterable[str]) -> set[int]:
    """Return the ids of stop strings that are special tokens, which the text never contains."""
    stops = set(stops)
    if tokenizer is None or not stops:
        return set()
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    special |= {
        text: token
        for text, token in tokenizer.get_added_vocab().items()
        if text in stops and tokenizer.decode([token]) == text
    }
    return {special[stop] for stop in stops if stop in special}


def warn_of_unseen_stops(tokenizer: Any, stops: Iterable[str]) -> None:
    """Warn of stop strings of which special tokens are a part: texts without those never match."""
    special = [token for token in tokenizer.all_special_tokens if token.strip()]
    for stop in stops:
        token = next((token for token in special if token in stop and token != stop), None)
        if token is not None:
            warnings.warn(
                f"the stop string {quote(stop)} never ends an answer, whose text leaves out special"
                f" tokens; give {quote(token)} alone, or skip_special_tokens=False",
                stacklevel=2,
            )


def turn_end_ids(tokenizer: Any) -> set[int]:
    """Return the tokens that end an assistant's turn in a chat.

    They are the tokenizer's end of sequence, and the tokens that the chat template writes after an
    assistant's message. A checkpoint's generation settings may name none of them.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return set()
    eos = tokenizer.eos_token_id
    return set(_turn_end_ids(tokenizer, str(tokenizer.chat_template), eos, len(tokenizer)))


@functools.lru_cache(maxsize=8)
def _turn_end_ids(
    tokenizer: Any, chat_template: str, eos: int | None, vocab_size: int
) -> frozenset[int]:
    """Return what `turn_end_ids` does, of a tokenizer in a given state."""
    ids = frozenset(() if eos is None else (eos,)) | _template_ends(tokenizer)
    if not has_channels(tokenizer):
        return ids
    # There a turn has several messages, each with an end of its own.
    last = {token_id(tokenizer, text) for text in _LAST_OF_CHANNELS}
    return (ids | {token for token in last if token is not None}) - {token_id(tokenizer, "<|end|>")}


def _template_ends(tokenizer: Any) -> frozenset[int]:
    """Return the control tokens that the template writes right after an assistant's message.

    Some templates write no end of a message, but the beginning of the next one (GLM-4).
    """
    template = ChatTemplate(tokenizer)
    controls = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ends = set()
    for role in ("user", "tool"):
        try:
            text = template.render([*_ANSWERED, {"role": role, "content": "next"}])
        except InvalidInputError:
            # Not every template takes such messages.
            continue
        after = text.rpartition(_ANSWER)[2].lstrip() if _ANSWER in text else ""
        first = tokenizer(after, add_special_tokens=False).input_ids[:1]
        if first and after.startswith(tokenizer.convert_ids_to_tokens(first[0])):
            ends.add(first[0])
    return frozenset(ends & controls)
