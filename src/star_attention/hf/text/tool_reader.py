"""The tools of a prompt, and their calls in the answers to it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.hf.text.call_forms import Form, call_form
from star_attention.hf.text.calls import CallHolder, ToolCall
from star_attention.hf.text.tokens import decode


@dataclass(frozen=True, kw_only=True, eq=False)
class ToolReader:
    """Finds the calls of tools in answers.

    Attributes:
        form: how the model writes calls.
        schemas: JSON schemas of the tools' arguments, by name.
        tokenizer: the model's.
    """

    form: Form
    schemas: dict[str, Any]
    tokenizer: Any

    @classmethod
    def of(cls, tokenizer: Any, tools: Any) -> ToolReader | None:
        """Return what finds calls of tools; None without tools, and in an unknown form.

        Args:
            tokenizer: a transformers tokenizer, or None.
            tools: as the chat template gets them.
        """
        form = call_form(tokenizer) if tools and tokenizer is not None else None
        return None if form is None else cls(form=form, schemas=schemas(tools), tokenizer=tokenizer)

    def calls(
        self, token_ids: list[int], *, has_reasoning: bool, answer_prefix: str = ""
    ) -> tuple[ToolCall, ...]:
        """Return the calls in an answer, with ids that number them.

        Args:
            token_ids: those of the answer.
            has_reasoning: True if it begins with reasoning.
            answer_prefix: the text that it was made to begin with.
        """
        written = answer_prefix + decode(self.tokenizer, token_ids, skip_special_tokens=False)
        found = self.form.calls_in(written, self.schemas, has_reasoning=has_reasoning)
        # Templates of Mistral's take ids of nine letters and digits, and no others.
        return tuple(replace(call, id=f"call{n:05}") for n, call in enumerate(found))

    def holder(self) -> CallHolder:
        """Return what holds calls back from the text of an answer."""
        beginnings = self.form.beginnings(list(self.schemas))
        return CallHolder(beginnings, starts=not self.form.opening)


def schemas(tools: Collection[Any]) -> dict[str, Any]:
    """Return the JSON schemas of tools' arguments, by name.

    Args:
        tools: functions with types and docstrings, or dicts in the form of a chat.
    """
    found = {}
    for tool in tools:
        if callable(tool):
            from transformers.utils import get_json_schema

            tool = get_json_schema(tool)
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            found[function["name"]] = function.get("parameters")
    return found


def check_tools(tokenizer: Any, tools: Any, template_kwargs: Any) -> None:
    """Raise `InvalidInputError` for tools that a model cannot call, or that come twice."""
    if isinstance(template_kwargs, dict) and "tools" in template_kwargs:
        raise InvalidInputError(
            "tools are given twice, as tools= and in chat_template_kwargs; give one of them"
        )
    if not isinstance(tools, (list, tuple)) or not all(
        callable(tool) or isinstance(tool, dict) for tool in tools
    ):
        raise InvalidInputError(
            f"tools {quote(tools)}: expected a list of functions with types and docstrings, or of"
            ' dicts such as {"type": "function", "function": {"name": ..., "parameters": {...}}}'
        )
    if tools and (tokenizer is None or call_form(tokenizer) is None):
        raise InvalidInputError(
            "the model's chat template takes no tools, or writes calls of them in an unknown form;"
            " leave tools out, or set tokenizer.chat_template"
        )
