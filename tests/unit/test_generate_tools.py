"""Tools from Python: what the chat template gets, and the calls that replies have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.errors import InvalidInputError
from star_attention.hf.text.calls import ToolCall
from star_attention.storage.context import EncodedContext
from tests.conversations import TEMPLATES
from tests.printed_blocks import ROOT, blocks
from tests.talkers import CHANNEL_TOKENS, CHATML_TOKENS, byte_level, say, talker


def weather(city: str, days: int = 1) -> str:
    """Tell the weather.

    Args:
        city: where.
        days: how many.
    """
    return f"{city}: rain for {days} days"


CALL = ToolCall(name="weather", arguments={"city": "Paris", "days": 2})
JSON_CALL = f'<tool_call>\n{{"name": "weather", "arguments": {json.dumps(CALL.arguments)}}}\n'
WRITTEN = {
    "qwen3": JSON_CALL + "</tool_call>",
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
}
DOCUMENT = [{"role": "user", "content": "the cat sat on the mat. " * 4}]
QUESTION = "How is the weather?"


def engine(family: str) -> StarLLM:
    plain = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    return talker(byte_level(CHATML_TOKENS, plain=plain, chat=TEMPLATES[family]))


def said(star: StarLLM, text: str) -> dict[str, Any]:
    return say(star.tokenizer, f"{text}<|im_end|>")


@pytest.mark.parametrize("family", WRITTEN)
def test_a_reply_has_calls(family: str) -> None:
    star, written = engine(family), WRITTEN[family]
    context = star.encode(DOCUMENT, tools=[weather])
    same = star.encode(DOCUMENT, chat_template_kwargs={"tools": [weather]})
    assert torch.equal(context.token_ids, same.token_ids)
    text = f"<think>\nHm.\n</think>\n\nLet me see.\n{written}"
    # The tools of the context count, and may be said again.
    for more in ({}, {"tools": [weather]}):
        reply = star.generate(context, QUESTION, **said(star, text), **more)
        assert reply.tool_calls == (CALL,)
        assert (reply.text, reply.content) == (f"Let me see.\n{written}", "Let me see.")
        assert (reply.reasoning, reply.finish_reason) == ("Hm.", "stop")
    assert reply.as_dict()["tool_calls"] == [{"name": "weather", "arguments": CALL.arguments}]
    with star.stream(context, QUESTION, **said(star, text), tools=[weather]) as stream:
        assert "".join(stream) == reply.text
    replies = star.generate(context, [QUESTION, "And now?"], **said(star, text))
    assert [each.tool_calls for each in (stream.result, *replies)] == [(CALL,)] * 3
    batch = star.batch()
    row = batch.add(context, QUESTION, **said(star, text))
    assert row.result().tool_calls == (CALL,)
    prepared = star.prepare(DOCUMENT, QUESTION, **said(star, text), tools=[weather])
    assert star.generate(star.encode(prepared), prepared).tool_calls == (CALL,)


def test_replies_without_calls() -> None:
    star = engine("qwen3")
    context = star.encode(DOCUMENT, tools=[weather])
    cut = JSON_CALL[:40]
    for text in ("It rains.", cut, ""):
        reply = star.generate(context, QUESTION, **said(star, text))
        assert (reply.tool_calls, reply.content) == ((), text)
    plain = star.generate(star.encode(DOCUMENT), QUESTION, **said(star, WRITTEN["qwen3"]))
    assert (plain.tool_calls, plain.content) == (None, None)
    assert plain.message == {"role": "assistant", "content": WRITTEN["qwen3"]}
    assert plain.as_dict()["tool_calls"] is None
    ids = star.encode(list(range(40)))
    assert star.generate(ids, [1, 2, 3], **said(star, "x")).tool_calls is None


@pytest.mark.parametrize("family", WRITTEN)
def test_a_conversation_goes_on_after_a_call(family: str) -> None:
    """The prompt is that of the template, with the call and its result."""
    star = engine(family)
    tools = {"tools": [weather]}
    context = star.encode(DOCUMENT, chat_template_kwargs=tools)
    text = f"Let me see.\n{WRITTEN[family]}"
    reply = star.generate(context, QUESTION, **said(star, text), keep=True)
    (call,) = reply.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": weather(**call.arguments)}
    more = reply.continue_with([reply.message, result], **said(star, "Rain."))
    assert (more.text, more.tool_calls) == ("Rain.", ())
    assert more.kept_tokens > 10
    whole = [
        {"role": "user", "content": DOCUMENT[0]["content"] + QUESTION},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call.as_dict()]},
        result,
    ]
    prompt = star.tokenizer.apply_chat_template(
        whole, tools=[weather], add_generation_prompt=True, return_dict=False
    )
    assert len(context) + more.query_tokens == len(prompt)


def test_a_saved_context_keeps_its_tools(tmp_path: Path) -> None:
    """Forbids tools whose keys come back in another order: the prompt would be another one."""
    star = engine("qwen3")
    tool = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": tool}]
    star.encode(DOCUMENT, tools=tools).save(tmp_path / "a.star")
    context = star.load_context(tmp_path / "a.star")
    reply = star.generate(context, QUESTION, **said(star, WRITTEN["qwen3"]), tools=tools)
    assert reply.tool_calls == (CALL,)


def test_a_call_in_a_channel_is_no_empty_answer() -> None:
    """Forbids the warning of an answer without text (warnings are errors)."""
    star = talker(byte_level(CHANNEL_TOKENS, chat=TEMPLATES["harmony"]))
    context = star.encode(DOCUMENT, tools=[weather])
    text = f"<|channel|>commentary to=functions.weather<|message|>{json.dumps(CALL.arguments)}"
    reply = star.generate(context, QUESTION, **say(star.tokenizer, f"{text}<|call|>"))
    assert (reply.text, reply.content, reply.tool_calls) == ("", "", (CALL,))


def test_an_answer_that_was_made_to_begin_with_a_call() -> None:
    star = engine("qwen3")
    context = star.encode(DOCUMENT, tools=[weather])
    begun, rest = "So.\n<tool_call>", WRITTEN["qwen3"].removeprefix("<tool_call>")
    reply = star.generate(context, QUESTION, **said(star, rest), answer_prefix=begun)
    assert (reply.tool_calls, reply.content) == ((CALL,), "")


def clock(zone: str) -> str:
    """Tell the time.

    Args:
        zone: where.
    """
    return zone


@pytest.mark.parametrize("family", [*WRITTEN, "llama3", "glm45", "mistral_v3"])
def test_the_tools_of_a_context_are_its_own(family: str, tmp_path: Path) -> None:
    """Forbids an answer that has seen other tools than its caller says, or none."""
    star = engine(family)
    dated = {"chat_template_kwargs": {"date_string": "1 Jan 2026"}} if family == "llama3" else {}
    plain = star.encode(DOCUMENT, **dated)
    made = star.encode(DOCUMENT, tools=[weather], **dated)
    made.save(tmp_path / "a.star")
    (listed,) = star.encode([DOCUMENT], tools=[weather], **dated)
    batched = star.batch().encode(DOCUMENT, tools=[weather], **dated).result()
    loaded = star.load_context(tmp_path / "a.star")
    edited = star.encode(DOCUMENT, tools=[weather], reuse=made, **dated)
    ends: list[EncodedContext] = [listed, batched, loaded, edited]
    assert all(torch.equal(each.token_ids, made.token_ids) for each in ends)
    asked = {"max_new_tokens": 1}
    for context in (made, loaded, star.extend(made, " And it sat.")):
        told = star.generate(context, QUESTION, **asked)
        assert told.tool_calls == ()
        again = star.generate(context, QUESTION, **asked, tools=[weather])
        assert again.query_tokens == told.query_tokens
        with pytest.raises(
            InvalidInputError,
            match=r"the tools \['clock'\] change the encoded .* encoded with \['weather'\];",
        ):
            star.generate(context, QUESTION, **asked, tools=[clock])
        tool = {"type": "function", "function": {"name": "weather", "description": "Else."}}
        with pytest.raises(InvalidInputError, match="of other descriptions or parameters"):
            star.generate(context, QUESTION, **asked, tools=[tool])
    with pytest.raises(InvalidInputError, match="encoded without any; give these tools to encode"):
        star.generate(plain, QUESTION, **asked, tools=[weather])


def test_the_prompt_of_a_context_with_tools_is_that_of_the_template() -> None:
    star = engine("qwen3")
    context = star.encode(DOCUMENT, tools=[weather])
    reply = star.generate(context, QUESTION, max_new_tokens=1)
    whole = [{"role": "user", "content": DOCUMENT[0]["content"] + QUESTION}]
    prompt = star.tokenizer.apply_chat_template(
        whole, tools=[weather], add_generation_prompt=True, return_dict=False
    )
    assert prompt[: len(context)] == context.token_ids.tolist()
    assert len(context) + reply.query_tokens == len(prompt)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("weather", "tools 'weather': expected a list of functions"),
        ([7], r"tools \[7\]: expected a list of functions"),
    ],
)
def test_tools_that_cannot_be_read(tools: Any, message: str) -> None:
    star = engine("qwen3")
    with pytest.raises(InvalidInputError, match=message):
        star.generate(star.encode(DOCUMENT), QUESTION, tools=tools)
    with pytest.raises(InvalidInputError, match=message):
        star.encode(DOCUMENT, tools=tools)


@pytest.mark.parametrize("value", ["enable_thinking", ["enable_thinking"], 7])
@pytest.mark.parametrize("more", [{}, {"tools": [weather]}, {"tool_choice": "none"}])
def test_arguments_of_the_template_that_are_no_dict(value: Any, more: dict[str, Any]) -> None:
    """The same error, whatever reads them first."""
    star = engine("qwen3")
    message = f"chat_template_kwargs: expected a dict, got {type(value).__name__}"
    wrong: dict[str, Any] = {"chat_template_kwargs": value}
    for settings in (wrong | more, wrong | more | {"max_new_tokens": 1}):
        with pytest.raises(InvalidInputError, match=message):
            star.encode(DOCUMENT, query=QUESTION, settings=settings)
        with pytest.raises(InvalidInputError, match=message):
            star.prepare(DOCUMENT, QUESTION, **settings)
        with pytest.raises(InvalidInputError, match=message):
            star.generate(star.encode(DOCUMENT), QUESTION, **settings)
    for content in (DOCUMENT, "the cat sat on the mat"):
        with pytest.raises(InvalidInputError, match=message):
            star.encode(content, **wrong, tools=more.get("tools"))
        with pytest.raises(InvalidInputError, match=message):
            star.batch().encode(content, **wrong, tools=more.get("tools"))


def test_tools_that_nothing_would_see() -> None:
    """Forbids an answer that has not seen its tools."""
    star = engine("qwen3")
    with pytest.raises(InvalidInputError, match=r"tools \['weather'\] change the encoded part"):
        star.generate(star.encode(DOCUMENT), QUESTION, tools=[weather])
    with pytest.raises(InvalidInputError, match=r"^tools have no effect, because the query"):
        star.generate(star.encode("the cat sat on the mat"), QUESTION, tools=[weather])
    for content in ("the cat sat on the mat", [1, 2, 3]):
        with pytest.raises(InvalidInputError, match=r"^tools have no effect, because the context"):
            star.encode(content, tools=[weather])
    prepared = star.prepare(DOCUMENT, QUESTION)
    with pytest.raises(InvalidInputError, match="brings its own query and settings"):
        star.encode(prepared, tools=[weather])
    both = {"tools": [weather], "chat_template_kwargs": {"tools": [weather]}}
    with pytest.raises(InvalidInputError, match="tools are given twice"):
        star.generate(star.encode(DOCUMENT), QUESTION, **both)
    with pytest.raises(InvalidInputError, match="tools are given twice"):
        star.encode(DOCUMENT, **both)
    simple = engine("chatml")
    with pytest.raises(InvalidInputError, match="takes no tools, or writes calls of them in an"):
        simple.generate(simple.encode(DOCUMENT), QUESTION, tools=[weather])
    with pytest.raises(InvalidInputError, match="takes no tools, or writes calls of them in an"):
        simple.encode(DOCUMENT, tools=[weather])


class Saying(StarLLM):
    """An engine whose next answers are given beforehand."""

    texts: list[str]

    def generate(self, context: Any, query: Any = None, **settings: Any) -> Any:
        forced = said(self, self.texts.pop(0))
        return super().generate(context, query, **settings, **forced)


def test_the_example_of_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs as printed, on a small model whose answers are given."""
    (block,) = [
        block for block in blocks(ROOT / "docs" / "models.md") if "def weather" in block.text
    ]
    star = engine("qwen3")
    star.__class__ = Saying
    star.texts = [WRITTEN["qwen3"], "It will rain."]  # type: ignore[attr-defined]
    monkeypatch.setattr(StarLLM, "from_pretrained", lambda path: star)
    names: dict[str, Any] = {}
    exec(compile(block.text, str(block), "exec"), names)
    (result,) = names["results"]
    assert result["content"] == "2 days of rain in Paris"
    assert names["answer"].text == "It will rain."
    assert names["answer"].kept_tokens > 10
