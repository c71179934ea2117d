"""Every form of message is read alike, rendered as the template does, or refused by name."""

from __future__ import annotations

import dataclasses
import enum
import warnings
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.errors import InvalidInputError, TokenError
from star_attention.hf.text.chat import ChatContext, continue_context, open_context
from star_attention.hf.text.messages import is_messages, normalized
from tests.conversations import (
    TEMPLATES,
    assistant,
    cut_prompt,
    system,
    tokenizer_with,
    user,
    whole_prompt,
)
from tests.engines import text_model

CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Paris"}},
}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "22 degrees", "tool_call_id": "call12345", "name": "weather"}
TRANSCRIPT = [user("How warm is it?"), CALLS, RESULT]
TOOL_TEMPLATES = ("qwen3", "llama3", "mistral_v3", "harmony")


def plain(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as transformers 5.24 makes them: without fields that are None."""
    return [{k: v for k, v in message.items() if v is not None} for message in messages]


# ------------------------------------------------------------------------------- tools


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("content", [None, "missing", ""])
def test_transcripts_with_tools(name: str, cut: int, content: str | None) -> None:
    """The query is a question, a tool's result, or nothing: the answer to the result."""
    tokenizer = tokenizer_with(TEMPLATES[name])
    call = {**CALLS, "content": content}
    if content == "missing":
        del call["content"]
    messages = [TRANSCRIPT[0], call, RESULT]
    query: list[dict[str, Any]] | None = messages[cut:] or None
    if cut == 1:
        # The user message is open: a text completes it.
        messages[0], query = user("How warm is it? Now?"), [user(" Now?"), call, RESULT]
    context = [TRANSCRIPT[0], call, RESULT][:cut]
    assert cut_prompt(tokenizer, context, query) == whole_prompt(tokenizer, plain(messages))


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_a_question_after_a_result(name: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    whole = [*TRANSCRIPT, user("Why?")]
    for query in ("Why?", [user("Why?")]):
        assert cut_prompt(tokenizer, TRANSCRIPT, query) == whole_prompt(tokenizer, plain(whole))


def test_several_results_of_which_some_are_encoded() -> None:
    tokenizer = tokenizer_with(TEMPLATES["qwen3"])
    calls = {"role": "assistant", "tool_calls": [CALL, CALL]}
    whole = [TRANSCRIPT[0], calls, RESULT, {**RESULT, "content": "a&b"}, user("Why?")]
    for cut in (2, 3, 4):
        assert cut_prompt(tokenizer, whole[:cut], whole[cut:]) == whole_prompt(tokenizer, whole)


def test_tool_calls_that_the_template_ignores_are_refused() -> None:
    """Forbids an agent's transcript whose calls are missing without a word."""
    tokenizer = tokenizer_with(TEMPLATES["chatml"])
    with pytest.raises(InvalidInputError, match=r"tool_calls of message 2 \(role 'assistant'\)"):
        open_context(tokenizer, TRANSCRIPT)
    with pytest.raises(InvalidInputError, match=r"tool_calls of message 2"):
        cut_prompt(tokenizer, [user("x")], [user("y"), CALLS, RESULT])


def test_a_query_cannot_end_in_calls() -> None:
    tokenizer = tokenizer_with(TEMPLATES["qwen3"])
    for last in (CALLS, assistant(" \n")):
        with pytest.raises(InvalidInputError, match="the answer cannot continue"):
            cut_prompt(tokenizer, [user("x")], [user("y"), last])


# ------------------------------------------------------------------------------- forms


@dataclasses.dataclass
class Part:
    text: str
    type: str = "text"


class Role(enum.StrEnum):
    USER = "user"


class Model:
    """Like a message of OpenAI's client."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def model_dump(self) -> dict[str, Any]:
        return {"refusal": None, "function_call": None, **self.__dict__}


def test_objects_and_fields_without_value() -> None:
    messages: list[Any] = [
        {"role": Role.USER, "content": (Part("a"), {"type": "input_text", "text": "b"})},
        Model(role="assistant", content=None, tool_calls=[CALL], audio=None),
    ]
    assert is_messages(messages)
    assert normalized(messages) == [user("a", "b"), {"role": "assistant", "tool_calls": [CALL]}]
    assert type(normalized(messages)[0]["role"]) is str


def test_the_callers_messages_stay_as_they_are() -> None:
    messages = [system("s"), user("a", "b")]
    opened = open_context(tokenizer_with(TEMPLATES["needle"]), messages)
    assert messages == [system("s"), user("a", "b")]
    assert (opened.question, opened.messages[-1]) == (
        "b",
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
    )


def test_one_conversation_is_told_from_several() -> None:
    """Forbids a list of messages that is read as several contexts, or prints them."""
    star = StarLLM(text_model(), tokenizer_with(TEMPLATES["chatml"]), block_size=16)
    one, two = [user("the cat")], [system("s"), user("the mat")]
    encoded = star.encode([one, two])
    assert [context.chat for context in encoded] == [star.encode(c).chat for c in (one, two)]
    with pytest.raises(InvalidInputError, match="message 2 of 2 is of type str"):
        star.encode([user("the cat"), "sat"])
    with pytest.raises(InvalidInputError, match=r"message 1 of 1 has no role, but \['content'\]"):
        star.encode([{"content": "the cat"}])
    with pytest.raises(InvalidInputError, match="message 1 of 1 has no role"):
        star.encode([{"type": "text", "text": "the cat"}])
    with pytest.raises(TokenError, match="got dict"):
        star.encode([one, user("the cat")])


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "user", "content": ["a"]}, "part 1 of type str"),
        ({"role": "user", "content": [{"type": "text"}]}, "part 1 without a text"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "of type input_audio"),
        ({"role": "user", "content": {"text": "a"}}, "has no text"),
        ({"role": "user", "content": 5}, "has no text"),
        ({"role": 5, "content": "a"}, "has no role"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "a function_call.* tool_calls"),
        ({"role": "assistant", "refusal": "No."}, "has a refusal"),
        ({"role": "assistant", "tool_calls": {"id": 1}}, "tool_calls of type dict"),
        ({"role": "user", "content": "a", "image": object()}, "a value of type object"),
    ],
)
def test_forms_that_are_refused(message: dict[str, Any], error: str) -> None:
    for messages in ([message], [user("a"), message]):
        with pytest.raises(InvalidInputError, match=error) as caught:
            normalized(messages)
        assert f"message {len(messages)} of {len(messages)}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("gemma", r"rejects message 1 \(role 'developer'\): .*; give it another role"),
        ("phi3", r"leaves out message 1 \(role 'developer'\)"),
    ],
)
def test_roles_that_the_template_does_not_know_are_refused(name: str, error: str) -> None:
    """Forbids instructions that a template drops."""
    messages = [{"role": "developer", "content": "Be brief."}, user("x")]
    with pytest.raises(InvalidInputError, match=error):
        open_context(tokenizer_with(TEMPLATES[name]), messages)


@pytest.mark.parametrize("name", ["harmony", "chatml", "llama3", "granite"])
def test_the_developer_role_and_names(name: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    whole = [{"role": "developer", "content": "Be brief."}, {**user("x y"), "name": "Ann"}]
    assert cut_prompt(tokenizer, [whole[0], {**whole[1], "content": "x "}], "y") == whole_prompt(
        tokenizer, whole
    )


# ------------------------------------------------------------------------- parts and strings


@pytest.mark.parametrize("name", ["parts_on_lines", "llama4", "gemma3", "needle"])
def test_parts_stay_parts(name: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    whole = whole_prompt(tokenizer, [user("the cat \n", "what")])
    assert cut_prompt(tokenizer, [user("the cat \n", "what")], None) == whole
    part = {"role": "user", "content": [{"type": "text", "text": "the cat \n"}]}
    assert cut_prompt(tokenizer, [part], "what") == whole


@pytest.mark.parametrize("name", ["chatml", "vicuna", "phi3"])
def test_parts_are_joined_for_a_template_of_strings(name: str) -> None:
    """Forbids the Python list that such a template writes."""
    tokenizer = tokenizer_with(TEMPLATES[name])
    messages = [user("a ", "b"), assistant("c"), user("d ", "e")]
    whole = whole_prompt(tokenizer, [user("a b"), assistant("c"), user("d e")])
    assert cut_prompt(tokenizer, messages, None) == whole
    assert cut_prompt(tokenizer, messages[:2], [messages[2]]) == whole


def test_a_string_of_a_context_saved_as_a_part() -> None:
    """Earlier versions made two parts of a string and its query."""
    tokenizer = tokenizer_with(TEMPLATES["needle"])
    opened = open_context(tokenizer, [user("the cat\n")])
    state = opened.as_dict() | {"messages": [user("the cat\n")], "parts": True}
    del state["literal"], state["template_kwargs"]
    loaded = ChatContext.from_dict(state)
    assert opened.head + continue_context(tokenizer, loaded, "what").text == whole_prompt(
        tokenizer, [user("the cat\n", "what")]
    )


# ------------------------------------------------------------------------- what cannot be cut


def test_a_query_that_moves_the_system_text_is_refused() -> None:
    """Forbids a system text that is in the context and again in the last turn."""
    tokenizer = tokenizer_with(TEMPLATES["mistral_v3"])
    context = [system("SYS"), user("DOC\n")]
    more = [user("q1"), assistant("a1"), user("q2")]
    with pytest.raises(InvalidInputError, match=r"'SYS.*ask that alone"):
        cut_prompt(tokenizer, context, more)
    whole = [system("SYS"), user("DOC\nq1"), assistant("a1"), user("q2")]
    assert cut_prompt(tokenizer, whole[:3], "q2") == whole_prompt(tokenizer, whole)


def test_a_switch_that_the_template_leaves_out_is_no_text() -> None:
    """As Nemotron's and SmolLM3's templates read it, wherever it stands."""
    source = (
        "{% set ns = namespace(think='') %}{% for m in messages %}"
        "{% if '/no_think' in m.content %}{% set ns.think = '[-]' %}{% endif %}"
        "<|im_start|>{{ m.content | replace('/no_think', '') | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{{ ns.think }}{% endif %}"
    )
    tokenizer = tokenizer_with(source)
    for context, query in (
        ([system("/no_think"), user("the cat ")], "sat"),
        ([user("/no_think"), assistant("ok")], "the cat"),
        ([user("the cat ")], "sat /no_think"),
    ):
        is_open = context[-1]["role"] == "user"
        whole = [*context[:-1], user("the cat " + query)] if is_open else [*context, user(query)]
        assert cut_prompt(tokenizer, context, query) == whole_prompt(tokenizer, whole)


SYSTEM, DOCUMENT, MORE = system("Be brief."), "the cat ", [assistant("ok"), user("Sure?")]


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma3", "needle"])
@pytest.mark.parametrize(
    ("context", "repeating", "query"),
    [
        ([user(DOCUMENT)], [user(DOCUMENT + "sat")], [user("sat")]),
        ([user(DOCUMENT, "?")], [user(DOCUMENT, "sat")], [user("sat")]),
        ([user(DOCUMENT)], [user(DOCUMENT + "sat"), *MORE], [user("sat"), *MORE]),
        ([user(DOCUMENT), MORE[0]], [user(DOCUMENT), *MORE], MORE[1:]),
    ],
)
def test_a_query_may_repeat_the_conversation(
    name: str, context: list[Any], repeating: list[Any], query: list[Any]
) -> None:
    """Forbids encoded messages that come twice, for clients that send the whole history."""
    tokenizer = tokenizer_with(TEMPLATES[name])
    opened = open_context(tokenizer, [SYSTEM, *context])
    expected = continue_context(tokenizer, opened, query)
    assert continue_context(tokenizer, opened, [SYSTEM, *repeating]) == expected


def test_one_warning_per_context() -> None:
    """Forbids a word for each query about the same thing."""
    star = StarLLM(text_model(), tokenizer_with(TEMPLATES["chatml"]), block_size=16)
    context = star.encode([user("the cat\n")])
    star.tokenizer.chat_template = TEMPLATES["chatml"].replace("helpful", "unhelpful")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        star.generate(context, ["what", "why", [user("<|im_start|>how")]], max_new_tokens=1)
        star.generate(context, "what", max_new_tokens=1)
    texts = sorted(str(warning.message) for warning in caught)
    assert [text[:20] for text in texts] == ["a text of role 'user", "the chat template re"]


def test_a_document_after_the_question_is_refused() -> None:
    """Forbids a context without its text."""
    late = "{% for m in messages | reverse %}{{ m.content }}\n{% endfor %}"
    with pytest.raises(
        InvalidInputError, match=r"writes message 1 \(role 'user'\) after the query"
    ):
        open_context(tokenizer_with(late), [user("the cat"), assistant("ok")])


def test_a_system_text_after_the_question() -> None:
    late = "{% for m in messages | reverse %}{{ m.content }}\n{% endfor %}"
    tokenizer = tokenizer_with(late)
    assert (
        cut_prompt(tokenizer, [system("Brief."), user("the cat ")], "sat")
        == "the cat sat\nBrief.\n"
    )


def test_a_clock_that_moves_between_two_renderings() -> None:
    """Forbids a context that ends where two renderings have different times."""
    ticks = iter(range(1000))
    tokenizer = tokenizer_with(TEMPLATES["phi3"])
    apply = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *args, **kwargs: (
        f"{int(next(ticks) / 20.5)} {apply(*args, **kwargs)}"
    )
    for _ in range(20):
        opened = open_context(tokenizer, [user("the cat ")])
        assert opened.head.endswith("<|user|>\nthe cat ")


def test_tools_that_move_with_the_question() -> None:
    """Forbids a context of nothing, for a template that writes tools before the last question."""
    tokenizer = tokenizer_with(TEMPLATES["mistral_v3"])
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    opened = open_context(tokenizer, TRANSCRIPT, {"tools": tools})
    assert "22 degrees" in opened.head
    tail = continue_context(tokenizer, opened, None).text
    assert tail
    assert opened.head + tail == whole_prompt(tokenizer, plain(TRANSCRIPT), tools=tools)
    with pytest.raises(InvalidInputError, match="writes the encoded messages differently"):
        continue_context(tokenizer, opened, "Why?")


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"vicuna", "falcon"}))
def test_text_that_has_been_through_the_template(name: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    content: Any = [{"type": "text", "text": "the cat"}] if name == "parts_only" else "the cat"
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    with pytest.warns(UserWarning, match="been through a template before"):
        opened = open_context(tokenizer, [user(text)])
    with pytest.warns(UserWarning, match="been through a template before"):
        continue_context(tokenizer, opened, [user(text)])


def test_a_message_is_quoted_in_part() -> None:
    """Forbids errors of templates that print a document."""
    secret = "".join(f"patient {number} " for number in range(200))
    tokenizer = tokenizer_with("{{ raise_exception('bad: ' + messages[0].content) }}")
    with pytest.raises(InvalidInputError, match="rejects these messages") as caught:
        open_context(tokenizer, [user(secret)])
    assert len(str(caught.value)) < 250
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
