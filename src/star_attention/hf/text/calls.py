"""Calls of tools in an answer, found by how the model's chat template writes them.

A template is asked to write a call, and what it writes tells the form. Three are read: a JSON
object with name and arguments (Llama, Qwen, Mistral), a name before a JSON object of arguments
(newer Mistral, DeepSeek, Kimi), and messages in channels (gpt-oss).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from star_attention.errors import InvalidInputError
from star_attention.hf.text.endings import has_channels
from star_attention.hf.text.reasoning import TAGS
from star_attention.hf.text.template import ChatTemplate, reads

_NAME, _KEY, _VALUE = "probe_tool", "probe_key", "probe_value"
_ANSWER = "\u2063star-attention-answer\u2063"
_DECODER = json.JSONDecoder(strict=False)
_SEPARATORS = re.compile(r"[\s,;]*")
_NAMES = r"([\w.-]+)"
_ARGUMENTS = ("arguments", "parameters")
_CHANNEL_CALL = re.compile(
    rf"to=functions\.{_NAMES}(?:(?!<\|message\|>).)*<\|message\|>(.*?)"
    r"(?=<\|call\|>|<\|end\|>|<\|start\|>|\Z)",
    re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        name: the tool's.
        arguments: an object of JSON values.
    """

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CallForm:
    """How a chat template writes calls.

    Attributes:
        opening: what it writes before each call, special tokens included; "" for nothing.
        shown: what an answer's text shows of that.
        name_key, arguments_key: keys of a call that is one object; "" where the name stands before
            the arguments.
        between: what it writes between name and arguments.
        shown_between: what an answer's text shows of that.
        in_channels: True for messages in channels, which the text does not show.
    """

    opening: str = ""
    shown: str = ""
    name_key: str = ""
    arguments_key: str = "arguments"
    between: str = ""
    shown_between: str = ""
    in_channels: bool = False

    @classmethod
    def of(cls, tokenizer: Any) -> CallForm | None:
        """Return a tokenizer's form; None for another one, and for a template without tools."""
        if not reads(tokenizer, "tools"):
            return None
        return _form(tokenizer, str(tokenizer.chat_template), len(tokenizer))

    def calls_in(self, text: str, tools: Collection[str]) -> list[ToolCall]:
        """Return the calls in an answer.

        Args:
            text: the answer with its special tokens.
            tools: names of the tools. Where nothing marks a call, others are none.
        """
        if self.in_channels:
            found = [(name, _object(value)) for name, value in _CHANNEL_CALL.findall(text)]
            return [ToolCall(name=name, arguments=each) for name, each in found if each is not None]
        for closing in TAGS.values():
            text = text.rpartition(closing)[2]
        before, opening, after = text.partition(self.opening) if self.opening else (text, "", "")
        if self.shown and not opening:
            return []
        # Where a template writes no mark, or the model has left it out, the name has to tell.
        rest, known = (after, None) if opening else (before, tools)
        rest = rest.lstrip()
        return self._objects(rest, known) if self.name_key else self._named(rest, known)

    def beginnings(self, tools: Collection[str]) -> list[str]:
        """Return what a call begins with in an answer's text, without white space.

        Args:
            tools: names of the tools.
        """
        if self.in_channels:
            return []
        if self.shown:
            return [_dense(self.shown)]
        if self.name_key:
            keys = dict.fromkeys((self.name_key, "type", "function"))
            return [f'{bracket}{{"{key}":' for bracket in ("", "[") for key in keys]
        return [_dense(f"{name}{self.shown_between}") + "{" for name in tools]

    def _objects(self, text: str, tools: Collection[str] | None) -> list[ToolCall]:
        calls: list[ToolCall] = []
        at = 0
        while text[at : at + 1] in ("{", "["):
            try:
                value, at = _DECODER.raw_decode(text, at)
            except ValueError:
                break
            found = [self._call(each) for each in (value if isinstance(value, list) else [value])]
            if not all(call and (tools is None or call.name in tools) for call in found):
                break
            calls += [call for call in found if call is not None]
            at = self._next(text, at)
        return calls

    def _call(self, value: Any) -> ToolCall | None:
        value = value.get("function", value) if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(value.get(self.name_key), str):
            return None
        keys = (self.arguments_key, *_ARGUMENTS)
        arguments: Any = next((value[key] for key in keys if key in value), {})
        if isinstance(arguments, str):
            arguments = _object(arguments)
        if not isinstance(arguments, dict):
            return None
        return ToolCall(name=value[self.name_key], arguments=arguments)

    def _named(self, text: str, tools: Collection[str] | None) -> list[ToolCall]:
        # Kimi counts its calls in between.
        between = re.sub(r"\d+", r"\\d+", re.escape(self.between.strip()))
        pattern = re.compile(rf"{_NAMES}\s*{between}\s*(?=\{{)")
        calls: list[ToolCall] = []
        match = pattern.match(text)
        while match and (tools is None or match[1] in tools):
            try:
                arguments, at = _DECODER.raw_decode(text, match.end())
            except ValueError:
                break
            calls.append(ToolCall(name=match[1], arguments=arguments))
            match = pattern.match(text, self._next(text, at))
        return calls

    def _next(self, text: str, at: int) -> int:
        """Return where another call may begin."""
        after = _SEPARATORS.match(text, at)
        assert after is not None, "it matches nothing, too"
        follows = text.find(self.opening, at) if self.opening else -1
        if follows < 0:
            return after.end()
        mark = follows + len(self.opening)
        return mark + len(text[mark:]) - len(text[mark:].lstrip())


