"""A model's chat template: what it takes, and what it writes for a conversation."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

from star_attention.errors import InvalidInputError, first_line, quote
from star_attention.hf.text import tool_calls
from star_attention.hf.text.messages import Message, parts, plain, texts
from star_attention.hf.text.rendered import shared_prefix

PROBES = ("Ax7q", "Zk3v")
"""Stand-ins for users' texts, which no template changes; their first characters differ."""

_SET_BY_US = (
    "conversation",
    "messages",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "sanitize_control_tokens",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)
_WORD = re.compile(r"(?<![/_A-Za-z0-9])[A-Za-z0-9]+")
"""Words, but not those of a switch that templates read and leave out (`/no_think`)."""
_SEARCHED = 4000
"""Characters at the start of a message that are searched for a word to recognize it by."""
_LEAST_BEGINNING = 6
"""Characters of plain text from which on a prompt's beginning is unlikely to be a user's own."""


class ChatTemplate:
    """A tokenizer's chat template with its arguments for one conversation.

    Args:
        tokenizer: a transformers tokenizer.
        kwargs: what the template reads beside messages: tools, documents, enable_thinking, ...

    Attributes:
        tokenizer: the tokenizer.
        kwargs: the arguments as JSON values.

    Raises:
        InvalidInputError: there is no template, or it does not read an argument.
    """

    def __init__(self, tokenizer: Any, kwargs: dict[str, Any] | None = None) -> None:
        check_template(tokenizer)
        self.tokenizer = tokenizer
        self.kwargs = _checked_kwargs(tokenizer, kwargs)
        self._takes: dict[str, bool] = {}

    def with_kwargs(self, kwargs: dict[str, Any]) -> ChatTemplate:
        """Return the same template with other values of the same arguments."""
        other = copy.copy(self)
        other.kwargs = kwargs
        return other

    def render(self, messages: list[Message]) -> str:
        """Return the prompt of a conversation, up to where the model's answer begins.

        That is after the template's start of an answer, or after a last message of the assistant,
        which the answer continues.

        Raises:
            InvalidInputError: the template does not take these messages.
        """
        adapted = self.adapted(messages)
        try:
            return self._apply(adapted)
        except Exception as error:
            # A template may raise anything for messages that it does not accept.
            failure = error
        # Templates that join strings fail where a message of tool calls has no content.
        with_content = [{"content": "", **message} for message in adapted]
        if with_content != adapted:
            try:
                return self._apply(with_content)
            except Exception as error:
                failure = error
        # Not chained: the traceback would print whole messages.
        raise self._rejection(failure, messages) from None

    def adapted(self, messages: list[Message]) -> list[Message]:
        """Return messages with contents and tool calls in the forms that the template takes."""
        return [self._adapted(message) for message in messages]

    def takes_parts(self, role: str = "user") -> bool:
        """True if the template writes the parts of a message, and not a Python list of them."""
        if role not in self._takes:
            content = [part for probe in PROBES for part in parts(probe)]
            self._takes[role] = self._writes(_around({"role": role, "content": content}), PROBES)
        return self._takes[role]

    def takes_strings(self) -> bool:
        """False if the template writes the text of a message only where it is a list of parts."""
        if "" not in self._takes:
            probe = [{"role": "user", "content": PROBES[0]}]
            self._takes[""] = self._writes(probe, PROBES[:1]) or not self.takes_parts()
        return self._takes[""]

    def takes_arguments(self, form: type) -> bool:
        """True if the template writes the arguments of tool calls given as a dict, or as a str."""
        key = f"arguments: {form.__name__}"
        if key not in self._takes:
            name, value = PROBES
            arguments = {name: value} if form is dict else f'{{"{name}": "{value}"}}'
            probe = _around({"role": "tool", "content": "Hi"}, arguments)
            try:
                text = self._apply(probe)
            except Exception:
                # A template may raise anything for arguments that it cannot write.
                text = ""
            self._takes[key] = tool_calls.is_written(text, name, value)
        return self._takes[key]

    def separates_parts(self) -> bool:
        """True if the template puts a control token between the parts of a user message."""
        if not self.takes_parts():
            return False
        content = [part for probe in PROBES for part in parts(probe)]
        text = self.render([{"role": "user", "content": content}])
        between = text.partition(PROBES[0])[2].partition(PROBES[1])[0]
        return any(token in between for token in self.tokenizer.get_added_vocab() if token.strip())

    def beginnings(self) -> set[str]:
        """Return what its prompts begin with: control tokens, and texts of some length."""
        control_tokens = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        found = set()
        for role in ("user", "system"):
            probes = [_around({"role": role, "content": probe}) for probe in PROBES]
            try:
                head = shared_prefix([self.render(messages) for messages in probes]).lstrip()
            except InvalidInputError:
                continue
            while token := next(filter(head.startswith, control_tokens), None):
                found.add(token)
                head = head[len(token) :].lstrip()
            if len(head.strip()) >= _LEAST_BEGINNING:
                found.add(head.strip())
        return found

    def _writes(self, messages: list[Message], words: tuple[str, ...]) -> bool:
        try:
            text = self._apply(messages)
        except Exception:
            # A template may raise anything for content that it does not know.
            return False
        return all(word in text for word in words) and "'text'" not in text and '"text"' not in text

    def _adapted(self, message: Message) -> Message:
        message = tool_calls.with_arguments(message, self.takes_arguments)
        content = message.get("content")
        if isinstance(content, list) and not self.takes_parts(message["role"]):
            return {**message, "content": "".join(texts(message))}
        if isinstance(content, str) and not self.takes_strings():
            return {**message, "content": parts(content)}
        return message

    def _rejection(self, failure: Exception, messages: list[Message]) -> InvalidInputError:
        """Return the error for messages that the template rejects, which names one at fault."""
        rejected, remedy = "these messages", "change them, or use raw text instead"
        for number, message in enumerate(messages, start=1):
            role = message["role"]
            if tool_calls.has_odd_arguments(message):
                rejected = f"the tool calls of message {number}, whose arguments are no JSON object"
                remedy = 'give arguments such as {"city": "Paris"}'
                break
            probe = _around({"role": role, "content": PROBES[0]})
            if role not in ("user", "assistant") and not self._writes(probe, PROBES[:1]):
                rejected = f"message {number} (role {quote(role)})"
                remedy = "give it another role, or put its text into a user message"
                break
        return InvalidInputError(
            f"the chat template rejects {rejected}: {_reason(failure, messages)}; {remedy}"
        )

    def _apply(self, messages: list[Message]) -> str:
        is_prefilled = messages[-1]["role"] == "assistant"
        text: str = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not is_prefilled,
            continue_final_message=is_prefilled,
            **self.kwargs,
        )
        return text


