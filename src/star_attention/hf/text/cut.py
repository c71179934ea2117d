"""Where a chat template's prompt is cut: after what it writes alike before different queries."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from star_attention.errors import InvalidInputError, quote
from star_attention.hf.text import literal
from star_attention.hf.text.conversation import ChatContext, joined, longer
from star_attention.hf.text.messages import Message, parts
from star_attention.hf.text.rendered import RenderedText, shared_prefix
from star_attention.hf.text.template import PROBES, ChatTemplate, check_written, left_out
from star_attention.hf.text.tool_reader import functions_of

_INSTRUCTIONS = ("system", "developer")
_ATTEMPTS = 3
"""Renderings of one prompt, in case a template's clock moves on between two of them."""


def shared_head(template: ChatTemplate, chat: ChatContext) -> RenderedText:
    """Return what the template writes before any query.

    Raises:
        InvalidInputError: the template leaves a message out, or nothing can follow the messages.
    """
    head: RenderedText | None = None
    failure = None
    for conversations in _continued(template, chat):
        try:
            shared = _shared(template, conversations, chat.messages)
        except InvalidInputError as error:
            failure = failure or error
            continue
        if head is None:
            head = shared
            continue
        both = shared_prefix([head.text, shared.text])
        # A way to go on that writes the messages otherwise is refused when it is taken.
        if left_out(both, chat.messages) == left_out(head.text, chat.messages):
            head = head.slice(0, len(both))
    if head is None:
        assert failure is not None, "there are ways to go on"
        raise failure
    return head


def _shared(
    template: ChatTemplate, conversations: list[list[Message]], messages: list[Message]
) -> RenderedText:
    """Return what conversations have in common, which the texts of all messages are part of.

    Raises:
        InvalidInputError: the template leaves a message out, or writes it too late.
    """
    for _ in range(_ATTEMPTS):
        rendered = [literal.render(template, conversation) for conversation in conversations]
        check_written(rendered[0].text, messages)
        shared = shared_prefix(text.text for text in rendered)
        if not all(any(probe in text.text[len(shared) :] for probe in PROBES) for text in rendered):
            raise InvalidInputError(
                "the chat template does not render the user's text exactly once and unchanged; use"
                " raw text instead"
            )
        # A clock may have moved on, or a system message come after the question.
        late = [index for index, _ in left_out(shared, messages)]
        if all(messages[index]["role"] in _INSTRUCTIONS for index in late):
            return rendered[0].slice(0, len(shared))
    raise InvalidInputError(
        f"the chat template writes message {late[0] + 1} (role"
        f" {quote(messages[late[0]]['role'])}) after the query, so that it cannot be encoded"
        " before; use raw text instead"
    )


def _continued(template: ChatTemplate, chat: ChatContext) -> Iterator[list[list[Message]]]:
    """Yield ways to go on after the context, the most likely one first, with different texts."""
    last = chat.messages[-1]
    calls = last.get("tool_calls")
    if last["role"] == "tool":
        # The answer follows. The cut leaves it the end of the turn, so that it has a prompt.
        yield [longer(chat, probe).messages for probe in PROBES]
    if last["role"] == "tool" or calls:
        ids = {key: last[key] for key in ("name", "tool_call_id") if key in last}
        if calls:
            name = calls[0].get("function", calls[0]).get("name")
            ids = {"name": name, "tool_call_id": calls[0].get("id")}
        result: Message = {"role": "tool", **{key: ids[key] for key in ids if ids[key] is not None}}
        yield [[*chat.messages, {**result, "content": probe}] for probe in PROBES]
    questions = [joined(chat, [{"role": "user", "content": probe}]) for probe in PROBES]
    if chat.parts:
        # The last part itself may be longer.
        extension = longer(chat, PROBES[0])
        questions.append(joined(extension, [{"role": "user", "content": PROBES[1]}]))
    elif not chat.open and template.separates_parts():
        in_parts = [part for probe in PROBES for part in parts(probe)]
        questions.append([*chat.messages, {"role": "user", "content": in_parts}])
    yield questions


def moved(
    stored: ChatTemplate,
    template: ChatTemplate,
    chat: ChatContext,
    conversation: list[Message],
    warned: set[str],
) -> tuple[RenderedText, int]:
    """Return a prompt that does not begin with the encoded text, and where its tail begins.

    Raises:
        InvalidInputError: the tail would not be the rest of this conversation's prompt.
    """
    for _ in range(_ATTEMPTS):
        now, whole = shared_head(stored, chat).text, literal.render(template, conversation)
        if whole.text.startswith(now):
            if "template" not in warned:
                warned.add("template")
                warnings.warn(
                    "the chat template renders the context differently now than when it was encoded"
                    " (a date, or another template); the answer continues what was encoded",
                    stacklevel=4,
                )
            return whole, len(now)
    names = [name for name in template.kwargs if template.kwargs[name] != stored.kwargs.get(name)]
    if names and shared_head(template, chat).text != now:
        if names == ["tools"]:
            raise _other_tools(stored, template)
        raise InvalidInputError(
            f"chat_template_kwargs {quote(names)} change the encoded part of the prompt; encode"
            " the context with them"
        )
    raise InvalidInputError(
        "the chat template writes the encoded messages differently before the messages of this"
        f" query (it has {_differing(whole.text, now)}); encode the conversation up to its last"
        " question, and ask that alone"
    )


def _other_tools(stored: ChatTemplate, template: ChatTemplate) -> InvalidInputError:
    """Return the error for tools that are not those of the encoded context."""
    own, other = (
        [function["name"] for function in functions_of(each.kwargs.get("tools") or ())]
        for each in (stored, template)
    )
    encoded = f"with {quote(own)}" if own else "without any"
    if own == other:
        encoded += ", of other descriptions or parameters"
    return InvalidInputError(
        f"the tools {quote(other)} change the encoded part of the prompt, because the context was"
        f" encoded {encoded}; give these tools to encode, or leave them out here"
    )


def _differing(text: str, expected: str) -> str:
    """Describe where two texts differ first."""
    at = len(shared_prefix([text, expected]))
    return f"{quote(text[at : at + 40])} where {quote(expected[at : at + 40])} was encoded"