class CallHolder:
    """The text of an answer that is none of its calls, while it comes.

    What may begin a call is held back, with the white space before it; from a call on, all is.

    Args:
        beginnings: what calls begin with, without white space.
        starts: True if calls are at the beginning of a text alone.
    """

    def __init__(self, beginnings: Collection[str], *, starts: bool) -> None:
        self._beginnings, self._starts = beginnings, starts
        # White space may be in between.
        self._most = 2 * max(map(len, beginnings), default=0) + 16
        self._pending, self._said, self._holds = "", False, False

    def push(self, piece: str) -> str:
        """Add a piece, and return the text that is certain."""
        text = self._pending + piece
        at = 0 if self._holds else self._first(text)
        certain = text[:at].rstrip()
        self._pending = text[len(certain) :]
        self._said = self._said or bool(certain)
        return certain

    def flush(self) -> str:
        """Return the text held back, of which nothing was a call."""
        pending, self._pending = self._pending, ""
        return pending

    def _first(self, text: str) -> int:
        """Return where a call begins, or may begin; the text's end for nowhere."""
        if self._starts and (self._said or not text.strip()):
            return len(text)
        places = range(len(text))
        if self._starts:
            places = range(len(text) - len(text.lstrip()), len(text))[:1]
        for at in places:
            if text[at].isspace():
                continue
            found = _dense(text[at : at + self._most])
            if any(found.startswith(begun) for begun in self._beginnings):
                self._holds = True
                return at
            if any(begun.startswith(found) for begun in self._beginnings):
                return at
        return len(text)


def _dense(text: str) -> str:
    return "".join(text.split())


def _object(text: str) -> dict[str, Any] | None:
    """Return the object that a text begins with; None for none. No text is no arguments."""
    if not text.strip():
        return {}
    try:
        value, _ = _DECODER.raw_decode(text.lstrip())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


@functools.lru_cache(maxsize=8)
def _form(tokenizer: Any, source: str, vocab_size: int) -> CallForm | None:
    """Return what `CallForm.of` does, of a tokenizer in a given state."""
    if has_channels(tokenizer) and "<|channel|>" in source:
        return CallForm(in_channels=True)
    function = {"name": _NAME, "arguments": {_KEY: _VALUE}}
    call = {"type": "function", "id": "call12345", "function": function}
    user = {"role": "user", "content": "Hi"}
    result = {"role": "tool", "name": _NAME, "tool_call_id": "call12345", "content": "Hi"}
    template = ChatTemplate(tokenizer)
    try:
        called = template.render(
            [user, {"role": "assistant", "content": "", "tool_calls": [call]}, result]
        )
        said = template.render([user, {"role": "assistant", "content": _ANSWER}, user])
    except InvalidInputError:
        return None
    pairs = enumerate(zip(called, said, strict=False))
    written = called[next((at for at, (one, other) in pairs if one != other), 0) :]
    return _of_object(tokenizer, written) or _of_name(tokenizer, written)


def _of_object(tokenizer: Any, written: str) -> CallForm | None:
    """Return the form of a call that is one object."""
    end = written.find(_NAME)
    for start in (match.start() for match in re.finditer(r"\{", written[: max(end, 0)])):
        try:
            value, _ = _DECODER.raw_decode(written, start)
        except ValueError:
            continue
        value = value.get("function", value)
        names = [key for key, each in value.items() if each == _NAME]
        arguments = [key for key, each in value.items() if _KEY in str(each)]
        if names and arguments:
            opening = written[:start].rstrip().removesuffix("[").strip()
            return CallForm(
                opening=opening,
                shown=_shown(tokenizer, opening),
                name_key=names[0],
                arguments_key=arguments[0],
            )
    return None


def _of_name(tokenizer: Any, written: str) -> CallForm | None:
    """Return the form of a name before its arguments."""
    before, found, after = written.partition(_NAME)
    at = after.find("{")
    if not found or at < 0:
        return None
    try:
        value, _ = _DECODER.raw_decode(after, at)
    except ValueError:
        return None
    if value != {_KEY: _VALUE}:
        return None
    # Of several marks, the last one is before each call.
    marks = [token for token in tokenizer.get_added_vocab() if token.strip() and token in before]
    starts = [before.rindex(token) for token in marks]
    opening = before[max(starts, default=0) :].strip()
    return CallForm(
        opening=opening,
        shown=_shown(tokenizer, opening),
        between=after[:at],
        shown_between=_shown(tokenizer, after[:at]),
    )


def _shown(tokenizer: Any, text: str) -> str:
    """Return what an answer's text shows of what a model writes."""
    for token, number in tokenizer.get_added_vocab().items():
        if token in text and not tokenizer.decode([number], skip_special_tokens=True):
            text = text.replace(token, "")
    return text.strip()
