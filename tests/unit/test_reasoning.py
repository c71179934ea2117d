"""A model's reasoning is kept apart from its answer, and special tokens can be kept."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.cli.options import AnswerOptions
from star_attention.cli.output import Answerer
from star_attention.cli.progress import Status
from star_attention.generation.result import Delta
from star_attention.hf.text.reasoning import TAGS, Markup, Thinking
from tests.talkers import (
    CHANNEL_TOKENS,
    CHANNELS,
    CHATML,
    CHATML_TOKENS,
    byte_level,
    say,
    talker,
)

MESSAGES = [{"role": "user", "content": "the cat sat on the mat\n"}]
THINK = ("<think>", "</think>")
OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
CLOSED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
MODES: list[dict[str, Any]] = [{}, dict(num_beams=2)]


def answers(star: StarLLM, spoken: str, **options: Any) -> tuple[str, str | None]:
    """Text and reasoning of an answer, which are those of a stream and of a batch's row, too."""
    context = star.encode(MESSAGES if star.tokenizer.chat_template else "the cat")
    options |= {"max_new_tokens": len(star.tokenizer(spoken).input_ids)}

    def arguments() -> dict[str, Any]:
        return say(star.tokenizer, spoken) | options

    reply = star.generate(context, "what", **arguments())
    assert reply.as_dict()["reasoning"] == reply.reasoning
    beams = star.generate(context, "what", num_beams=2, **arguments())
    assert (beams.text, beams.reasoning) == (reply.text, reply.reasoning)
    assert reply.as_dict()["reasoning_tokens"] == beams.reasoning_tokens == reply.reasoning_tokens
    stream = star.stream(context, "what", **arguments())
    pieces = list(stream)
    assert all(pieces)
    assert "".join(pieces) == stream.result.text == reply.text
    assert stream.result.reasoning == reply.reasoning
    assert stream.result.reasoning_tokens == reply.reasoning_tokens
    deltas = list(star.stream(context, "what", **arguments()).deltas())
    assert "".join(delta.text for delta in deltas) == reply.text
    assert "".join(delta.reasoning for delta in deltas) == (reply.reasoning or "")
    with star.batch() as batch:
        row = batch.add(context, "what", **arguments())
        events = [delta for own, delta in batch if own is row]
    for deltas in (events, list(row.deltas())):
        assert "".join(delta.text for delta in deltas) == row.text == reply.text
        assert "".join(delta.reasoning for delta in deltas) == (reply.reasoning or "")
    assert row.result().reasoning == row.reasoning == reply.reasoning
    assert row.result().reasoning_tokens == reply.reasoning_tokens
    return reply.text, reply.reasoning


# ------------------------------------------------------------------------------- channels


@pytest.fixture(scope="module")
def channels() -> StarLLM:
    return talker(byte_level(CHANNEL_TOKENS))


@pytest.fixture(scope="module")
def channel_chat() -> StarLLM:
    return talker(byte_level(CHANNEL_TOKENS, chat=CHANNELS))


HARMONY = (
    "<|channel|>analysis<|message|>the cat<|end|>"
    "<|start|>assistant<|channel|>final<|message|>hello<|return|>"
)


def test_thought_role_and_answer_do_not_run_together(
    channels: StarLLM, channel_chat: StarLLM
) -> None:
    assert answers(channels, HARMONY) == ("hello", "the cat")
    assert answers(channel_chat, HARMONY) == ("hello", "the cat")


@pytest.mark.parametrize(
    ("spoken", "text", "reasoning"),
    [
        ("hello world", "hello world", None),
        ("<|channel|>final<|message|>hello<|return|>", "hello", None),
        ("<|message|>hello<|return|>", "hello", None),
        # Several messages, a message to a tool, and an end inside each part.
        (
            "<|channel|>analysis<|message|>the<|end|><|start|>assistant<|channel|>analysis"
            "<|message|>cat<|end|><|start|>assistant<|channel|>final<|message|>hello",
            "hello",
            "the\n\ncat",
        ),
        (
            "<|channel|>commentary to=functions.f<|message|>{}<|end|><|start|>assistant"
            "<|channel|>final<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b",
            "a\n\nb",
            None,
        ),
        (
            "<|channel|>analysis<|message|>the<|end|><|start|>assistant to=functions.f<|channel|>"
            "commentary json<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>hello",
            "hello",
            "the",
        ),
        ("<|channel|>final<|message|>hello<|end|><|start|>assist", "hello", None),
        ("<|channel|>final<|message|>hello<|end|><|start|>assistant<|channel|>ana", "hello", None),
    ],
)
def test_channels(
    channels: StarLLM, channel_chat: StarLLM, spoken: str, text: str, reasoning: str | None
) -> None:
    for star in (channels, channel_chat):
        assert answers(star, spoken) == (text, reasoning)


