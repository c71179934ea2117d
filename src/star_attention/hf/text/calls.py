"""Calls of tools in an answer whose arguments are a JSON object, and what holds calls back.

Three forms are read: a JSON object with name and arguments (Llama, Qwen, Mistral), a name before a
JSON object of arguments (newer Mistral, DeepSeek, Kimi), and messages in channels (gpt-oss).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from star_attention.hf.text.json_values import decoded
from star_attention.hf.text.reasoning import TAGS

_SEPARATORS = re.compile(r"[\s,;]*")
_NAMES = r"([\w.-]+)"
_ARGUMENTS = ("arguments", "parameters")
_CHANNEL_CALL = re.compile(
    rf"to=functions\.{_NAMES}(?:(?!<\|message\|>).){{0,200}}<\|message\|>(.*?)"
    r"(?=<\|call\|>|<\|end\|>|<\|start\|>|\Z)",
    re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        name: the tool's.
        arguments: an object of JSON values.
        id: tells the calls of an answer apart.
    """

    name: str
    arguments: dict[str, Any]
    id: str = field(default="", compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the call in the form of a chat message's `tool_calls`."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


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

    def calls_in(
        self, text: str, tools: Mapping[str, Any], *, has_reasoning: bool = False
    ) -> list[ToolCall]:
        """Return the calls in an answer.

        Args:
            text: the answer with its special tokens.
            tools: JSON schemas of the tools' arguments, by name. Where nothing marks a call, other
                names are none.
            has_reasoning: True if the answer begins with reasoning.
        """
        if self.in_channels:
            found = [(name, _object(value)) for name, value in _CHANNEL_CALL.findall(text)]
            return [ToolCall(name=name, arguments=each) for name, each in found if each is not None]
        text = after_reasoning(text, has_reasoning)
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
            return [dense(self.shown)]
        if self.name_key:
            keys = dict.fromkeys((self.name_key, "type", "function"))
            return [f'{bracket}{{"{key}":' for bracket in ("", "[") for key in keys]
        return [dense(f"{name}{self.shown_between}") + "{" for name in tools]

    def _objects(self, text: str, tools: Collection[str] | None) -> list[ToolCall]:
        calls: list[ToolCall] = []
        at = 0
        while text[at : at + 1] in ("{", "["):
            try:
                value, at = decoded(text, at)
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
        pattern = re.compile(rf"{_NAMES}\s*+{between}\s*+(?=\{{)")
        calls: list[ToolCall] = []
        match = pattern.match(text)
        while match and (tools is None or match[1] in tools):
            try:
                arguments, at = decoded(text, match.end())
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
            found = dense(text[at : at + self._most])
            if any(found.startswith(begun) for begun in self._beginnings):
                self._holds = True
                return at
            if any(begun.startswith(found) for begun in self._beginnings):
                return at
        return len(text)


def after_reasoning(text: str, has_reasoning: bool) -> str:
    """Return what follows the reasoning that an answer begins with.

    An argument may hold a closing tag, too: without reasoning none is looked for.

    Args:
        text: the answer with its special tokens.
        has_reasoning: True if there is reasoning, also where the prompt has opened it.
    """
    begun = text.lstrip()
    for opening, closing in TAGS.items():
        if begun.startswith((opening, closing)) or (has_reasoning and closing in text):
            return text.partition(closing)[2]
    return "" if has_reasoning else text


def dense(text: str) -> str:
    """Return a text without white space."""
    return "".join(text.split())


def _object(text: str) -> dict[str, Any] | None:
    """Return the object that a text begins with; None for none. No text is no arguments."""
    if not text.strip():
        return {}
    try:
        value, _ = decoded(text.lstrip())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
