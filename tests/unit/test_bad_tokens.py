"""Token ids, texts and messages that cannot be encoded or asked."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from star_attention import EncodedContext, StarLLM
from star_attention.errors import (
    InvalidInputError,
    TokenError,
)
from tests.engines import bundled_tokenizer, engine, ids
from tests.refusals import refused
from tests.talkers import byte_level, talker

BLOCK = 20
MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return engine("llama", block_size=BLOCK)


@pytest.fixture(scope="module")
def reader() -> StarLLM:
    """The same with a tokenizer, whose ids above 210 the tiny model does not have."""
    return engine("llama", bundled_tokenizer(), block_size=BLOCK)


@pytest.fixture(scope="module")
def context(star: StarLLM) -> EncodedContext:
    return star.encode(ids(50))


NOT_IDS = "must be text, token ids or chat messages"
BAD_IDS = [
    pytest.param([], "is empty (0 tokens); give at least 1 token", id="none"),
    pytest.param((), "is empty (0 tokens)", id="no tuple"),
    pytest.param(torch.zeros(0, dtype=torch.int64), "is empty (0 tokens)", id="no tensor"),
    pytest.param(torch.zeros(1, 0, dtype=torch.int64), "is empty (0 tokens)", id="no row"),
    pytest.param([5, 211], "token id 211, outside the model's vocabulary 0..210", id="above"),
    pytest.param([-1, 5], "token id -1, outside the model's vocabulary 0..210", id="negative"),
    pytest.param([2**40], f"token id {2**40}, outside the model's vocabulary", id="far above"),
    pytest.param([2**70], NOT_IDS, id="above int64"),
    pytest.param([5.0, 6.5], "float32 values; token ids are integers", id="floats"),
    pytest.param([5, 6.5], "float32 values; token ids are integers", id="one float"),
    pytest.param(torch.ones(5), "float32 values; token ids are integers", id="float tensor"),
    pytest.param([True, False], "bool values; token ids are integers", id="bools"),
    pytest.param([5, None], NOT_IDS, id="a gap"),
    pytest.param(5, "token ids or chat messages, got int", id="a number"),
    pytest.param([5j], "complex64 values; token ids are integers", id="complex"),
    pytest.param({"messages": MESSAGES}, "got dict; give its messages", id="a request"),
    pytest.param([object()], "got 1 item of type object", id="objects"),
    pytest.param(io.StringIO("a text"), "got StringIO; give its text, file.read()", id="a file"),
    pytest.param(torch.tensor(5), "shape (); give one row of token ids", id="a scalar"),
    pytest.param(
        torch.ones(2, 3, 4, dtype=torch.int64), "give one row of token ids", id="three axes"
    ),
    pytest.param(b"abc", "got bytes", id="bytes"),
    pytest.param({3, 4}, "got set", id="a set"),
    pytest.param({"role": "user", "content": "x"}, "got dict", id="one message"),
]


@pytest.mark.parametrize(("content", "message"), BAD_IDS)
def test_bad_token_ids(
    content: Any, message: str, star: StarLLM, reader: StarLLM, context: EncodedContext
) -> None:
    refused(TokenError, "the context ", message, call=lambda: star.encode(content))
    refused(TokenError, "the context ", message, call=lambda: star.encode([ids(5), content]))
    refused(TokenError, "the query ", message, call=lambda: star.generate(context, content))
    refused(
        TokenError, "the query ", message, call=lambda: star.generate(context, [ids(5), content])
    )
    refused(TokenError, "the query ", message, call=lambda: star.logits(context, content))
    refused(TokenError, "the extension ", message, call=lambda: star.extend(context, content))
    refused(
        TokenError,
        "the query ",
        message,
        call=lambda: reader.stream(reader.encode(ids(50)), content),
    )


def test_the_largest_token_id_works(star: StarLLM, context: EncodedContext) -> None:
    assert len(star.encode([0, 210])) == 2
    assert len(star.generate(context, [210], max_new_tokens=1).token_ids) == 1


def test_an_empty_text(star: StarLLM, reader: StarLLM, context: EncodedContext) -> None:
    for facade in (star, reader):
        refused(
            TokenError,
            "the context is empty",
            "at least 1 token",
            call=lambda facade=facade: facade.encode(""),
        )
    refused(
        TokenError,
        "the query is empty",
        "at least 1 token",
        call=lambda: star.generate(context, ""),
    )
    refused(
        TokenError, "the query is empty", "at least 1 token", call=lambda: star.generate(context)
    )
    refused(
        TokenError,
        "the extension is empty",
        "at least 1",
        call=lambda: reader.extend(reader.encode(ids(5)), ""),
    )


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (["a", None, "b"], r"^query 2 of 3: the query is empty \(None\)"),
        (["a", ""], "^query 2 of 2: the query is empty"),
        ([" \n", "a"], "^query 1 of 2: the query .* white space"),
        (["a", "b", 3], "^query 3 of 3: the query must be text"),
        ([[5], [6, 10**6]], "^query 2 of 2: the query has token id 1000000"),
        (["a", "b\ud83d"], "^query 2 of 2: the query has a lone surrogate"),
    ],
)
def test_the_faulty_one_of_several_is_named(queries: list[Any], message: str) -> None:
    reader = talker(byte_level())
    context = reader.encode("The tea is hot.\n")
    calls: list[Callable[[], Any]] = [
        lambda: reader.generate(context, queries),
        lambda: reader.prepare("The tea is hot.\n", queries),
        lambda: reader.encode("The tea is hot.\n", query=queries),
    ]
    for call in calls:
        with pytest.raises(InvalidInputError, match=message):
            call()
    with pytest.raises(InvalidInputError, match=message.replace("query", "context")[:20]):
        reader.encode(queries)


def test_text_without_a_tokenizer(star: StarLLM, context: EncodedContext) -> None:
    needs_one = "needs a tokenizer; give one to StarLLM"
    refused(
        InvalidInputError, "text", needs_one, "or use token ids", call=lambda: star.encode("text")
    )
    refused(InvalidInputError, "chat messages need a tokenizer", call=lambda: star.encode(MESSAGES))
    refused(InvalidInputError, "text", needs_one, call=lambda: star.generate(context, "text"))
    refused(InvalidInputError, "text", needs_one, call=lambda: star.extend(context, "text"))
    refused(
        InvalidInputError,
        "a stop string",
        needs_one,
        call=lambda: star.generate(context, [5], stop="x"),
    )
    refused(
        InvalidInputError,
        "an answer prefix",
        needs_one,
        call=lambda: star.generate(context, [5], answer_prefix="x"),
    )
    refused(
        InvalidInputError, "a stream of text", needs_one, call=lambda: star.stream(context, [5])
    )


def test_a_tokenizer_of_another_model(reader: StarLLM) -> None:
    refused(
        TokenError,
        "outside the model's vocabulary 0..210; is the tokenizer the model's own?",
        call=lambda: reader.encode("The secret number for torpidity-kill"),
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user"}], "a chat message has no text: {'role': 'user'}"),
        ([{"role": "user", "content": 5}], "a chat message has no text"),
        ([{"role": "user", "content": []}], "a chat message has no text"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            "parts of type image; only text can be",
        ),
    ],
)
def test_messages_without_text(messages: list[Any], message: str, reader: StarLLM) -> None:
    refused(InvalidInputError, message, call=lambda: reader.encode(messages))


def test_messages_on_a_raw_context(reader: StarLLM) -> None:
    refused(
        InvalidInputError,
        "encode the context as messages",
        call=lambda: reader.generate(reader.encode(ids(5)), MESSAGES),
    )


def test_messages_as_an_extension(reader: StarLLM, context: EncodedContext) -> None:
    """Forbids a message that denies that they are messages."""
    message = "extend takes text or token ids, got chat messages; give the text alone"
    refused(InvalidInputError, message, call=lambda: reader.extend(context, MESSAGES))


def test_something_else_as_a_context(star: StarLLM) -> None:
    for call in (star.generate, star.logits, star.extend):
        refused(
            InvalidInputError,
            "context: expected an EncodedContext, got str; call encode first",
            call=lambda c=call: c("a", [5]),
        )
