"""Finds out which characters of a rendered chat are users', where that makes a difference.

Texts that contain what looks like a control token are marked, the conversation is rendered again,
and the marks tell where the texts are. Marks are letters and digits next to a text's own first and
last characters, so that templates that trim, split and escape texts leave them alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.hf.text.messages import Message
from star_attention.hf.text.rendered import RenderedText, shared_prefix
from star_attention.hf.text.template import ChatTemplate


def render(template: ChatTemplate, messages: list[Message]) -> RenderedText:
    """Render a conversation, with the spans of texts that contain what looks like a control token.

    A last message of the assistant, which the answer continues, counts as the template's.

    Raises:
        InvalidInputError: the template does not take these messages, or it changes such a text, so
            that it cannot be told from the template's own.
    """
    messages = template.adapted(messages)
    text = template.render(messages)
    tokens = [token for token in template.tokenizer.get_added_vocab() if token.strip()]
    beginnings = {token[:2] for token in tokens}

    def is_suspect(leaf: str) -> bool:
        # Texts are long and have few beginnings of control tokens, if any.
        return any(start in leaf for start in beginnings) and any(t in leaf for t in tokens)

    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if is_suspect(role) and not role.isidentifier():
            raise InvalidInputError(
                f"message {number} has the role {quote(role)}, which contains control tokens; give"
                " it a name such as 'user'"
            )
    last = len(messages) - (messages[-1]["role"] == "assistant")
    closed, open_end = messages[:last], messages[last:]
    suspects = [leaf.strip() for leaf in _leaves([closed, template.kwargs]) if is_suspect(leaf)]
    if not suspects:
        return RenderedText(text)
    nonce = "Qz7"
    while nonce in text:
        nonce += "q"
    marks = _Marks(nonce, is_suspect)
    marked = template.with_kwargs(marks.put(template.kwargs)).render(marks.put(closed) + open_end)
    spans = marks.spans(marked) if marks.strip(marked) == text else _found(text, suspects)
    return RenderedText(text, _merged(spans))


class _Marks:
    def __init__(self, nonce: str, is_suspect: Callable[[str], bool]) -> None:
        self._nonce = nonce
        self._is_suspect = is_suspect
        self._pattern = re.compile(rf"{nonce}([LR])(\d+)x")
        self._texts: list[str] = []

    def put(self, value: Any) -> Any:
        """Return messages or arguments in which every suspect text is marked."""
        if isinstance(value, dict):
            return {self.put(k): v if k == "role" else self.put(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self.put(item) for item in value]
        if not isinstance(value, str) or not self._is_suspect(value):
            return value
        core = value.strip()
        before, after = value.split(core, 1)
        number = len(self._texts)
        self._texts.append(core)
        return f"{before}{self._nonce}L{number}x{core}{self._nonce}R{number}x{after}"

    def strip(self, marked: str) -> str:
        """Remove all marks."""
        return self._pattern.sub("", marked)

    def spans(self, marked: str) -> list[tuple[int, int]]:
        """Return the spans of marked texts in the text without marks.

        Of a text that lost a mark, the template dropped a part: the rest is as long as it agrees.
        """
        text, removed = self.strip(marked), 0
        spans: list[tuple[int, int]] = []
        starts: dict[int, int] = {}
        for match in self._pattern.finditer(marked):
            at, number = match.start() - removed, int(match[2])
            removed += len(match[0])
            if match[1] == "L":
                starts[number] = at
            elif number in starts:
                spans.append((starts.pop(number), at))
            else:
                core = self._texts[number]
                same = shared_prefix([core[::-1], text[max(0, at - len(core)) : at][::-1]])
                spans.append((at - len(same), at))
        for number, at in starts.items():
            core = self._texts[number]
            spans.append((at, at + len(shared_prefix([core, text[at : at + len(core)]]))))
        return spans


def _found(text: str, suspects: list[str]) -> list[tuple[int, int]]:
    """Return where texts are, for a template that writes them otherwise if they are marked."""
    spans = []
    for suspect in suspects:
        escaped = json.dumps(suspect, ensure_ascii=False)[1:-1]
        forms = {form for form in (suspect, escaped) if form in text}
        if not forms:
            raise InvalidInputError(
                "the chat template changes a text that contains control tokens, so they cannot be"
                " told from its own; remove them from the text, or use raw text instead"
            )
        spans += [(m.start(), m.end()) for f in forms for m in re.finditer(re.escape(f), text)]
    return spans


def _merged(spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return spans sorted, with those that overlap or touch joined."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _leaves(value: Any) -> Iterator[str]:
    """Yield every str in messages or arguments, names of fields too, roles aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            if key != "role":
                yield from _leaves(item)
