"""Context and query together are the template's prompt of the whole conversation."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from star_attention.errors import InvalidInputError
from star_attention.hf.text.chat import open_context
from tests.conversations import (
    TEMPLATES,
    TEXTS,
    Cut,
    cut_prompt,
    cuts,
    tokenizer_with,
    whole_prompt,
)

# System text goes into the last user message.
MOVING = ("mistral_v3",)
TOKENIZERS = {name: tokenizer_with(template) for name, template in TEMPLATES.items()}


def parts_of(name: str, cut: Cut) -> list[dict[str, Any]]:
    """Return a conversation as the template of a name needs it."""
    if name != "parts_only":
        return cut.whole
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in cut.whole]


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"needle"}))
@settings(max_examples=25, deadline=None, derandomize=True)
@given(cut=cuts())
def test_a_cut_leaves_no_trace(name: str, cut: Cut) -> None:
    """Forbids prompts that depend on where a conversation was cut."""
    tokenizer = TOKENIZERS[name]
    try:
        expected = whole_prompt(tokenizer, parts_of(name, cut))
    except (TemplateError, ValueError):
        with pytest.raises(InvalidInputError):
            cut_prompt(tokenizer, cut.context, cut.query)
        return
    try:
        prompt = cut_prompt(tokenizer, cut.context, cut.query)
    except InvalidInputError:
        # Refused for one reason only: this conversation does not begin as others do.
        head = open_context(tokenizer, cut.context).head
        assert name in MOVING
        assert not expected.startswith(head)
    else:
        assert prompt == expected


PART_LISTS = st.lists(TEXTS, min_size=1, max_size=3)


@pytest.mark.parametrize("name", ["gemma3", "llama4", "needle", "parts_on_lines", "parts_only"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(document=PART_LISTS, question=PART_LISTS, is_answered=st.booleans())
def test_a_cut_between_parts_leaves_no_trace(
    name: str, document: list[str], question: list[str], is_answered: bool
) -> None:
    """Forbids parts that are joined, or a string that is taken apart."""
    tokenizer = TOKENIZERS[name]
    first, more = part_message(document), part_message(question)
    if is_answered:
        context = [first, {"role": "assistant", "content": "ok"}]
        whole = [*context, more]
        if name == "parts_only":
            whole[1] = {"role": "assistant", "content": [{"type": "text", "text": "ok"}]}
    else:
        # Of several parts, the last one is the context's own question, which a query replaces.
        context = [part_message([*document, "x"])]
        assume(document != question[:-1])
        whole = [part_message(document + question)]
    assert cut_prompt(tokenizer, context, [more]) == whole_prompt(tokenizer, whole)


def part_message(texts: list[str]) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}