def test_a_call_of_a_tool_ends_the_answer(channel_chat: StarLLM) -> None:
    """Forbids a tool's result that the model invents, as gpt-oss is read from a GGUF file."""
    call = "<|channel|>commentary to=functions.f<|message|>{}<|call|>"
    context = channel_chat.encode([{"role": "user", "content": "the cat\n"}])
    spoken = say(channel_chat.tokenizer, call + "<|start|>functions.f")
    with pytest.warns(UserWarning, match="has no text: they are .* a tool's call"):
        reply = channel_chat.generate(context, "what", **spoken)
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("", None, "stop")
    shown = say(channel_chat.tokenizer, call) | dict(skip_special_tokens=False)
    assert channel_chat.generate(context, "what", **shown).text == call


@pytest.mark.parametrize(
    ("prefix", "text", "reasoning"),
    [
        ("", "cat<|x", None),
        ("<|channel|>final<|message|>the ", "cat<|x", None),
        ("<|channel|>analysis<|message|>the ", "", "cat<|x"),
    ],
)
def test_an_answer_prefix_may_begin_a_message(
    channel_chat: StarLLM, prefix: str, text: str, reasoning: str | None
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert answers(channel_chat, "cat<|x", answer_prefix=prefix) == (text, reasoning)


def test_stop_strings_end_the_answer_and_not_the_reasoning(channels: StarLLM) -> None:
    spoken = HARMONY.replace("hello", "hello cat world")
    assert answers(channels, spoken, stop=" cat") == ("hello", "the cat")


@pytest.mark.parametrize("mode", MODES, ids=["greedy", "beams"])
def test_an_empty_answer_is_said(channels: StarLLM, mode: dict[str, Any]) -> None:
    """Forbids an empty text without a word why."""
    spoken = say(channels.tokenizer, "<|channel|>analysis<|message|>the cat sat")
    context = channels.encode("the cat")
    with pytest.warns(UserWarning, match=r"ended inside the model's reasoning.*max_new_tokens"):
        reply = channels.generate(context, "what", **mode, **spoken)
    assert (reply.text, reply.reasoning) == ("", "the cat sat")
    assert reply.finish_reason == "length"


def test_reasoning_is_streamed_as_it_comes(channels: StarLLM) -> None:
    """Forbids a stream that is silent while the model thinks."""
    context = channels.encode("the cat")
    spoken = HARMONY.replace("the cat", " \n the cat \n\n sat \n ")

    def options() -> dict[str, Any]:
        return say(channels.tokenizer, spoken)

    stream = channels.stream(context, "what", **options())
    first = next(stream.deltas())
    assert (first.text, first.reasoning) == ("", "the")
    # The rest can be read either way.
    assert "".join(stream) == stream.result.text == "hello"
    deltas = list(channels.stream(context, "what", **options()).deltas())
    assert [bool(delta.text) for delta in deltas] == sorted(bool(delta.text) for delta in deltas)
    assert "".join(delta.reasoning for delta in deltas) == "the cat \n\n sat"

    async def read() -> list[Delta]:
        return [delta async for delta in channels.astream(context, "what", **options()).deltas()]

    assert asyncio.run(read()) == deltas


@pytest.mark.parametrize("no_stream", [False, True], ids=["streamed", "whole"])
def test_a_command_can_show_reasoning(
    channels: StarLLM, no_stream: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answer alone goes to standard output."""
    context = channels.encode("the cat")
    for shows, expected in ((True, "the cat\n\n"), (False, "")):
        options = AnswerOptions(show_reasoning=shows, no_stream=no_stream)
        kwargs = say(channels.tokenizer, HARMONY)
        quiet = Status(quiet=True)
        Answerer(channels, context, options, kwargs, quiet, show_encode_time=False).answer("what")
        assert capsys.readouterr() == ("hello\n", expected)


# ----------------------------------------------------------------------------------- tags


@pytest.mark.parametrize("chat", [None, CHATML], ids=["raw", "chat"])
@pytest.mark.parametrize("kind", ["added", "special"])
def test_tags_that_are_tokens(kind: str, chat: str | None) -> None:
    plain, special = (THINK, ()) if kind == "added" else ((), THINK)
    star = talker(byte_level((*CHATML_TOKENS, *special), plain=plain, chat=chat))
    spoken = "<think>\nthe cat\n</think>\n\nhello world"
    assert answers(star, spoken) == ("hello world", "the cat")
    # Without reasoning nothing changes.
    assert answers(star, "\nhello world\n") == ("\nhello world\n", None)
    assert answers(star, "<think>\n\n</think>\n\nhello") == ("hello", None)
    # Inside an answer a tag is a word of it, where decoding shows it.
    quoted = "the <think> world" if kind == "added" else "the  world"
    assert answers(star, "the <think> world") == (quoted, None)


def test_marks_are_those_of_the_tokenizer_as_it_is() -> None:
    """Forbids marks of the time before a template or a special token was added."""
    tokenizer = byte_level(CHATML_TOKENS)
    assert Markup.of(tokenizer) is None
    seen = []
    for change in (
        lambda: setattr(tokenizer, "chat_template", OPENED),
        lambda: tokenizer.add_tokens([*THINK]),
        lambda: tokenizer.add_special_tokens({"extra_special_tokens": [*THINK]}),
    ):
        change()
        marks = Markup.of(tokenizer)
        assert marks is not None
        seen.append((len(marks.openings[0]), {*marks.tag_tokens.values()}))
    assert seen == [(7, set()), (1, set()), (1, {*THINK})]


def test_the_name_of_a_channel_is_no_reasoning() -> None:
    """Gemma 4 writes `<|channel>thought` and a line break before its reasoning."""
    special = (*CHATML_TOKENS, "<|channel>", "<channel|>")
    opened = CHATML.replace("assistant\n{% endif %}", "assistant\n<|channel>thought\n{% endif %}")
    star = talker(byte_level(special, chat=CHATML))
    assert answers(star, "<|channel>thought\nthe cat<channel|>hello") == ("hello", "the cat")
    assert answers(star, "<|channel>the cat<channel|>hello") == ("hello", "the cat")
    assert answers(star, "<|channel>thought\n<channel|>hello") == ("hello", None)
    star = talker(byte_level(special, chat=opened))
    assert answers(star, "the cat<channel|>hello") == ("hello", "the cat")


def test_tags_that_only_the_template_names() -> None:
    named = "{# <think> #}{% if false %}</think>{% endif %}" + CHATML
    star = talker(byte_level(chat=named))
    assert answers(star, " <think>the cat</think> hello") == ("hello", "the cat")
    assert answers(star, "<the cat") == ("<the cat", None)
    assert answers(star, "<thin") == ("<thin", None)
    plain = talker(byte_level(chat=CHATML))
    spoken = "<think>the cat</think> hello"
    assert answers(plain, spoken) == (spoken, None)


@pytest.mark.parametrize("plain", [THINK, ()], ids=["tokens", "text"])
def test_a_template_may_open_or_close_the_reasoning(plain: tuple[str, ...]) -> None:
    opened = talker(byte_level(plain=plain, chat=OPENED))
    assert answers(opened, "the cat</think>\n\nhello") == ("hello", "the cat")
    closed = talker(byte_level(plain=plain, chat=CLOSED))
    assert answers(closed, "hello </think>") == ("hello </think>", None)
    # A prefix continues the reasoning, or ends it.
    assert answers(opened, " cat</think>hello", answer_prefix="the") == ("hello", "cat")
    assert answers(opened, "hello", answer_prefix="the</think>") == ("hello", None)
    assert answers(closed, "hello", answer_prefix="the") == ("hello", None)


@pytest.mark.parametrize("plain", [THINK, ()], ids=["tokens", "text"])
def test_a_prefilled_turn_may_hold_reasoning(plain: tuple[str, ...]) -> None:
    """The turn that the answer continues is a message, not an answer prefix."""
    star = talker(byte_level(plain=plain, chat="{# <think> #}" + CHATML))
    context = star.encode(MESSAGES)

    def ask(prefilled: str, spoken: str) -> tuple[str, str | None]:
        query = [
            {"role": "user", "content": "what"},
            {"role": "assistant", "content": prefilled},
        ]
        reply = star.generate(context, query, **say(star.tokenizer, spoken))
        return reply.text, reply.reasoning

    assert ask("<think>\nthe", " cat</think>\nhello") == ("hello", "cat")
    assert ask("<think>the</think>\n", "hello") == ("hello", None)
    assert ask("the cat", " hello") == (" hello", None)


def test_a_query_about_a_tag_opens_nothing() -> None:
    """Forbids that the answer to it is taken for reasoning."""
    star = talker(byte_level(plain=THINK, chat=CHATML))
    for content, query in ((MESSAGES, "what is <think>"), ("the cat", "what is <think> about")):
        reply = star.generate(star.encode(content), query, **say(star.tokenizer, "hello world"))
        assert (reply.text, reply.reasoning) == ("hello world", None)


def test_a_raw_query_may_open_the_reasoning() -> None:
    star = talker(byte_level(plain=THINK))
    reply = star.generate(
        star.encode("the cat"), "what<think>\n", **say(star.tokenizer, "cat</think>hello")
    )
    assert (reply.text, reply.reasoning) == ("hello", "cat")


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize(("opening", "closing"), TAGS.items())
def test_tags_may_come_in_pieces(opening: str, closing: str, size: int) -> None:
    text = f"\n{opening}a < b</x>{closing}  hello {opening} {closing}"
    thinking = Thinking(TAGS)
    parts = [thinking.push(text[at : at + size]) for at in range(0, len(text), size)]
    parts.append(thinking.flush())
    reasoning, answer = ("".join(part) for part in zip(*parts, strict=True))
    assert (reasoning, answer) == ("a < b</x>", f"hello {opening} {closing}")


# ------------------------------------------------------------------------- tokens of reasoning


OPENED_BY_PROMPT = "{# <think> #}" + OPENED
CHAT_THINKS = "{# <think> #}" + CHATML


@pytest.mark.parametrize(
    ("tokens", "chat", "thought", "said"),
    [
        # Tags that are tokens, that are text, and that the prompt has opened.
        (dict(plain=THINK), CHATML, "<think>\nthe cat\n</think>", "\n\nhello"),
        ({}, CHAT_THINKS, " <think>the cat</think>", "hello"),
        (dict(plain=THINK), OPENED_BY_PROMPT, "the cat</think>", "\n\nhello"),
        (dict(plain=THINK), OPENED_BY_PROMPT, "</think>", "hello"),
        # None, one that begins to look like a tag, and what only quotes one.
        (dict(plain=THINK), CHATML, "", "hello <think> the cat</think>"),
        ({}, CHAT_THINKS, "", " <thin"),
        # Reasoning that the answer ends in.
        (dict(plain=THINK), CHATML, "<think>the cat sat", ""),
        ({}, CHAT_THINKS, "<think>", ""),
        # Messages in channels, with their headers; a call is neither.
        (
            dict(special=CHANNEL_TOKENS),
            CHANNELS,
            "<|channel|>analysis<|message|>the cat<|end|>",
            "<|start|>assistant<|channel|>final<|message|>hello",
        ),
        (dict(special=CHANNEL_TOKENS), CHANNELS, "", "<|channel|>final<|message|>hello"),
        (
            dict(special=CHANNEL_TOKENS),
            CHANNELS,
            "<|channel|>analysis<|message|>the cat<|end|>",
            "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:an answer")
def test_tokens_of_reasoning(tokens: dict[str, Any], chat: str, thought: str, said: str) -> None:
    """They are those up to the end of its last mark, however the marks are tokenized."""
    star = talker(byte_level(**tokens, chat=chat))
    context = star.encode(MESSAGES)
    ids, more = (
        star.tokenizer(each, add_special_tokens=False).input_ids for each in (thought, said)
    )
    reply = star.generate(context, "what", **say(star.tokenizer, ids + more))
    assert reply.token_ids == ids + more
    assert reply.reasoning_tokens == len(ids)
    whole = say(star.tokenizer, ids + more) | dict(skip_special_tokens=False)
    shown = star.generate(context, "what", **whole)
    assert (shown.reasoning, shown.reasoning_tokens) == (None, 0)


# ------------------------------------------------------------------------- special tokens


@pytest.mark.parametrize("mode", MODES, ids=["greedy", "beams"])
def test_special_tokens_can_be_kept(channels: StarLLM, mode: dict[str, Any]) -> None:
    context = channels.encode("the cat")
    options = mode | say(channels.tokenizer, HARMONY)
    reply = channels.generate(context, "what", skip_special_tokens=False, **options)
    assert (reply.text, reply.reasoning) == (HARMONY, None)
    cut = mode | say(channels.tokenizer, HARMONY) | dict(stop=["<|end|>"])
    reply = channels.generate(context, "what", skip_special_tokens=False, **cut)
    assert reply.text == "<|channel|>analysis<|message|>the cat"


def test_special_tokens_are_kept_in_a_stream(channels: StarLLM) -> None:
    context = channels.encode("the cat")
    options = say(channels.tokenizer, HARMONY)
    with channels.stream(context, "what", skip_special_tokens=False, **options) as stream:
        assert "".join(stream) == stream.result.text == HARMONY
