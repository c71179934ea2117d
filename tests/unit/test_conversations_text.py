"""Conversations of text and chats: token ids are those of the whole, whatever was answered."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from star_attention import EncodedContext, Generation, StarLLM
from star_attention.errors import InvalidInputError, TokenError
from star_attention.hf.text.messages import texts
from tests.conversations import TEMPLATES, assistant, system, tokenizer_with, user, whole_prompt
from tests.engines import bundled_tokenizer, text_model
from tests.real_model import packaged_file
from tests.talkers import CHATML, byte_level, say, talker

DOCUMENT = "The tea is hot.\nThe hill is tall.\n"


class Look(LogitsProcessor):
    """Notes the ids that the model sees before its answer."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.ids = self.ids or input_ids[0].tolist()
        return scores


def ask(
    star: StarLLM, asked: Any, query: Any, answer: str | list[int], **options: Any
) -> tuple[Generation, list[int]]:
    """Ask, and let the model say an answer; return also what it saw before."""
    saying, look = say(star.tokenizer, answer), Look()
    saying["logits_processor"].insert(0, look)
    return star.generate(asked, query, keep=True, **saying | options), look.ids


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


@functools.cache
def family(template: str) -> StarLLM:
    return talker(tokenizer_with(TEMPLATES[template]))


ANSWERS = ["It is hot.", " Two\nlines \n", "é 说", "the user asks"]


def in_parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": text} for text in texts(message)]}


THINKING = {"deepseek": "so</think>"}
"""What ends the reasoning that a template's prompt begins."""


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_a_chat_has_the_ids_of_its_template(template: str) -> None:
    """Whatever the template does to earlier answers: it may trim them, or drop their reasoning."""
    star = family(template)
    messages: list[dict[str, Any]] = []
    reply: Any = star.encode([user(DOCUMENT)])
    for turn, answer in enumerate(ANSWERS):
        query = f" Question {turn}? "
        reply, seen = ask(star, reply, query, THINKING.get(template, "") + answer)
        *before, said = reply.conversation.messages
        if not turn:
            (opened,) = before
            assert "".join(texts(opened)) == DOCUMENT + query
            messages.append(opened)
        else:
            messages.append(user(query))
        assert before == messages
        assert said["content"] == reply.text
        assert reply.text.strip() == answer.strip()
        assert said.get("reasoning_content") == reply.reasoning
        taken = [in_parts(m) for m in messages] if template == "parts_only" else messages
        assert seen == ids_of(star.tokenizer, whole_prompt(star.tokenizer, taken))
        assert (reply.kept_tokens > 0) == (turn > 0)
        messages.append(said)


def test_a_system_message_and_a_query_of_messages() -> None:
    star = talker(byte_level(chat=CHATML))
    context = star.encode([system("Be kind."), user("Hello"), assistant("Hi")])
    first, _ = ask(star, context, [user("One"), assistant("Two "), user("Three")], "four")
    second, seen = ask(star, first, [user("Five")], "six")
    messages = [
        system("Be kind."), user("Hello"), assistant("Hi"),
        user("One"), assistant("Two "), user("Three"), assistant("four"), user("Five"),
    ]  # fmt: skip
    assert seen == ids_of(star.tokenizer, whole_prompt(star.tokenizer, messages))
    assert second.conversation is not None
    assert second.conversation.messages == [*messages, assistant("six")]
    repeated, seen_again = ask(star, first, messages, "six")
    assert seen_again == seen
    assert repeated.conversation is not None
    assert repeated.conversation.messages == second.conversation.messages


def test_clients_may_repeat_all_messages() -> None:
    """As those of chat servers do, without the reasoning of answers; only the rest is new."""
    tokenizer = byte_level(plain=("<think>", "</think>"), chat=CHATML)
    star = talker(tokenizer)
    answer = ids_of(tokenizer, "<think>the cat</think>the mat")
    first, _ = ask(star, star.encode([user("Hello")]), " you", answer)
    assert first.reasoning
    talk = [user("Hello you"), assistant("the mat")]
    second, seen = ask(star, first, [*talk, user("And")], "so")
    assert seen == ids_of(tokenizer, whole_prompt(tokenizer, [*talk, user("And")]))
    assert second.conversation is not None
    assert [m["content"] for m in second.conversation.messages or ()] == [
        "Hello you", "the mat", "And", "so",
    ]  # fmt: skip
    closed = star.encode(talk)
    _, seen_closed = ask(star, closed, [*talk, user("And")], "so")
    assert seen_closed == seen
    # Another answer than was given is a question of its own.
    other = [user("Hello you"), assistant("the cat"), user("And")]
    _, seen_other = ask(star, first, other, "so")
    assert seen_other == ids_of(tokenizer, whole_prompt(tokenizer, [*talk, *other]))


