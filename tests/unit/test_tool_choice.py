"""`tool_choice`: calls that an answer has to make, or must not, and what cannot be forced."""

from __future__ import annotations

import json
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.errors import InvalidInputError
from star_attention.hf.text.calls import ToolCall
from tests.conversations import TEMPLATES
from tests.talkers import CHANNEL_TOKENS, CHATML, CHATML_TOKENS, byte_level, say, talker
from tests.tiers import in_turn

DOCUMENT = [{"role": "user", "content": "the cat sat on the mat. " * 4}]
QUESTION = "How is the weather?"
SHORT: dict[str, Any] = {
    "type": "object",
    "required": ["x", "mode"],
    "properties": {"x": {"enum": [1]}, "mode": {"type": "string", "enum": ["a </b>"]}},
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SHORT}}
    for name in ("weather", "clock")
]
MADE = {"x": 1, "mode": "a </b>"}
FAMILIES = ("qwen3", "qwen3_coder", "glm45", "llama3", "mistral_v3")


def engine(family: str) -> StarLLM:
    plain = ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[INST]", "[/INST]")
    if family != "mistral_v3":
        plain = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    return talker(byte_level(CHATML_TOKENS, plain=plain, chat=TEMPLATES[family]))


def limits(**more: Any) -> dict[str, Any]:
    return {"max_new_tokens": 200, "do_sample": False, **more}


@pytest.mark.parametrize(
    ("family", "choice", "names"),
    in_turn(2, FAMILIES, [("required", ("weather", "clock")), ("clock", None)]),
)
def test_a_call_that_has_to_be_made(
    family: str, choice: str, names: tuple[str, ...] | None
) -> None:
    """A random model calls the tool, whichever way its template writes calls."""
    pytest.importorskip("xgrammar")
    star = engine(family)
    context = star.encode(DOCUMENT, tools=TOOLS)
    options = limits(tool_choice=choice)
    reply = star.generate(context, QUESTION, **options)
    (call,) = reply.tool_calls
    assert call.name in (names or (choice,))
    assert (call.arguments, reply.content, reply.finish_reason) == (MADE, "", "stop")
    assert reply.message["tool_calls"] == [call.as_dict()]
    with star.stream(context, QUESTION, **options) as stream:
        assert "".join(stream) == reply.text
    replies = star.generate(context, [QUESTION, "And now?"], **options)
    batch = star.batch()
    row = batch.add(context, QUESTION, **options)
    for each in (stream.result, *replies, row.result()):
        assert [(call.name, call.arguments) for call in each.tool_calls] == [(call.name, MADE)]
    prepared = star.prepare(DOCUMENT, QUESTION, **limits(tools=TOOLS, tool_choice=choice))
    assert star.generate(star.encode(prepared), prepared).tool_calls == (call,)


def test_the_call_comes_after_reasoning_and_a_prefix() -> None:
    pytest.importorskip("xgrammar")
    star = engine("qwen3")
    context = star.encode(DOCUMENT, tools=TOOLS)
    call = json.dumps({"name": "clock", "arguments": MADE})
    spoken = say(star.tokenizer, f"<think>\nHm.\n</think>\n\n{call}<|im_end|>")
    reply = star.generate(context, QUESTION, **spoken, tool_choice="clock")
    assert (reply.reasoning, reply.text, reply.content) == ("Hm.", call, "")
    assert reply.tool_calls == (ToolCall(name="clock", arguments=MADE),)
    prefix = "<think>\n\n</think>\n\nSo: "
    reply = star.generate(context, QUESTION, **limits(tool_choice="clock", answer_prefix=prefix))
    assert (reply.tool_calls[0].arguments, reply.content) == (MADE, "")


def test_a_forced_call_of_a_model_with_channels() -> None:
    """Its call is the JSON of its last message."""
    pytest.importorskip("xgrammar")
    star = talker(byte_level(CHANNEL_TOKENS, chat=TEMPLATES["harmony"]))
    context = star.encode(DOCUMENT, tools=TOOLS)
    call = json.dumps({"name": "clock", "arguments": MADE})
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    spoken = say(star.tokenizer, f"{thought}<|channel|>final<|message|>{call}<|return|>")
    reply = star.generate(context, QUESTION, **spoken, tool_choice="clock")
    assert (reply.reasoning, reply.tool_calls[0].arguments) == ("Hm.", MADE)


def test_a_call_that_is_cut_is_text() -> None:
    pytest.importorskip("xgrammar")
    star = engine("qwen3")
    context = star.encode(DOCUMENT, tools=TOOLS)
    reply = star.generate(context, QUESTION, **limits(tool_choice="clock", max_new_tokens=12))
    assert (reply.tool_calls, reply.finish_reason) == ((), "length")
    assert reply.content == reply.text
    assert reply.text.startswith('{"name')


