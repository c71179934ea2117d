"""The tools of a prompt, and their calls in the answers to it."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.hf.text.argument_calls import ArgumentForm
from star_attention.hf.text.call_forms import Form, call_form
from star_attention.hf.text.call_grammar import call_grammar, call_schema
from star_attention.hf.text.calls import CallHolder, ToolCall
from star_attention.hf.text.template import check_kwargs
from star_attention.hf.text.tokens import decode

_UNFORCED = ("auto", "none")
CHOICES = (*_UNFORCED, "required")
"""What a choice of tools may be, beside the name of one: any or no call, none, or one of any."""

NO_FORM = "the model's chat template takes no tools, or writes calls of them in an unknown form"
"""Why a model cannot call tools."""
_NO_FORM = f"{NO_FORM}; leave tools out, or set tokenizer.chat_template"


@dataclass(frozen=True, kw_only=True, eq=False)
class ToolReader:
    """Finds the calls of tools in answers.

    Attributes:
        form: how the model writes calls.
        schemas: JSON schemas of the tools' arguments, by name.
        tokenizer: the model's.
        forced: the functions of which an answer has to call one; empty where none has to be.
    """

    form: Form
    schemas: dict[str, Any]
    tokenizer: Any
    forced: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, tokenizer: Any, tools: Any, choice: str | None = None) -> ToolReader | None:
        """Return what finds calls of tools.

        None without tools, in an unknown form, and where none are to be called.

        Args:
            tokenizer: a transformers tokenizer, or None.
            tools: as the chat template gets them.
            choice: one of `CHOICES`, or the name of the tool to call; None for "auto".

        Raises:
            InvalidInputError: a call has to be made, and cannot.
        """
        if choice == "none":
            return None
        functions = functions_of(tools or ())
        forced = forced_of(choice, functions)
        form = call_form(tokenizer) if functions and tokenizer is not None else None
        if form is None:
            if forced:
                raise InvalidInputError(f"tool_choice {quote(choice)} does not work: {_NO_FORM}")
            return None
        return cls(form=form, schemas=schemas(functions), tokenizer=tokenizer, forced=forced)

    @property
    def is_json(self) -> bool:
        """True if an answer is a call and nothing else, as JSON whatever the model's own form."""
        return bool(self.forced) and not isinstance(self.form, ArgumentForm)

    @property
    def grammar(self) -> dict[str, Any] | None:
        """What an answer that has to be a call follows; None where none has to be one.

        Arguments in tags are forced as the template writes them, other calls as JSON.
        """
        if not self.forced:
            return None
        if isinstance(self.form, ArgumentForm):
            return call_grammar(self.form, self.forced)
        return call_schema(self.forced)

    def calls(
        self, text: str, token_ids: list[int], *, has_reasoning: bool, answer_prefix: str = ""
    ) -> tuple[ToolCall, ...]:
        """Return the calls in an answer, with ids that number them.

        Args:
            text: that of the answer.
            token_ids: those of the answer.
            has_reasoning: True if it begins with reasoning.
            answer_prefix: the text that it was made to begin with.
        """
        if self.is_json:
            found = _whole_call(text)
        else:
            written = answer_prefix + decode(self.tokenizer, token_ids, skip_special_tokens=False)
            found = self.form.calls_in(written, self.schemas, has_reasoning=has_reasoning)
        # Templates of Mistral's take ids of nine letters and digits, and no others.
        return tuple(replace(call, id=f"call{n:05}") for n, call in enumerate(found))

    def said(self, text: str, answer_prefix: str = "") -> str:
        """Return the text of an answer that has calls, without them.

        Args:
            text: that of the answer.
            answer_prefix: the text that it was made to begin with.
        """
        if self.is_json:
            return ""
        return self.holder().push(answer_prefix + text)[len(answer_prefix) :]

    def holder(self) -> CallHolder:
        """Return what holds calls back from the text of an answer."""
        if self.is_json:
            # Nothing but a call comes.
            return CallHolder(["{"], starts=True)
        beginnings = self.form.beginnings(list(self.schemas))
        return CallHolder(beginnings, starts=not self.form.opening)


def functions_of(tools: Collection[Any]) -> list[dict[str, Any]]:
    """Return the functions that tools are: dicts with `name` and `parameters`, a JSON schema.

    Args:
        tools: functions with types and docstrings, or dicts in the form of a chat.
    """
    found = []
    for tool in tools:
        if callable(tool):
            from transformers.utils import get_json_schema

            tool = get_json_schema(tool)
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            found.append(function)
    return found


def schemas(functions: Collection[dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON schemas of functions' arguments, by name."""
    return {function["name"]: function.get("parameters") for function in functions}


def is_forced(choice: str | None) -> bool:
    """True for a choice of tools that makes an answer a call."""
    return choice is not None and choice not in _UNFORCED


def forced_of(choice: str | None, functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the functions of which an answer has to call one; empty where none has to be.

    Args:
        choice: one of `CHOICES`, or a function's name; None for "auto".
        functions: dicts with `name`.

    Raises:
        InvalidInputError: there are no functions, or the choice names another one.
    """
    if not is_forced(choice):
        return []
    if not functions:
        raise InvalidInputError(
            f"tool_choice {quote(choice)} needs tools to choose from; encode chat messages with"
            " tools, or give generate some"
        )
    if choice == "required":
        return functions
    names = [function["name"] for function in functions]
    if choice not in names:
        raise InvalidInputError(no_such_tool(choice, names))
    return [function for function in functions if function["name"] == choice]


def no_such_tool(choice: Any, names: list[str]) -> str:
    """Return the message for a choice that names another tool than these."""
    return (
        f"expected a tool_choice of none, auto, required, or one of the tools {quote(names)}, got"
        f" {quote(choice)}"
    )


def _whole_call(text: str) -> list[ToolCall]:
    """Return the call that a text is; none if it was cut."""
    try:
        value = json.loads(text)
    except ValueError:
        return []
    return [ToolCall(name=value["name"], arguments=value["arguments"])]


def with_tools(
    tokenizer: Any, template_kwargs: dict[str, Any] | None, tools: Any
) -> dict[str, Any] | None:
    """Return what a chat template reads beside messages, with the tools of a context.

    Args:
        tokenizer: a transformers tokenizer, or None.
        template_kwargs: what it reads beside messages and tools.
        tools: functions with types and docstrings, or dicts in the form of a chat; None for none.

    Raises:
        InvalidInputError: tools that the model cannot call, or that come twice.
    """
    if tools is None:
        return template_kwargs
    check_tools(tokenizer, tools, template_kwargs)
    return {**(template_kwargs or {}), "tools": list(tools)}


def given_twice(places: str) -> str:
    """Return the message for tools that come in two places."""
    return f"tools are given twice, {places}; give one of them"


def check_tools(tokenizer: Any, tools: Any, template_kwargs: Any) -> None:
    """Raise `InvalidInputError` for tools that a model cannot call, or that come twice."""
    check_kwargs(template_kwargs)
    if "tools" in (template_kwargs or {}):
        raise InvalidInputError(given_twice("as tools= and in chat_template_kwargs"))
    if not isinstance(tools, (list, tuple)) or not all(
        callable(tool) or isinstance(tool, dict) for tool in tools
    ):
        raise InvalidInputError(
            f"tools {quote(tools)}: expected a list of functions with types and docstrings, or of"
            ' dicts such as {"type": "function", "function": {"name": ..., "parameters": {...}}}'
        )
    if tools and (tokenizer is None or call_form(tokenizer) is None):
        raise InvalidInputError(_NO_FORM)