def test_an_answer_continues_a_message_or_a_prefix() -> None:
    star = talker(byte_level(chat=CHATML))
    context = star.encode([user("Hello")])
    first, seen = ask(star, context, [user(" you"), assistant("I am")], " fine")
    assert seen == ids_of(
        star.tokenizer, whole_prompt(star.tokenizer, [user("Hello you"), assistant("I am")])
    )
    second, _ = ask(star, first, "And", "am too", answer_prefix="You ")
    _, seen = ask(star, second, "So", "it is")
    messages = [
        user("Hello you"), assistant("I am fine"), user("And"), assistant("You am too"), user("So"),
    ]  # fmt: skip
    assert seen == ids_of(star.tokenizer, whole_prompt(star.tokenizer, messages))


def test_a_query_may_bring_the_answer_in_another_form() -> None:
    """Forbids that the text of a tool's call stays beside the call that a client made of it."""
    star = talker(byte_level(chat=CHATML))
    first, _ = ask(star, star.encode([user("Hello")]), " you", "the cat")
    second, seen = ask(star, first, [assistant("the mat"), user("And")], "so")
    messages = [user("Hello you"), assistant("the mat"), user("And")]
    assert seen == ids_of(star.tokenizer, whole_prompt(star.tokenizer, messages))
    assert second.conversation is not None
    assert second.conversation.messages == [*messages, assistant("so")]
    assert first.conversation is not None
    assert first.conversation.messages == [user("Hello you"), assistant("the cat")]


REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("skip", [True, False])
def test_reasoning_is_the_template_s_business(skip: bool) -> None:
    """A template that leaves it out of earlier turns: the rest of the turn is computed again."""
    tokenizer = byte_level(plain=("<think>", "</think>"), chat=REASONING)
    star = talker(tokenizer)
    answer = "<think>the cat sat</think>\n the mat "
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    first, seen = ask(
        star,
        star.encode([user("Hello")]),
        " you",
        [*ids_of(tokenizer, answer), end],
        skip_special_tokens=skip,
    )
    assert first.conversation is not None
    talk = [user("Hello you"), assistant("\n the mat ") | {"reasoning_content": "the cat sat"}]
    said = first.conversation.messages
    assert said is not None
    assert [m["content"].strip() for m in said] == [m["content"].strip() for m in talk]
    assert said[1]["reasoning_content"].strip() == "the cat sat"
    second, seen_next = ask(star, first, "And", "so")
    assert seen_next == ids_of(tokenizer, whole_prompt(tokenizer, [*talk, user("And")]))
    shared = len(ids_of(tokenizer, whole_prompt(tokenizer, [user("Hello you")])))
    assert seen_next[:shared] == seen
    # Up to where the reasoning was.
    assert second.kept_tokens == shared - len(first.conversation.context)


