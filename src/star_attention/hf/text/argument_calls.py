"""Calls of tools whose arguments stand one by one in tags, as text (Qwen3-Coder, GLM, MiniMax)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from star_attention.hf.text.calls import ToolCall, after_reasoning, dense
from star_attention.hf.text.json_values import typed

# What is repeated gives nothing back, or ends soon: a model may write white space for ever.
_NAME, _KEY = r"([\w.:/-]++)", r"([^<>\n]{1,200}?)"
_TAG = r"<[^<>]*>"
# Before the first of several calls there may be a tag around all of them.
_CLOSING_TAGS = re.compile(r"(?:\s*</[^<>]*>)+")
_OPENING_TAGS = re.compile(r"(?:<[^<>/][^<>]*>\s*)*\Z")


@dataclass(frozen=True, kw_only=True)
class ArgumentForm:
    """How a chat template writes calls with each argument in tags.

    White space between the marks may be more or less than in the template.

    Attributes:
        opening: what it writes before the first call, up to the name.
        mark: what it writes right before each name.
        name_end: what it writes after a name.
        before_key, after_key, after_value: what it writes around an argument.
        closing: the tag that it writes after the arguments.
        end: what it writes after the arguments of a last call, with that tag.
        shown, shown_mark, shown_after: what an answer's text shows of opening and mark, and of what
            follows the name.
    """

    opening: str
    mark: str
    name_end: str
    before_key: str
    after_key: str
    after_value: str
    closing: str
    end: str
    shown: str = ""
    shown_mark: str = ""
    shown_after: str = ""

    @classmethod
    def written(
        cls, written: str, names: tuple[str, str], arguments: Mapping[str, str]
    ) -> ArgumentForm | None:
        """Return the form of two calls as a template writes them; None for another form.

        Args:
            written: what the template writes.
            names: the names of the calls.
            arguments: the two arguments of each.
        """
        (key, value), (other_key, other_value) = arguments.items()
        call = [key, value, other_key, other_value]
        parts = [names[0], *call, names[1], *call]
        between, at = [], 0
        for part in parts:
            found = written.find(part, at)
            if found < 0:
                return None
            between.append(written[at:found])
            at = found + len(part)
        before, after_name, after_key, to_key, _, to_name, *_ = between
        if "<" not in to_key or to_key.startswith('"'):
            return None
        after_value, before_key = _at_last_tag(to_key)
        name_end = after_name.removesuffix(before_key)
        ends = after_value.lstrip().startswith("<") and to_name.startswith(after_value.rstrip())
        rest = to_name[len(after_value.rstrip()) :] if ends else ""
        closing = re.match(rf"\s*({_TAG})", rest)
        if closing is None or name_end == after_name or "<" not in rest[closing.end() :]:
            return None
        mark = _at_last_tag(rest)[1]
        if not before.endswith(mark):
            return None
        around = _OPENING_TAGS.search(before.removesuffix(mark))
        end = _CLOSING_TAGS.match(written, at + len(after_value.rstrip()))
        return cls(
            opening=(around[0] if around else "") + mark,
            mark=mark,
            name_end=name_end,
            before_key=before_key,
            after_key=after_key,
            after_value=after_value,
            closing=closing[1],
            end=(end[0] if end else closing[1]).lstrip(),
        )

    def calls_in(
        self, text: str, tools: Mapping[str, Any], *, has_reasoning: bool = False
    ) -> list[ToolCall]:
        """Return the calls in an answer, with arguments of the types that the tools take.

        Args:
            text: the answer with its special tokens.
            tools: JSON schemas of the tools' arguments, by name.
            has_reasoning: True if the answer begins with reasoning.
        """
        text = after_reasoning(text, has_reasoning)
        calls: list[ToolCall] = []
        at = 0
        while (head := self._head.search(text, at)) is not None:
            texts, at = self._arguments(text, head.end())
            if at < 0:
                break
            schema = tools.get(head[1])
            properties = schema.get("properties") if isinstance(schema, dict) else None
            properties = properties if isinstance(properties, dict) else {}
            arguments = {
                key: typed(value, properties.get(key), schema) for key, value in texts.items()
            }
            calls.append(ToolCall(name=head[1], arguments=arguments))
        return calls

    def beginnings(self, tools: Collection[str]) -> list[str]:
        """Return what a call begins with in an answer's text, without white space.

        Args:
            tools: names of the tools.
        """
        if not self.shown_mark:
            return [dense(f"{self.shown}{name}{self.shown_after}") for name in tools]
        # A model may leave out the tag around its calls.
        return list(dict.fromkeys((dense(self.shown), dense(self.shown_mark))))

    def _arguments(self, text: str, at: int) -> tuple[dict[str, str], int]:
        """Return the arguments at a place, and where the call ends; -1 for one that does not."""
        found: dict[str, str] = {}
        while (match := self._argument.match(text, at)) is not None:
            value = match[2].removeprefix(self._space_before)
            found[match[1].strip()] = value.removesuffix(self._space_after)
            at = match.end()
        end = self._end.match(text, at)
        return found, -1 if end is None else end.end()

    @cached_property
    def _head(self) -> re.Pattern[str]:
        follows = rf"(?=\s*+(?:{_spaced(self.before_key)}|{_spaced(self.closing)}))"
        return re.compile(rf"{_spaced(self.mark)}\s*+{_NAME}\s*+{_spaced(self.name_end)}{follows}")

    @cached_property
    def _argument(self) -> re.Pattern[str]:
        key, value = _spaced(self.before_key), _spaced(self.after_value)
        # A value may hold the tag that ends it: it counts before another argument and at the end.
        follows = rf"(?=\s*+(?:{key}|{_spaced(self.closing)}))"
        return re.compile(
            rf"\s*+{key}\s*+{_KEY}\s*+{_spaced(self.after_key)}(.*?){value}{follows}", re.DOTALL
        )

    @cached_property
    def _end(self) -> re.Pattern[str]:
        return re.compile(rf"\s*+{_spaced(self.closing)}")

    @property
    def _space_before(self) -> str:
        return self.after_key[len(self.after_key.rstrip()) :]

    @property
    def _space_after(self) -> str:
        return self.after_value[: len(self.after_value) - len(self.after_value.lstrip())]


def _at_last_tag(text: str) -> tuple[str, str]:
    """Return what stands before the last tag of a text, and that with what follows."""
    at = text.rindex("<")
    return text[:at], text[at:]


def _spaced(text: str) -> str:
    """Return a pattern of a text, with any white space where it has some inside."""
    return r"\s*+".join(map(re.escape, text.split()))
