"""How a model's chat template writes calls of tools: it is asked to write some, and read."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import Any

from star_attention.errors import InvalidInputError
from star_attention.hf.text.argument_calls import ArgumentForm
from star_attention.hf.text.calls import CallForm
from star_attention.hf.text.endings import has_channels
from star_attention.hf.text.json_values import decoded
from star_attention.hf.text.template import ChatTemplate, reads

Form = CallForm | ArgumentForm

_NAME, _OTHER_NAME, _KEY, _VALUE = "probe_tool", "probe_other", "probe_key", "probe_value"
_ARGUMENTS = {"probe_key": "probe_value", "another_key": "another_value"}
_ANSWER = "\u2063star-attention-answer\u2063"


def call_form(tokenizer: Any) -> Form | None:
    """Return how a tokenizer's chat template writes calls.

    None for a form that is not known, and for a template without tools.
    """
    if not reads(tokenizer, "tools"):
        return None
    return _form(tokenizer, str(tokenizer.chat_template), len(tokenizer))


@functools.lru_cache(maxsize=8)
def _form(tokenizer: Any, source: str, vocab_size: int) -> Form | None:
    """Return what `call_form` does, of a tokenizer in a given state."""
    if has_channels(tokenizer) and "<|channel|>" in source:
        return CallForm(in_channels=True)
    written = _written(tokenizer, {_NAME: {_KEY: _VALUE}})
    return (
        _of_object(tokenizer, written) or _of_name(tokenizer, written) or _of_arguments(tokenizer)
    )


def _written(tokenizer: Any, calls: dict[str, dict[str, str]]) -> str:
    """Return what a template writes from the first of some calls on; "" where it takes none."""
    made = [
        {"type": "function", "id": f"call1234{n}", "function": {"name": name, "arguments": each}}
        for n, (name, each) in enumerate(calls.items())
    ]
    user = {"role": "user", "content": "Hi"}
    results = [
        {"role": "tool", "name": name, "tool_call_id": call["id"], "content": "Hi"}
        for name, call in zip(calls, made, strict=True)
    ]
    template = ChatTemplate(tokenizer)
    try:
        called = template.render(
            [user, {"role": "assistant", "content": "", "tool_calls": made}, *results]
        )
        said = template.render([user, {"role": "assistant", "content": _ANSWER}, user])
    except InvalidInputError:
        return ""
    pairs = enumerate(zip(called, said, strict=False))
    return called[next((at for at, (one, other) in pairs if one != other), 0) :]


def _of_arguments(tokenizer: Any) -> ArgumentForm | None:
    """Return the form of arguments one by one."""
    names = _NAME, _OTHER_NAME
    written = _written(tokenizer, dict.fromkeys(names, _ARGUMENTS))
    form = ArgumentForm.written(written, names, _ARGUMENTS)
    if form is None:
        return None
    return replace(
        form,
        shown=_shown(tokenizer, form.opening),
        shown_mark=_shown(tokenizer, form.mark),
        shown_after=_shown(tokenizer, form.name_end + form.before_key),
    )


def _of_object(tokenizer: Any, written: str) -> CallForm | None:
    """Return the form of a call that is one object."""
    end = written.find(_NAME)
    for start in (match.start() for match in re.finditer(r"\{", written[: max(end, 0)])):
        try:
            value, _ = decoded(written, start)
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
        value, _ = decoded(after, at)
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