def check_template(tokenizer: Any) -> None:
    """Raise `InvalidInputError` if there is no chat template to use."""
    if tokenizer is None:
        raise InvalidInputError(
            "chat messages need a tokenizer; give one to StarLLM, or use token ids"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInputError(
            "this model has no chat template; use raw text, or set tokenizer.chat_template"
        )


def check_unused(name: str, kwargs: dict[str, Any] | None) -> None:
    """Raise `InvalidInputError` for arguments where no template is rendered."""
    check_kwargs(kwargs)
    if kwargs:
        given = "tools" if [*kwargs] == ["tools"] else f"chat_template_kwargs {quote([*kwargs])}"
        raise InvalidInputError(
            f"{given} have no effect, because the {name} is not rendered by a chat template; give"
            " chat messages, or leave them out"
        )


def check_written(text: str, messages: list[Message], *, first: int = 1) -> None:
    """Refuse messages that a template leaves out.

    Args:
        text: the rendered text.
        messages: those that must be in it.
        first: the number of the first of them.

    Raises:
        InvalidInputError: a message or its tool calls are not in the text.
    """
    for index, what in left_out(text, messages):
        where = f"message {first + index} (role {quote(messages[index]['role'])})"
        if what == "tool_calls":
            raise InvalidInputError(
                f"the chat template does not write the tool_calls of {where}; write them into its"
                " content, or use a template for tools"
            )
        if messages[index]["role"] == "user":
            raise InvalidInputError(
                "the chat template does not render the user's text exactly once and unchanged"
                f" ({where}); use raw text instead"
            )
        raise InvalidInputError(
            f"the chat template leaves out {where}; give it another role, or put its text into a"
            " user message"
        )


def left_out(text: str, messages: list[Message]) -> list[tuple[int, str]]:
    """Return the messages that are not in a rendered text: their index, and what is missing."""
    missing = []
    for index, message in enumerate(messages):
        calls = message.get("tool_calls", [])
        if not all(call.get("function", call).get("name", "") in text for call in calls):
            missing.append((index, "tool_calls"))
        # What an assistant thought is left out of earlier turns on purpose.
        if message["role"] != "assistant" and not all(word in text for word in _words(message)):
            missing.append((index, "content"))
    return missing


def _words(message: Message) -> list[str]:
    """Return the longest word at the start of each text; of ASCII, which JSON does not escape."""
    found = [_WORD.findall(text[:_SEARCHED]) for text in texts(message)]
    return [max(words, key=len) for words in found if words]


def _around(message: Message, arguments: dict[str, Any] | str | None = None) -> list[Message]:
    """Return a short conversation with a message of any role in it.

    Args:
        message: the message.
        arguments: those of the tool call before a tool's result.
    """
    user = {"role": "user", "content": "Hi"}
    if message["role"] == "user":
        return [message]
    if message["role"] == "assistant":
        return [user, message, user]
    if message["role"] in ("system", "developer"):
        return [message, user]
    function = {"name": "f", "arguments": {} if arguments is None else arguments}
    call = {"type": "function", "id": "call12345", "function": function}
    return [
        user,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"name": "f", "tool_call_id": "call12345", **message},
    ]