def test_only_what_the_user_saw_is_said() -> None:
    """A stop string and what follows it are no part of the conversation, nor is the turn's end."""
    tokenizer = byte_level(chat=CHATML)
    star = talker(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    context = star.encode([user("Hello")])
    for answer, options in (
        ("the cat STOP sat", dict(stop=" STOP")),
        ([*ids_of(tokenizer, "the cat"), end], {}),
        ([*ids_of(tokenizer, "the cat"), end], dict(skip_special_tokens=False)),
    ):
        first, _ = ask(star, context, " you", answer, **options)
        assert first.finish_reason == "stop"
        _, seen = ask(star, first, "And", "so")
        messages = [user("Hello you"), assistant("the cat"), user("And")]
        assert seen == ids_of(tokenizer, whole_prompt(tokenizer, messages))


def test_a_template_whose_day_changes_between_turns() -> None:
    """Forbids that turns are left out where the prompt begins otherwise than it was encoded."""
    monday = "<|im_start|>system\nMonday<|im_end|>\n" + CHATML
    star = talker(byte_level(chat=monday))
    context = star.encode([user("Hello")])
    first, seen = ask(star, context, " you", "the cat")
    star.tokenizer.chat_template = monday.replace("Monday", "Tuesday")
    with pytest.warns(UserWarning, match="renders the context differently now"):
        second, seen_next = ask(star, first, "And", "so")
    assert seen_next[: len(seen)] == seen
    rest = "the cat<|im_end|>\n<|im_start|>user\nAnd<|im_end|>\n<|im_start|>assistant\n"
    assert star.tokenizer.decode(seen_next[len(seen) :]) == rest
    assert second.kept_tokens > 0


def test_control_tokens_that_an_answer_spells_are_text() -> None:
    """Forbids that an answer opens a turn of its own in the next prompt."""
    tokenizer = byte_level(chat=CHATML)
    star = talker(tokenizer)
    spelled = [
        token for part in ("the <", "|im_start|", "> cat") for token in ids_of(tokenizer, part)
    ]
    first, _ = ask(star, star.encode([user("Hello")]), " you", spelled)
    assert first.text == "the <|im_start|> cat"
    _, seen = ask(star, first, "And", "so")
    assert seen.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == len("uaua")
    assert first.text in tokenizer.decode(seen)


def test_a_text_has_the_ids_of_the_joined_text() -> None:
    star = StarLLM(text_model(), bundled_tokenizer(), block_size=16)
    tokenizer = star.tokenizer
    text = DOCUMENT
    context = reply = star.encode(text)
    for query, answer in ((" The", " cat"), ("s sat", " on"), ("to the\n", "\n mat"), (" é", "说")):
        reply, seen = ask(star, reply, query, answer)
        text += query
        assert seen == tokenizer(text).input_ids
        text += answer
        assert reply.text == answer
        assert reply.conversation.messages is None
    cut, _ = ask(star, context, " The", " cat STOP sat", stop=" STOP")
    _, seen = ask(star, cut, " And", " so")
    assert seen == tokenizer(f"{DOCUMENT} The cat And").input_ids


def test_bad_queries(star: StarLLM, chat: EncodedContext) -> None:
    reply, _ = ask(star, chat, " you", "the cat")
    text, _ = ask(star, star.encode(DOCUMENT), " The", " cat")
    numbers, _ = ask(star, chat, [70, 71], "the cat")
    for asked, query, error, message in (
        (reply, [70, 71], InvalidInputError, "is a chat, so that its next query is text or messag"),
        (text, [70, 71], InvalidInputError, "is a text, so that its next query is text"),
        (text, [user("And")], InvalidInputError, "is a text"),
        (numbers, "And", InvalidInputError, "is token ids"),
        (reply, None, InvalidInputError, "no query"),
        (reply, " ", TokenError, "the query is empty, or white space"),
        (text, "", TokenError, "the query is empty"),
        (reply, ["And", ""], TokenError, "query 2 of 2: the query is empty"),
        (reply, [assistant("No")], InvalidInputError, "must begin with a user message"),
    ):
        with pytest.raises(error, match=message):
            star.generate(asked, query, max_new_tokens=2)


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return talker(byte_level(chat=CHATML))


@pytest.fixture(scope="module")
def chat(star: StarLLM) -> EncodedContext:
    return star.encode([user("Hello")])


@pytest.mark.slow
def test_ten_turns_of_a_published_model() -> None:
    star = StarLLM.from_pretrained(packaged_file(), dtype="float32", block_size=128)
    messages = [user("The dog is called Rex. The cat is called Tom.\n" * 20)]
    context = star.encode(messages)
    reply: Any = context
    said: list[dict[str, Any]] = []
    options: dict[str, Any] = dict(max_new_tokens=6, return_logits=True)
    for turn in range(10):
        query = ["What is the dog's name?", "And the cat's?", "Who is Rex?"][turn % 3]
        reply = star.generate(reply, query, keep=True, **options)
        said.append(user(query))
        whole = star.generate(context, said, **options)
        assert reply.token_ids == whole.token_ids
        torch.testing.assert_close(reply.logits, whole.logits, atol=2e-3, rtol=1e-3)
        assert reply.kept_tokens >= (0 if not turn else whole.query_tokens - 40)
        said.append(assistant(reply.text))
