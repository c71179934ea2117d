"""Contexts, queries and answers beyond the model's positions are refused before encoding."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer

from star_attention import StarLLM
from star_attention.errors import (
    ContextLengthError,
    InvalidInputError,
    TokenError,
    UnknownOptionError,
)
from star_attention.hf.loading.load import load_tokenizer
from star_attention.hf.text.tokens import context_ids, query_ids
from tests.engines import BUNDLED, engine, ids
from tests.refusals import refused

BLOCK = 20


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return engine("llama", block_size=BLOCK)


def test_a_context_beyond_the_positions(star: StarLLM) -> None:
    message = "the context has 513 tokens, more than the model's 512 positions; cut the context"
    refused(ContextLengthError, message, call=lambda: star.encode(ids(513)))
    refused(ContextLengthError, message, call=lambda: star.encode([ids(20), ids(513)]))
    assert len(star.encode(ids(512))) == 512


@pytest.mark.parametrize(
    "make", [lambda: load_tokenizer(BUNDLED), ByT5Tokenizer], ids=["fast", "slow"]
)
def test_the_tokenizer_does_not_warn_about_length(
    make: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Forbids transformers' own warning of "indexing errors" before our error."""
    tokenizer = make()
    tokenizer.model_max_length = 5
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert len(context_ids(tokenizer, "x y " * 9)) > 5
        assert len(query_ids(tokenizer, "x y " * 9)) > 5
        assert caplog.messages == []
        tokenizer("x y " * 9)
        assert "Token indices sequence length is longer" in caplog.text, "the test sees warnings"
    finally:
        logger.removeHandler(caplog.handler)


def test_query_and_answer_beyond_the_positions(star: StarLLM) -> None:
    context = star.encode(ids(500))
    message = [
        "context (500), query and answer (8) need 513 tokens, more than the model's 512",
        "lower max_new_tokens",
    ]
    refused(
        ContextLengthError, *message, call=lambda: star.generate(context, ids(5), max_new_tokens=8)
    )
    refused(
        ContextLengthError,
        *message,
        call=lambda: star.generate(context, [[5], ids(5)], max_new_tokens=8),
    )
    assert len(star.generate(context, ids(5), max_new_tokens=7).token_ids) == 7
    refused(ContextLengthError, "need 513 tokens", call=lambda: star.logits(context, ids(13)))
    assert len(star.logits(context, ids(12))) == 12


@pytest.fixture
def forwards(star: StarLLM) -> Iterator[list[int]]:
    """A list that gets an entry for each forward of the model."""
    seen: list[int] = []
    handle = star.model.get_decoder().register_forward_pre_hook(lambda *_: seen.append(1))
    yield seen
    handle.remove()


def test_a_query_that_would_fail_is_refused_before_encoding(
    star: StarLLM, forwards: list[int]
) -> None:
    """Forbids encoding a long context first, only to refuse the query."""
    message = [
        "context (500), query and answer (8) need 513 tokens, more than the model's 512",
        "lower max_new_tokens",
    ]
    for query in (ids(5), [[5], ids(5)], torch.tensor([ids(5)])):
        kwargs = dict(query=query, settings=dict(max_new_tokens=8))
        refused(
            ContextLengthError, *message, call=lambda kwargs=kwargs: star.encode(ids(500), **kwargs)
        )
        refused(
            ContextLengthError,
            *message,
            call=lambda kwargs=kwargs: star.encode([ids(20), ids(500)], **kwargs),
        )
    refused(
        ContextLengthError,
        "answer (256) need 517",
        call=lambda: star.encode(ids(256), query=ids(5)),
    )
    pinned = engine("phi3_longrope", block_size=BLOCK, reserve_tokens=10)
    kwargs = dict(query=ids(5), settings=dict(max_new_tokens=6))
    refused(
        ContextLengthError,
        "need 61 tokens, but",
        "pinned to 60",
        call=lambda: pinned.encode(ids(50), **kwargs),
    )
    refused(
        TokenError, "the query has token id 211", call=lambda: star.encode(ids(50), query=[211])
    )
    refused(
        InvalidInputError,
        "top_p: expected a number above 0 and at most 1, got 2",
        call=lambda: star.encode(ids(50), query=[5], settings=dict(top_p=2)),
    )
    refused(InvalidInputError, "needs a tokenizer", call=lambda: star.encode(ids(50), query="text"))
    with pytest.raises(UnknownOptionError, match="does not take 'topp'"):
        star.encode(ids(50), query=[5], settings=dict(topp=1))
    assert forwards == []
    assert len(star.encode(ids(500), query=ids(5), settings=dict(max_new_tokens=7))) == 500
    assert forwards


def test_an_extension_beyond_the_positions(star: StarLLM) -> None:
    context = star.encode(ids(500))
    message = "the extended context has 513 tokens, more than the model's 512 positions; cut the"
    refused(ContextLengthError, message, call=lambda: star.extend(context, ids(13)))
    assert len(star.extend(context, ids(12))) == 512


def test_positions_beyond_the_pinned_frequencies() -> None:
    star = engine("phi3_longrope", block_size=BLOCK, reserve_tokens=10)
    context = star.encode(ids(50))
    message = [
        "tokens, but the context's rotary frequencies are pinned to 60",
        "larger reserve_tokens (now 10)",
    ]
    refused(
        ContextLengthError,
        "need 61",
        *message,
        call=lambda: star.generate(context, ids(5), max_new_tokens=6),
    )
    assert len(star.generate(context, ids(5), max_new_tokens=5).token_ids) == 5
    message = [
        "has 60 tokens, but its rotary frequencies are pinned to 60",
        "encode the joined text again",
    ]
    refused(ContextLengthError, *message, call=lambda: star.extend(context, ids(10)))
    assert len(star.extend(context, ids(9))) == 59
