"""Where a chat is cut: after its files, its marks, or what is likely to come again.

All of it in characters of the rendered chat. How these become tokens says `prompts`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.hf.text.messages import Message, texts

_MARKS = ("prompt_cache_breakpoint", "cache_control")
_INSTRUCTIONS = ("system", "developer")
_LAST_CHARACTERS = 2048
"""Characters at the end of a single text in which its question is looked for: about 512 tokens."""
_TTL = re.compile(r"(\d{1,6})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, kw_only=True)
class Document:
    """A file of a chat.

    Attributes:
        text: its text.
        name: its title or file name; None if it has none.
        file_id: id of the file that was uploaded; None for one in the message itself.
    """

    text: str
    name: str | None = None
    file_id: str | None = None


ReadFile = Callable[[dict[str, Any]], Document]
"""Returns what a message's part of type `file` has."""


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """A place in a chat that its client names.

    Attributes:
        rule: "file" or "mark".
        message, part: it comes after this part of this message.
        ttl: the least seconds to keep what is before it; None for the server's own.
    """

    rule: str
    message: int
    part: int
    ttl: float | None = None


@dataclass(frozen=True, kw_only=True)
class MarkedChat:
    """Messages without marks and files, and where these were.

    Attributes:
        messages: the messages, with the texts of files as parts.
        boundaries: where marks and files were.
        documents: the files, in their order.
    """

    messages: list[Any]
    boundaries: list[Boundary]
    documents: list[Document]