def test_none_leaves_tools_out_of_the_prompt() -> None:
    """Those of the context stay in it, and what looks like a call is text."""
    star = engine("mistral_v3")
    said = {"role": "assistant", "content": "Yes."}
    context = star.encode([*DOCUMENT, said])
    # Its template writes tools before the last question, which is after the context here.
    query = [{"role": "user", "content": "Hi."}, said, {"role": "user", "content": QUESTION}]
    plain = star.generate(context, query, max_new_tokens=1)
    told = star.generate(context, query, max_new_tokens=1, tools=TOOLS)
    none = star.generate(context, query, max_new_tokens=1, tools=TOOLS, tool_choice="none")
    assert told.query_tokens > plain.query_tokens + 100
    assert (none.query_tokens, none.tool_calls) == (plain.query_tokens, None)
    star = engine("qwen3")
    written = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    context = star.encode(DOCUMENT, tools=TOOLS)
    for choice, calls in ((None, 1), ("auto", 1), ("none", None)):
        reply = star.generate(
            context, QUESTION, **say(star.tokenizer, f"{written}<|im_end|>"), tool_choice=choice
        )
        assert (reply.tool_calls and len(reply.tool_calls)) == calls
        assert reply.text == written
    without = star.prepare(DOCUMENT, QUESTION, tools=TOOLS, tool_choice="none")
    assert len(star.encode(without)) == len(star.encode(DOCUMENT)) < len(context) - 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tool_choice": "lamp"},
            r"or one of the tools \['weather', 'clock'\], got 'lamp'",
        ),
        ({"tool_choice": TOOLS[0]}, "tool_choice .*expected .* or the name of a tool, got dict"),
        ({"num_beams": 2}, "tool_choice 'required' works with greedy search and sampling"),
        ({"min_new_tokens": 2}, "tool_choice 'required' works with greedy search and sampling"),
        ({"json_schema": SHORT}, "tool_choice 'required' .* json_schema something else"),
        ({"skip_special_tokens": False}, "does not work with skip_special_tokens=False"),
        ({"ignore_eos": True}, "tool_choice needs an end-of-sequence token"),
    ],
)
def test_choices_that_cannot_work(options: dict[str, Any], message: str) -> None:
    """Refused before anything is encoded, too, as far as the context's tools are known."""
    pytest.importorskip("xgrammar")
    star = engine("qwen3")
    context = star.encode(DOCUMENT, tools=TOOLS)
    options = {"tool_choice": "required"} | options
    with pytest.raises(InvalidInputError, match=message):
        star.generate(context, QUESTION, **options)
    with pytest.raises(InvalidInputError, match=message):
        star.prepare(DOCUMENT, QUESTION, tools=TOOLS, **options)
    kwargs = {"tools": TOOLS}
    with pytest.raises(InvalidInputError, match=message):
        star.encode(DOCUMENT, query=QUESTION, settings=options, chat_template_kwargs=kwargs)
    if "lamp" in message:
        with pytest.raises(InvalidInputError, match=message):
            star.check_settings(tools=TOOLS, **options)


def test_a_choice_without_tools() -> None:
    star = engine("qwen3")
    for context, query in ((star.encode(DOCUMENT), QUESTION), (star.encode("the cat"), "what")):
        for choice in ("required", "weather"):
            with pytest.raises(InvalidInputError, match=f"'{choice}' needs tools to choose from"):
                star.generate(context, query, tool_choice=choice)
        for choice in ("auto", "none"):
            reply = star.generate(context, query, tool_choice=choice, max_new_tokens=1)
            assert reply.tool_calls is None


def test_a_template_without_calls_of_a_known_form() -> None:
    """Forbids an answer that was to be a call and is none."""
    reads_only = "{# tools #}{% if tools %}{{ tools }}{% endif %}" + CHATML
    star = talker(byte_level(chat=reads_only))
    context = star.encode(DOCUMENT, chat_template_kwargs={"tools": TOOLS})
    assert star.generate(context, QUESTION, max_new_tokens=1).tool_calls is None
    with pytest.raises(InvalidInputError, match=r"'required' does not work: .*unknown form"):
        star.generate(context, QUESTION, tool_choice="required")


def test_parameters_that_no_answer_can_follow() -> None:
    pytest.importorskip("xgrammar")
    star = engine("qwen3")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}
    context = star.encode(DOCUMENT, tools=[tool])
    with pytest.raises(
        InvalidInputError, match=r"the tools' parameters .*, or leave tool_choice out"
    ):
        star.generate(context, QUESTION, tool_choice="f")