def reads(tokenizer: Any, name: str) -> bool:
    """True if a tokenizer's chat template reads an argument of this name."""
    template = getattr(tokenizer, "chat_template", None)
    return isinstance(template, str) and name in _names_in(template)


@functools.lru_cache(maxsize=8)
def _names_in(source: str) -> frozenset[str]:
    """Return the names that a template reads."""
    # Slow to import, and not needed without arguments.
    from jinja2 import Environment

    return frozenset(text for _, kind, text in Environment().lex(source) if kind == "name")


def check_kwargs(kwargs: Any) -> None:
    """Raise `InvalidInputError` for `chat_template_kwargs` that are no dict."""
    if not isinstance(kwargs, (dict, type(None))):
        raise InvalidInputError(
            f"chat_template_kwargs: expected a dict, got {type(kwargs).__name__}; for example"
            ' {"enable_thinking": False}'
        )


def _checked_kwargs(tokenizer: Any, kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Return arguments as JSON values; functions among the tools become their schemas."""
    check_kwargs(kwargs)
    kwargs = dict(kwargs or {})
    if not kwargs:
        return kwargs
    if isinstance(kwargs.get("tools"), (list, tuple)):
        from transformers.utils import get_json_schema

        kwargs["tools"] = [
            get_json_schema(tool) if callable(tool) else tool for tool in kwargs["tools"]
        ]
    kwargs = {
        name: plain(value, f"chat_template_kwargs {quote(name)}") for name, value in kwargs.items()
    }
    try:
        source = tokenizer.get_chat_template(kwargs.get("chat_template"), kwargs.get("tools"))
    except ValueError as error:
        raise InvalidInputError(
            f"the chat template cannot be chosen: {first_line(error)}"
        ) from None
    read = _names_in(source)
    for name, value in kwargs.items():
        if name in _SET_BY_US:
            raise InvalidInputError(
                f"chat_template_kwargs has {quote(name)}, which is set by the library; leave it out"
            )
        if name != "chat_template" and value is not None and name not in read:
            raise InvalidInputError(
                f"the chat template does not read {quote(name)}, one of the chat_template_kwargs;"
                " check its spelling, or leave it out"
            )
    return kwargs


def _reason(error: Exception, messages: list[Message]) -> str:
    """Return why a template failed, without the text of a message."""
    line = first_line(error)
    if any(text[:40] in line for message in messages for text in texts(message) if len(text) > 40):
        return quote(line)
    return line[:300]