def sent_files(messages: list[Any]) -> list[dict[str, Any]]:
    """Return the files in messages that are there as data, and have to be read."""
    contents = [each.get("content") for each in messages if isinstance(each, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    files = [
        part.get("file") for part in parts if isinstance(part, dict) and part.get("type") == "file"
    ]
    return [file for file in files if isinstance(file, dict) and _is_sent(file)]


def _is_sent(file: dict[str, Any]) -> bool:
    others = (file.get("text"), file.get("file_id"))
    return isinstance(file.get("file_data"), str) and not any(isinstance(o, str) for o in others)


def unmarked(messages: list[Any], read_file: ReadFile) -> MarkedChat:
    """Take the marks out of messages, and put the texts of files in their place."""
    boundaries: list[Boundary] = []
    documents: list[Document] = []

    def read(part: dict[str, Any]) -> str:
        documents.append(read_file(part))
        return documents[-1].text

    plain = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            plain.append(message)
            continue
        marks = {name: message[name] for name in _MARKS if name in message}
        message = {key: value for key, value in message.items() if key not in _MARKS}
        content = message.get("content")
        if isinstance(content, list):
            parts: list[Any] = []
            message["content"] = parts
            for part in content:
                own, found = _unmarked_part(part, number, len(parts), read)
                parts.append(own)
                boundaries += found
        last = len(content) - 1 if isinstance(content, list) else 0
        boundaries += [
            Boundary(rule="mark", message=number, part=last, ttl=ttl_of(mark))
            for mark in marks.values()
            if mark
        ]
        plain.append(message)
    return MarkedChat(messages=plain, boundaries=boundaries, documents=documents)


def _unmarked_part(
    part: Any, message: int, number: int, file_text: Callable[[dict[str, Any]], str]
) -> tuple[Any, list[Boundary]]:
    if not isinstance(part, dict):
        return part, []
    found = [
        Boundary(rule="mark", message=message, part=number, ttl=ttl_of(part[name]))
        for name in _MARKS
        if part.get(name)
    ]
    part = {key: value for key, value in part.items() if key not in _MARKS}
    if part.get("type") == "file":
        part = {"type": "text", "text": file_text(part)}
        ttl = max((mark.ttl for mark in found if mark.ttl is not None), default=None)
        found.append(Boundary(rule="file", message=message, part=number, ttl=ttl))
    return part, found


def ttl_of(mark: Any) -> float | None:
    """Return the seconds of a mark's `ttl`, such as "30m"; None if it has none."""
    ttl = mark.get("ttl") if isinstance(mark, dict) else None
    if ttl is None:
        return None
    match = _TTL.fullmatch(ttl) if isinstance(ttl, str) else None
    if match is None:
        raise InvalidInputError(
            f"ttl of a mark: expected a time such as 30m or 1h, got {quote(ttl)}"
        )
    return float(int(match[1]) * _SECONDS[match[2]])


def for_template(messages: list[Message], template: str) -> list[Message]:
    """Return messages with roles that a template knows."""
    if "developer" in template:
        return messages
    return [
        {**message, "role": "system"} if message["role"] == "developer" else message
        for message in messages
    ]


def instructions_first(messages: list[Message]) -> list[Message]:
    """Return messages whose instructions are one message at the beginning."""
    first = [message for message in messages if message["role"] in _INSTRUCTIONS]
    others = [message for message in messages if message["role"] not in _INSTRUCTIONS]
    joined = "\n\n".join("".join(texts(message)) for message in first)
    return [{"role": "system", "content": joined}, *others] if first else others


def ends_of_parts(rendered: str, messages: list[Message]) -> dict[tuple[int, int], int]:
    """Return where the texts of messages end in a rendered chat, by message and part.

    A text that the template has changed, but for white space around it, is left out.
    """
    ends: dict[tuple[int, int], int] = {}
    at = 0
    for number, message in enumerate(messages):
        for part, text in enumerate(texts(message)):
            for form in (text, text.rstrip(), text.strip()):
                start = rendered.find(form, at) if form else -1
                if start >= 0:
                    at = ends[number, part] = start + len(form)
                    break
    return ends


def named_cut(
    ends: dict[tuple[int, int], int], boundaries: list[Boundary], messages: list[Message]
) -> tuple[int, Boundary] | None:
    """Return the character after the last file, or else after the last mark, before a question.

    A place with no text after it but instructions leaves no question, and does not count.
    """
    said = [place for place in ends if messages[place[0]]["role"] not in _INSTRUCTIONS]
    last = max(said or ends, default=(-1, -1))
    for rule in ("file", "mark"):
        for boundary in sorted(
            boundaries, key=lambda boundary: (boundary.message, boundary.part), reverse=True
        ):
            place = boundary.message, boundary.part
            if boundary.rule == rule and place in ends and place < last:
                return ends[place], boundary
    return None


def after_tools(
    rendered: str, ends: dict[tuple[int, int], int], messages: list[Message], boundary: Boundary
) -> int:
    """Return the character after a place and, if it ends the instructions, after the tools.

    Some chat templates write the tools of a request behind its instructions, where clients that
    mark these mean both.
    """
    place = boundary.message, boundary.part
    following = min((each for each in ends if each > place), default=None)
    is_instruction = messages[place[0]]["role"] in _INSTRUCTIONS
    if following is None or not is_instruction or following[0] == place[0]:
        return ends[place]
    text, end = texts(messages[following[0]])[following[1]], ends[following]
    forms = (text, text.rstrip(), text.strip())
    return next(end - len(form) for form in forms if rendered.startswith(form, end - len(form)))


def likely_cut(
    rendered: str, ends: dict[tuple[int, int], int], messages: list[Message]
) -> int | None:
    """Return the character before the last question of a chat, as far as it can be told.

    That is before the last part of the last user message; in a message of one text, after its last
    line break near its end, or before the message.
    """
    users = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        return None
    last = users[-1]
    parts = texts(messages[last])
    if len(parts) > 1:
        return ends.get((last, len(parts) - 2))
    end = ends.get((last, 0))
    if end is not None and parts:
        start = end - len(parts[0].strip())
        line = line_break(rendered[start:end])
        if line:
            return start + line
    before = [place for place in ends if place[0] < last]
    return ends[max(before)] if before else None


def learned_cut(text: str, shared: int, at: int) -> int | None:
    """Return where a text is better cut than at its likely place, by what it shares with another.

    The other was cut at its own likely place, and has another text there: a question of several
    lines, most often. What they share, up to a line or a word, is likely to come again.

    Args:
        text: the text.
        shared: characters that both begin alike with.
        at: the likely place.

    Returns:
        The character to cut before; None where the likely place is as good, or far away: what is in
        between would be read with every question.
    """
    if shared >= at:
        return None
    near = max(0, shared - _LAST_CHARACTERS)
    place = text.rfind("\n", near, shared) + 1 or text.rfind(" ", near, shared) + 1
    return place if place and at - place <= _LAST_CHARACTERS else None


def line_break(text: str) -> int:
    """Return the character after the last line break near the end of a text; 0 for none.

    What follows it has more than white space.
    """
    body = len(text.rstrip())
    return text.rfind("\n", max(0, body - _LAST_CHARACTERS), body) + 1
