"""Arguments of chat templates reach both sides of the cut, and are kept and checked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from star_attention import StarLLM, pipeline
from star_attention.errors import InvalidInputError, UnknownOptionError
from star_attention.hf.text.chat import ChatContext, continue_context, open_context
from tests.conversations import TEMPLATES, assistant, tokenizer_with, user, whole_prompt
from tests.engines import text_model

DOCUMENT, QUESTION = user("the cat sat\n"), "what sat?"
WHOLE = [user("the cat sat\nwhat sat?")]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
KWARGS: dict[str, dict[str, Any]] = {
    "qwen3": {"tools": TOOLS, "enable_thinking": False},
    "llama3": {"tools": TOOLS, "date_string": "1 Jan 2020"},
    "mistral_v3": {"tools": TOOLS},
    "harmony": {"reasoning_effort": "high", "tools": TOOLS},
    "granite": {"documents": [{"title": "t", "text": "Of cats."}], "thinking": True},
    "smollm3": {"enable_thinking": False},
}


def star_with(name: str) -> StarLLM:
    return StarLLM(text_model(), tokenizer_with(TEMPLATES[name]), block_size=16)


@pytest.mark.parametrize("name", KWARGS)
def test_arguments_reach_both_sides_of_the_cut(name: str) -> None:
    tokenizer, kwargs = tokenizer_with(TEMPLATES[name]), KWARGS[name]
    before = copy.deepcopy(kwargs)
    opened = open_context(tokenizer, [DOCUMENT], kwargs)
    prompt = opened.head + continue_context(tokenizer, opened, QUESTION).text
    assert prompt == whole_prompt(tokenizer, WHOLE, **kwargs)
    assert prompt != whole_prompt(tokenizer, WHOLE)
    assert kwargs == before
    # A saved context brings them along.
    loaded = ChatContext.from_dict(opened.as_dict())
    assert opened.head + continue_context(tokenizer, loaded, QUESTION).text == prompt


def test_a_query_may_differ_where_its_own_part_does() -> None:
    tokenizer = tokenizer_with(TEMPLATES["qwen3"])
    opened = open_context(tokenizer, [DOCUMENT], {"enable_thinking": True})
    tail = continue_context(tokenizer, opened, QUESTION, {"enable_thinking": False}).text
    assert opened.head + tail == whole_prompt(tokenizer, WHOLE, enable_thinking=False)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("harmony", {"reasoning_effort": "low"}), ("qwen3", {"tools": TOOLS})],
)
def test_a_query_cannot_change_what_was_encoded(name: str, kwargs: dict[str, Any]) -> None:
    """Forbids a prompt whose beginning the arguments of its query contradict."""
    tokenizer = tokenizer_with(TEMPLATES[name])
    opened = open_context(tokenizer, [DOCUMENT])
    with pytest.raises(InvalidInputError, match=f"{next(iter(kwargs))}.* change the encoded part"):
        continue_context(tokenizer, opened, QUESTION, kwargs)


def weather(city: str) -> str:
    """
    Look the weather up.

    Args:
        city: The city.
    """
    return city


def test_functions_are_tools() -> None:
    tokenizer = tokenizer_with(TEMPLATES["qwen3"])
    opened = open_context(tokenizer, [DOCUMENT], {"tools": [weather]})
    assert opened.template_kwargs["tools"][0]["function"]["name"] == "weather"
    tail = continue_context(tokenizer, opened, QUESTION).text
    assert opened.head + tail == whole_prompt(tokenizer, WHOLE, tools=[weather])


def test_a_named_template_is_chosen() -> None:
    """Some tokenizers have several templates, of which transformers takes one for tools."""
    tokenizer = tokenizer_with("")
    tokenizer.chat_template = {"default": TEMPLATES["phi3"], "tool_use": TEMPLATES["qwen3"]}
    for kwargs in ({}, {"tools": TOOLS}, {"chat_template": "tool_use"}):
        opened = open_context(tokenizer, [DOCUMENT], kwargs)
        tail = continue_context(tokenizer, opened, QUESTION).text
        assert opened.head + tail == whole_prompt(tokenizer, WHOLE, **kwargs)
    tokenizer.chat_template = {"rag": TEMPLATES["granite"]}
    with pytest.raises(InvalidInputError, match="cannot be chosen"):
        open_context(tokenizer, [DOCUMENT], {"thinking": True})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"enable_thinkin": False}, "does not read 'enable_thinkin'"),
        ({"im_start": 1}, "does not read 'im_start'"),
        ({"add_generation_prompt": False}, "'add_generation_prompt', which is set by the library"),
        ({"documents": [object()]}, "'documents' has a value of type object"),
        (["tools"], "expected a dict, got list"),
    ],
)
def test_arguments_that_cannot_work_are_refused(kwargs: Any, message: str) -> None:
    """Forbids arguments without effect: a template ignores what it does not know."""
    with pytest.raises(InvalidInputError, match=message):
        open_context(tokenizer_with(TEMPLATES["qwen3"]), [DOCUMENT], kwargs)


def test_the_engine_passes_them_on(tmp_path: Path) -> None:
    star, off = star_with("qwen3"), {"enable_thinking": False}
    without = star.prepare([DOCUMENT], QUESTION).prompts[0]
    with_off = star.prepare([DOCUMENT], QUESTION, chat_template_kwargs=off).prompts[0]
    assert star.tokenizer.decode(with_off) == (
        star.tokenizer.decode(without) + "<think>\n\n</think>\n\n"
    )
    context = star.encode([DOCUMENT], chat_template_kwargs=off)
    context.save(tmp_path / "chat.star")
    plain = star.encode([DOCUMENT])
    answers = [
        star.generate(context, QUESTION, max_new_tokens=4),
        star.generate(star.load_context(tmp_path / "chat.star"), QUESTION, max_new_tokens=4),
        star.generate(plain, QUESTION, max_new_tokens=4, chat_template_kwargs=off),
        star.generate(plain, with_off, max_new_tokens=4),
    ]
    assert len({tuple(answer.token_ids) for answer in answers}) == 1
    assert {answer.query_tokens for answer in answers} == {len(with_off)}
    reply = pipeline(star)("the cat sat\n", QUESTION, max_new_tokens=4, chat_template_kwargs=off)
    assert reply["answer"] == answers[0].text


def test_they_are_refused_without_a_template() -> None:
    star, off = star_with("qwen3"), {"enable_thinking": False}
    with pytest.raises(InvalidInputError, match="the context is not rendered"):
        star.encode("the cat", chat_template_kwargs=off)
    with pytest.raises(InvalidInputError, match="the query is not rendered"):
        star.generate(star.encode([DOCUMENT]), [5, 6], chat_template_kwargs=off)
    with pytest.raises(InvalidInputError, match="the query is not rendered"):
        star.generate(star.encode("the cat"), "x", chat_template_kwargs=off)
    with pytest.raises(UnknownOptionError, match="use chat_template_kwargs"):
        star.generate(star.encode([DOCUMENT]), "x", enable_thinking=False)


def test_a_thought_is_left_out_of_earlier_turns() -> None:
    """The context is cut as the template writes it before a further question."""
    tokenizer = tokenizer_with(TEMPLATES["qwen3"])
    whole = [DOCUMENT, assistant("<think>\nHm.\n</think>\n\nYes."), user("Sure?")]
    opened = open_context(tokenizer, whole[:2])
    assert opened.head + continue_context(tokenizer, opened, "Sure?").text == whole_prompt(
        tokenizer, whole
    )
    assert "Hm." not in opened.head
