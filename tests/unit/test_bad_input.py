"""Bad input, each with its own error of ours that names the value, the limit and the remedy.

Files that cannot be saved or loaded are in test_saved.py, text files in test_cli.py.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer

from star_attention import EncodedContext, StarLLM, supported
from star_attention.errors import (
    ContextLengthError,
    InvalidInputError,
    ModelNotFoundError,
    SizeError,
    StarAttentionError,
    TokenError,
    UnknownOptionError,
    UnsupportedModelError,
)
from star_attention.hf.loading.load import load_tokenizer
from star_attention.hf.text.tokens import context_ids, query_ids
from tests.engines import BUNDLED, bundled_tokenizer, engine, ids, tiny
from tests.families import FAMILIES, REFUSED, UNUSUAL, build

BLOCK = 20
Call = Callable[..., Any]
MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return engine("llama", block_size=BLOCK)


@pytest.fixture(scope="module")
def reader() -> StarLLM:
    """The same with a tokenizer (whose ids above 210 the tiny model does not have)."""
    return engine("llama", bundled_tokenizer(), block_size=BLOCK)


@pytest.fixture(scope="module")
def context(star: StarLLM) -> EncodedContext:
    return star.encode(ids(50))


def refused(kind: type[Exception], *pieces: str, call: Call) -> None:
    """`call` raises `kind` with every piece in one line or sentence of its message."""
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, StarAttentionError)
    assert isinstance(caught.value, ValueError)
    for piece in pieces:
        assert piece in str(caught.value), f"{piece!r} is not in {caught.value}"


# ---------------------------------------------------------------------- tokens

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
    pytest.param(5, NOT_IDS, id="a number"),
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
    for one in (star, reader):
        refused(
            TokenError,
            "the context is empty",
            "at least 1 token",
            call=lambda one=one: one.encode(""),
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


def test_text_without_a_tokenizer(star: StarLLM, context: EncodedContext) -> None:
    needs = "needs a tokenizer; give one to StarLLM"
    refused(InvalidInputError, "text", needs, "or use token ids", call=lambda: star.encode("text"))
    refused(InvalidInputError, "chat messages need a tokenizer", call=lambda: star.encode(MESSAGES))
    refused(InvalidInputError, "text", needs, call=lambda: star.generate(context, "text"))
    refused(InvalidInputError, "text", needs, call=lambda: star.extend(context, "text"))
    refused(
        InvalidInputError,
        "a stop string",
        needs,
        call=lambda: star.generate(context, [5], stop="x"),
    )
    refused(
        InvalidInputError,
        "an answer prefix",
        needs,
        call=lambda: star.generate(context, [5], answer_prefix="x"),
    )
    refused(InvalidInputError, "a stream of text", needs, call=lambda: star.stream(context, [5]))


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
    """Forbids that they are said to be no messages."""
    says = "extend takes text or token ids, got chat messages; give the text alone"
    refused(InvalidInputError, says, call=lambda: reader.extend(context, MESSAGES))


def test_what_is_not_a_context(star: StarLLM) -> None:
    for call in (star.generate, star.logits, star.extend):
        refused(
            InvalidInputError,
            "context: expected an EncodedContext, got str; call encode first",
            call=lambda c=call: c("a", [5]),
        )


# ---------------------------------------------------------------------- sizes and settings

NOT_A_SIZE = "is not a number of tokens; write 4096, '4k', '128k' or '1m'"
BAD_SETTINGS = [
    (dict(block_size="4x"), SizeError, ["block_size '4x'", NOT_A_SIZE]),
    (dict(block_size=""), SizeError, ["block_size ''", NOT_A_SIZE]),
    (dict(block_size="1.0001k"), SizeError, ["block_size '1.0001k'", NOT_A_SIZE]),
    (dict(block_size=4096.0), SizeError, ["block_size 4096.0", NOT_A_SIZE]),
    (dict(block_size=True), SizeError, ["block_size True", NOT_A_SIZE]),
    (dict(block_size=0), SizeError, ["block_size 0 is below 1", "give a positive number"]),
    (dict(block_size="-4k"), SizeError, ["block_size -4096 is below 1", "give a positive number"]),
    (dict(anchor_size="x"), SizeError, ["anchor_size 'x'", NOT_A_SIZE]),
    (dict(anchor_size=-1), SizeError, ["anchor_size -1 is negative", "give 0 (no anchor)"]),
    (
        dict(block_size=10, anchor_size=11),
        SizeError,
        ["anchor_size 11 is above block_size 10", "at most 10"],
    ),
    (dict(tokens_per_forward="q"), SizeError, ["tokens_per_forward 'q'", NOT_A_SIZE]),
    (
        dict(tokens_per_forward=0),
        SizeError,
        ["tokens_per_forward 0 is below 1", "give a positive number"],
    ),
    (dict(reserve_tokens=0), SizeError, ["reserve_tokens 0 is below 1", "at least one token"]),
    (dict(reserve_tokens=None), SizeError, ["reserve_tokens None", NOT_A_SIZE]),
    (
        dict(method="stare"),
        InvalidInputError,
        ["method 'stare' is unknown; choose one of star, dense"],
    ),
    (dict(method=["star"]), InvalidInputError, ["method ['star'] is unknown"]),
    (
        dict(comm="nccl"),
        InvalidInputError,
        ["comm 'nccl' is unknown; use None, 'solo' for one process, or a TorchComm"],
    ),
]


@pytest.mark.parametrize(
    ("settings", "kind", "pieces"), BAD_SETTINGS, ids=lambda v: str(v) if type(v) is dict else ""
)
def test_bad_settings(
    settings: dict[str, Any], kind: type[Exception], pieces: list[str], tmp_path: Path
) -> None:
    refused(kind, *pieces, call=lambda: engine("llama", **settings))
    # Before the model is looked for.
    refused(kind, *pieces, call=lambda: StarLLM.from_pretrained(tmp_path / "none", **settings))


def test_an_anchor_above_the_block_of_the_rule() -> None:
    """The block size is known only with the context."""
    star = engine("llama", anchor_size=2000)
    refused(
        SizeError, "anchor_size 2000 is above block_size 1024", call=lambda: star.encode(ids(30))
    )


def test_unknown_settings_are_type_errors(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="blocksize"):
        engine("llama", blocksize=5)
    with pytest.raises(TypeError, match="blocksize"):
        StarLLM.from_pretrained(tmp_path, blocksize=5)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("torch_dtype", "does not take 'torch_dtype'; use dtype="),
        (
            "device_map",
            "does not take 'device_map'; use device=, or to spread the layers model_kwargs=",
        ),
        ("tokenizer", "it is loaded with the model; to use another, set the engine's tokenizer"),
        ("blocksize", "does not take 'blocksize'; did you mean 'block_size'?"),
        ("revision", "give arguments of transformers as model_kwargs={'revision': ...}"),
        ("unknown", "give arguments of transformers as model_kwargs="),
    ],
)
def test_words_that_from_pretrained_does_not_take(word: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError) as raised:
        StarLLM.from_pretrained(tmp_path, **{word: 1})
    assert isinstance(raised.value, UnknownOptionError)
    assert says in str(raised.value)


def test_an_engine_says_what_it_is() -> None:
    assert repr(engine("llama")) == "StarLLM(llama, star, cpu, float32)"
    sized = engine("llama", block_size="4k", anchor_size=12, method="dense")
    assert repr(sized) == "StarLLM(llama, dense, block_size=4096, anchor_size=12, cpu, float32)"


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "2"}, "the environment lacks RANK, MASTER_ADDR, MASTER_PORT"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"},
            "the environment lacks MASTER_PORT",
        ),
        (
            {"WORLD_SIZE": "many", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "WORLD_SIZE 'many' is not a number",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "RANK 2 is not below WORLD_SIZE 2",
        ),
    ],
)
def test_an_environment_of_several_processes_that_is_not_whole(
    environment: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused(InvalidInputError, says, call=lambda: engine("llama"))
    refused(InvalidInputError, says, "comm='solo'", call=lambda: StarLLM.from_pretrained(BUNDLED))
    assert engine("llama", comm="solo").config.method == "star"


@pytest.mark.parametrize("world", ["1", ""])
def test_one_process_is_one(world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    assert engine("llama").config.method == "star"


# ---------------------------------------------------------------------- positions


def test_a_context_beyond_the_positions(star: StarLLM) -> None:
    says = "the context has 513 tokens, more than the model's 512 positions; cut the context"
    refused(ContextLengthError, says, call=lambda: star.encode(ids(513)))
    refused(ContextLengthError, says, call=lambda: star.encode([ids(20), ids(513)]))
    assert len(star.encode(ids(512))) == 512


@pytest.mark.parametrize(
    "make", [lambda: load_tokenizer(BUNDLED), ByT5Tokenizer], ids=["fast", "slow"]
)
def test_the_tokenizer_does_not_speak_of_length(
    make: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Forbids transformers' own line, of "indexing errors", in front of our error."""
    tokenizer = make()
    tokenizer.model_max_length = 5
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert len(context_ids(tokenizer, "x y " * 9)) > 5
        assert len(query_ids(tokenizer, "x y " * 9)) > 5
        assert caplog.messages == []
        tokenizer("x y " * 9)
        assert "Token indices sequence length is longer" in caplog.text, "the probe sees it"
    finally:
        logger.removeHandler(caplog.handler)


def test_query_and_answer_beyond_the_positions(star: StarLLM) -> None:
    context = star.encode(ids(500))
    says = [
        "context (500), query and answer (8) need 513 tokens, more than the model's 512",
        "lower max_new_tokens",
    ]
    refused(
        ContextLengthError, *says, call=lambda: star.generate(context, ids(5), max_new_tokens=8)
    )
    refused(
        ContextLengthError,
        *says,
        call=lambda: star.generate(context, [[5], ids(5)], max_new_tokens=8),
    )
    assert len(star.generate(context, ids(5), max_new_tokens=7).token_ids) == 7
    refused(ContextLengthError, "need 513 tokens", call=lambda: star.logits(context, ids(13)))
    assert len(star.logits(context, ids(12))) == 12


@pytest.fixture
def forwards(star: StarLLM) -> Iterator[list[int]]:
    """One entry for each forward of the model."""
    seen: list[int] = []
    handle = star.model.get_decoder().register_forward_pre_hook(lambda *_: seen.append(1))
    yield seen
    handle.remove()


def test_what_an_answer_would_be_refused_for_is_said_before_encoding(
    star: StarLLM, forwards: list[int]
) -> None:
    """Forbids a long context that is encoded in vain."""
    says = [
        "context (500), query and answer (8) need 513 tokens, more than the model's 512",
        "lower max_new_tokens",
    ]
    for query in (ids(5), [[5], ids(5)], torch.tensor([ids(5)])):
        eight = dict(query=query, settings=dict(max_new_tokens=8))
        refused(ContextLengthError, *says, call=lambda words=eight: star.encode(ids(500), **words))
        refused(
            ContextLengthError,
            *says,
            call=lambda words=eight: star.encode([ids(20), ids(500)], **words),
        )
    refused(
        ContextLengthError,
        "answer (256) need 517",
        call=lambda: star.encode(ids(256), query=ids(5)),
    )
    pinned = engine("phi3_longrope", block_size=BLOCK, reserve_tokens=10)
    words = dict(query=ids(5), settings=dict(max_new_tokens=6))
    refused(
        ContextLengthError,
        "need 61 tokens, but",
        "pinned to 60",
        call=lambda: pinned.encode(ids(50), **words),
    )
    refused(
        TokenError, "the query has token id 211", call=lambda: star.encode(ids(50), query=[211])
    )
    refused(
        InvalidInputError,
        "top_p 2",
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
    says = "the extended context has 513 tokens, more than the model's 512 positions; cut the extension"
    refused(ContextLengthError, says, call=lambda: star.extend(context, ids(13)))
    assert len(star.extend(context, ids(12))) == 512


def test_positions_beyond_the_pinned_frequencies() -> None:
    star = engine("phi3_longrope", block_size=BLOCK, reserve_tokens=10)
    context = star.encode(ids(50))
    says = [
        "tokens, but the context's rotary frequencies are pinned to 60",
        "larger reserve_tokens (now 10)",
    ]
    refused(
        ContextLengthError,
        "need 61",
        *says,
        call=lambda: star.generate(context, ids(5), max_new_tokens=6),
    )
    assert len(star.generate(context, ids(5), max_new_tokens=5).token_ids) == 5
    says = [
        "has 60 tokens, but its rotary frequencies are pinned to 60",
        "encode the joined text again",
    ]
    refused(ContextLengthError, *says, call=lambda: star.extend(context, ids(10)))
    assert len(star.extend(context, ids(9))) == 59


# ---------------------------------------------------------------------- generation words


@pytest.mark.parametrize(
    ("word", "says"),
    [
        (
            "tempratur",
            "does not take 'tempratur'; did you mean 'temperature'",
        ),
        ("qqqq", "does not take 'qqqq'; it takes those of transformers' GenerationConfig"),
        (
            "generation_config",
            "does not take 'generation_config'; the model's own is in use already: give the arguments that differ",
        ),
        ("use_cache", "does not take 'use_cache'; the encoded context is the cache"),
        ("cache_implementation", "does not take 'cache_implementation'"),
        ("max_length", "max_length counts the context too; use max_new_tokens"),
        ("min_length", "min_length counts the context too; use min_new_tokens"),
    ],
)
def test_an_unknown_word_is_a_type_error(
    word: str, says: str, star: StarLLM, context: EncodedContext
) -> None:
    with pytest.raises(TypeError, match=says) as raised:
        star.generate(context, ids(5), **{word: 1})
    assert isinstance(raised.value, UnknownOptionError)


BAD_WORDS = [
    (dict(max_new_tokens=0), "max_new_tokens 0 is not a positive number of tokens"),
    (dict(max_new_tokens=2.5), "max_new_tokens 2.5 is not a positive number of tokens"),
    (dict(max_new_tokens=None), "max_new_tokens None is not a positive number"),
    (dict(max_new_tokens=True), "max_new_tokens True is not a positive number"),
    (
        dict(min_new_tokens=5),
        "min_new_tokens 5 does not work; give a whole number up to max_new_tokens 3",
    ),
    (dict(temperature=-0.5), "temperature -0.5 does not work; give a number of at least 0"),
    (dict(temperature="hot"), "temperature 'hot' does not work"),
    (dict(temperature=float("nan")), "temperature nan does not work"),
    (dict(top_p=2.0), "top_p 2.0 does not work; give a number above 0 and at most 1"),
    (dict(top_p="x"), "top_p 'x' does not work"),
    (dict(top_k=-1), "top_k -1 does not work; give a whole number of at least 0"),
    (dict(top_k=1.5), "top_k 1.5 does not work"),
    (dict(min_p=3), "min_p 3 does not work; give a number of at least 0 and at most 1"),
    (dict(typical_p=0.0), "typical_p 0.0 does not work; give a number above 0 and at most 1"),
    (dict(repetition_penalty=0.0), "repetition_penalty 0.0 does not work; give a number above 0"),
    (dict(no_repeat_ngram_size=-1), "no_repeat_ngram_size -1 does not work"),
    (dict(do_sample="maybe"), "do_sample 'maybe' does not work; give True or False"),
    (dict(num_beams=0), "num_beams 0 does not work; give a whole number of at least 1"),
    (dict(num_beams="2"), "num_beams '2' does not work"),
    (
        dict(num_return_sequences=0),
        "num_return_sequences 0 does not work; give a whole number of at least 1",
    ),
    (dict(num_return_sequences=2), "num_return_sequences"),
    (
        dict(num_return_sequences=3, num_beams=2),
        "`num_return_sequences` (3) has to be smaller or equal to",
    ),
    (dict(num_beams=2, length_penalty="x"), "length_penalty 'x' does not work; give a number"),
    (
        dict(num_beams=2, early_stopping="x"),
        "`early_stopping` must be a boolean or 'never', but is x",
    ),
    (dict(num_beams=2, return_logits=True), "not with beams; use StarLLM.logits instead"),
    (dict(max_time=-1), "max_time -1 does not work; give a number above 0"),
    (
        dict(eos_token_id=211),
        "eos_token_id 211 is outside the model's vocabulary; give token ids in 0..210",
    ),
    (dict(eos_token_id=[5, -5]), "eos_token_id -5 is outside the model's vocabulary"),
    (dict(pad_token_id=9999), "pad_token_id 9999 is outside the model's vocabulary"),
    (dict(forced_eos_token_id=211), "forced_eos_token_id 211 is outside"),
    (dict(suppress_tokens=[5, 211]), "suppress_tokens 211 is outside"),
    (dict(bad_words_ids=[]), "`bad_words_ids` has to be a non-empty list"),
    (dict(sequence_bias={}), "`sequence_bias` has to be a non-empty dictionary"),
    (dict(exponential_decay_length_penalty=(1,)), "these generation settings do not work"),
    (dict(assistant_early_exit=1), "assistant_early_exit does not work with an encoded context"),
    (dict(dola_layers="low"), "dola generation, which transformers no longer holds"),
    (dict(num_beams=4, num_beam_groups=2), "group beam search, which transformers no longer holds"),
    (dict(constraints=[]), "constrained beam search, which transformers no longer holds"),
    (
        dict(do_sample=False, penalty_alpha=0.6, top_k=4),
        "contrastive search, which transformers no longer holds",
    ),
    (dict(seed="x"), "seed 'x' is not an integer"),
    (dict(seed=1.5), "seed 1.5 is not an integer"),
    (dict(seed=2**64), "has more than 64 bits; give a smaller number"),
    (dict(stop=""), "stop string '' is empty or not a str; give at least one character"),
    (dict(stop=["a", 3]), "stop string 3 is empty or not a str"),
    (dict(stop=5), "stop 5: expected a str or a list of str, got int"),
    (dict(answer_prefix=5), "answer_prefix 5: expected a str, got int"),
    (dict(logits_processor=5), "logits_processor: expected a list of them, got int"),
    (dict(stopping_criteria=5), "stopping_criteria: expected a list of them, got int"),
]


@pytest.mark.parametrize(("words", "says"), BAD_WORDS, ids=[str(words) for words, _ in BAD_WORDS])
def test_a_bad_value_of_a_known_word(
    words: dict[str, Any], says: str, reader: StarLLM, capfd: pytest.CaptureFixture[str]
) -> None:
    context = reader.encode(ids(50))
    refused(
        InvalidInputError,
        says,
        call=lambda: reader.generate(context, ids(5), **{"max_new_tokens": 3} | words),
    )


@pytest.mark.parametrize(
    "words",
    [
        dict(temperature=0),
        dict(temperature=0.0, top_p=0.9),
        dict(top_k=0, do_sample=True, seed=-1),
        dict(top_p=1.0, seed=2**63),
        dict(num_beams=2, length_penalty=-1.0),
        dict(do_sample=None, temperature=None),
        dict(repetition_penalty=0.5),
        dict(min_new_tokens=3),
        dict(eos_token_id=[5, 210], pad_token_id=0),
    ],
    ids=str,
)
def test_values_at_the_limit_work(
    words: dict[str, Any], star: StarLLM, context: EncodedContext
) -> None:
    """Forbids limits that are too narrow."""
    assert star.generate(context, ids(5), **{"max_new_tokens": 3} | words).token_ids


def test_streams_have_one_answer(reader: StarLLM) -> None:
    context = reader.encode(ids(50))
    one = "a stream is one answer by greedy search or sampling; use generate"
    refused(InvalidInputError, one, call=lambda: reader.stream(context, ids(5), num_beams=2))
    refused(
        InvalidInputError,
        one,
        call=lambda: reader.stream(context, ids(5), do_sample=True, num_return_sequences=2),
    )
    refused(
        InvalidInputError,
        "a stream answers one query, got 2; use generate",
        call=lambda: reader.stream(context, [ids(5), ids(6)]),
    )
    stream = reader.stream(context, ids(5), max_new_tokens=3)
    refused(
        InvalidInputError,
        "the stream has not ended; exhaust it or call close()",
        call=lambda: stream.result,
    )


# ---------------------------------------------------------------------- models that cannot run

RUNNING_STATE, LINEAR = (
    "running state instead of keys and values of all tokens",
    "linear-attention layers",
)
OFF_INTERFACE = "attention does not go through transformers' attention interface"
WHY = {
    "mamba": RUNNING_STATE,
    "mamba2": RUNNING_STATE,
    "falcon_mamba": RUNNING_STATE,
    "rwkv": RUNNING_STATE,
    "jamba": LINEAR,
    "bamba": LINEAR,
    "falcon_h1": "hybrid layers",
    "granitemoehybrid": LINEAR,
    "qwen3_next": LINEAR,
    "qwen3_5": LINEAR,
    "minimax": LINEAR,
    "recurrent_gemma": "running state instead of keys and values",
    "lfm2": "conv layers",
    "llama4": "chunked-attention layers",
    "deepseek_v32": "selects keys with an indexer of its own",
    "glm_moe_dsa": "selects keys with an indexer of its own",
    "deepseek_v4": "compressed_attention layers",
    "doge": "a bias for each key",
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    "bert": "attends in both directions",
    "bloom": OFF_INTERFACE,
    "mpt": OFF_INTERFACE,
    "codegen": OFF_INTERFACE,
    "gptj": OFF_INTERFACE,
    "falcon": OFF_INTERFACE,
}


@pytest.mark.parametrize("name", REFUSED)
def test_families_are_refused_by_name_with_the_reason(name: str, tmp_path: Path) -> None:
    config, model = REFUSED[name](), build(name)
    for thing in (config, model):
        answer = supported(thing)
        assert not answer
        assert any(WHY[name] in reason for reason in answer.reasons), answer
        assert str(answer).startswith("not supported: ")
    refused(UnsupportedModelError, type(model).__name__, WHY[name], call=lambda: StarLLM(model))
    # Before any weight is read: the folder holds none.
    config.save_pretrained(tmp_path)
    refused(
        UnsupportedModelError,
        config.model_type,
        WHY[name],
        call=lambda: StarLLM.from_pretrained(tmp_path),
    )
    assert not supported(tmp_path)


@pytest.mark.parametrize("name", FAMILIES | UNUSUAL)
def test_no_family_is_refused_by_mistake(name: str) -> None:
    answer = supported((FAMILIES | UNUSUAL)[name]())
    assert answer, answer
    assert str(answer) == "supported"


@pytest.mark.parametrize("thing", [None, 5, torch.nn.Linear(2, 3), torch.nn.Linear])
def test_what_is_no_model(thing: Any) -> None:
    refused(
        UnsupportedModelError,
        type(thing).__name__,
        "is not a transformers model",
        call=lambda: StarLLM(thing),
    )
    assert "is not a transformers model" in str(supported(thing))


def test_a_model_in_training_mode() -> None:
    model = build("llama").train()
    says = "LlamaForCausalLM is in training mode; call model.eval() first"
    refused(InvalidInputError, says, call=lambda: StarLLM(model))
    assert StarLLM(model.eval())


def test_prompt_tuning() -> None:
    words = PromptTuningConfig(
        num_virtual_tokens=4, task_type="CAUSAL_LM", num_layers=3, token_dim=72
    )
    model = get_peft_model(build("llama"), words).eval()
    says = ["virtual tokens before every forward", "adapters inside the layers (LoRA) work"]
    refused(UnsupportedModelError, *says, call=lambda: StarLLM(model))
    assert "virtual tokens" in str(supported(model))


# ---------------------------------------------------------------------- model folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete model folder."""
    folder = tmp_path / "model"
    tiny("llama").save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{BUNDLED}/{name}", folder / name)
    return folder


def load(folder: object, **settings: Any) -> StarLLM:
    return StarLLM.from_pretrained(folder, **settings)  # type: ignore[arg-type]


def test_a_complete_folder_loads(folder: Path) -> None:
    star = load(folder)
    assert star.tokenizer is not None
    assert len(star.encode(ids(50))) == 50


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (
            "{}/none",
            "there is no model folder {}/none; check the path, or give a hub id like organization/name",
        ),
        ("./none", "there is no model folder ./none"),
        ("no/such/folder", "there is no model folder no/such/folder"),
        ("{}/config.json", "config.json is a file; give the model's folder, or a hub id"),
        ("{}/..", "holds no config.json: it is not a transformers model folder"),
        ("x" * 5000, "File name too long"),
        (None, "None is not a model: expected the path of its folder or a hub id, got NoneType"),
        (5, "5 is not a model: expected the path of its folder or a hub id, got int"),
    ],
)
def test_no_model_there(path: Any, says: str, folder: Path) -> None:
    path = path.format(folder) if isinstance(path, str) else path
    refused(ModelNotFoundError, says.format(folder), call=lambda: load(path))
    if isinstance(path, str):
        refused(ModelNotFoundError, says.format(folder), call=lambda: supported(path))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "\udcff",
        "null",
        "5",
        "[]",
        "{}",
        '{"model_type": "nobodys"}',
        '{"model_type": "llama", "hidden_size": "many"}',
        '{"model_type": "llama", "hidden_size": -5}',
    ],
)
def test_a_broken_config(text: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(ModelNotFoundError, f"no model could be read at {folder}: ", call=lambda: load(folder))
    refused(
        ModelNotFoundError, f"no model could be read at {folder}: ", call=lambda: supported(folder)
    )


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    says = [f"the model at {folder} could not be loaded", "no file named model.safetensors"]
    refused(ModelNotFoundError, *says, call=lambda: load(folder))


@pytest.mark.parametrize("size", [0, 5, 100, -1, -5000])
def test_truncated_weights(size: int, folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    refused(
        ModelNotFoundError, f"the model at {folder} could not be loaded", call=lambda: load(folder)
    )


def test_weights_that_are_something_else(folder: Path) -> None:
    (folder / "model.safetensors").write_text(
        "a page saying that the download needs a login\n" * 99
    )
    refused(
        ModelNotFoundError, f"the model at {folder} could not be loaded", call=lambda: load(folder)
    )


def test_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny("llama").save_pretrained(folder, max_shard_size="100KB")
    assert load(folder)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(ModelNotFoundError, shard.name, call=lambda: load(folder))


@pytest.mark.parametrize(
    "lost", ["model.layers.1.self_attn.q_proj.weight", "lm_head.weight", "model.norm.weight"]
)
def test_a_missing_weight(lost: str, folder: Path) -> None:
    """Forbids answers of a model of which a part is random: transformers only prints a table."""
    weights = load_file(folder / "model.safetensors")
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    says = f"the model at {folder} is incomplete: its files lack {lost}; copy or download it again"
    refused(ModelNotFoundError, says, call=lambda: load(folder))
    save_file({}, folder / "model.safetensors", metadata={"format": "pt"})
    refused(ModelNotFoundError, "is incomplete", "and 29 more", call=lambda: load(folder))


def test_a_weight_of_another_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(3, 5)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(
        ModelNotFoundError, f"the model at {folder} could not be loaded", call=lambda: load(folder)
    )


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_a_broken_tokenizer(file: str, text: str, folder: Path) -> None:
    (folder / file).write_bytes(text.encode(errors="surrogateescape"))
    refused(
        ModelNotFoundError,
        f"the tokenizer at {folder} could not be read: ",
        call=lambda: load(folder),
    )


def test_half_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(
        ModelNotFoundError,
        f"the tokenizer at {folder} could not be read: ",
        call=lambda: load(folder),
    )


def test_no_tokenizer_is_needed_for_token_ids(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    star = load(folder)
    assert star.tokenizer is None
    assert len(star.encode(ids(50))) == 50
    refused(InvalidInputError, "text needs a tokenizer", call=lambda: star.encode("text"))


BAD_PLACES = [
    (
        dict(dtype="float64"),
        "dtype 'float64' is unknown; use one of auto, float32, bfloat16, float16",
    ),
    (dict(dtype=torch.int8), "dtype 'torch.int8' is unknown; use one of auto"),
    (dict(device="quantum"), "device 'quantum' is unknown; use auto, cpu, cuda or cuda:1"),
    (dict(device="gpu"), "device 'gpu' is unknown; use auto, cpu, cuda or cuda:1"),
    (dict(device="cuda1"), "device 'cuda1' is unknown; use auto, cpu, cuda or cuda:1"),
    (dict(device=""), "device '' is unknown"),
    (dict(device=None), "device None is unknown"),
    (dict(device="meta"), "device 'meta' stores no values; use auto, cpu or cuda"),
    (dict(device="hpu"), "device 'hpu' cannot be used"),
]


@pytest.mark.parametrize(("words", "says"), BAD_PLACES, ids=[str(words) for words, _ in BAD_PLACES])
def test_a_bad_dtype_or_device(words: dict[str, Any], says: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()  # said before any weight is read
    refused(InvalidInputError, says, call=lambda: load(folder, **words))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_device_that_is_not_there(folder: Path) -> None:
    for device in ("cuda", "cuda:7"):
        says = f"device '{device}' is not available: torch sees no CUDA device; use cpu, or auto"
        refused(InvalidInputError, says, call=lambda d=device: load(folder, device=d))
    assert load(folder, device="auto").device.type == "cpu"


# ---------------------------------------------------------------------- out of memory

OUT_OF_MEMORY = """
import gc, json, resource, sys, weakref
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from star_attention import StarLLM
from star_attention.planning.segments import Segments
from star_attention.storage.kv import LayerKV
from star_attention.errors import OutOfMemoryError
from tests.families import FAMILIES

config = FAMILIES["llama_mqa"]()
config.max_position_embeddings = 1 << 20
model = AutoModelForCausalLM.from_config(config).eval()
ids = torch.randint(3, 200, (1 << 14,))
small = StarLLM(model, block_size=1024, tokens_per_forward=1024)
before = small.generate(small.encode(ids), [5, 6, 7], max_new_tokens=4).token_ids

words = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
limit = int(words["VmSize"].split()[0]) * 1024 + (24 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
large = StarLLM(model, block_size=1024, tokens_per_forward="16k")
errors = []
for _ in range(2):
    try:
        large.encode(ids)
    except OutOfMemoryError as error:
        assert isinstance(error, MemoryError)
        errors.append(str(error))
# The failed attempts left nothing behind, though somebody holds an error, and the remedy works.
gc.disable()
written = []
write = LayerKV.write
LayerKV.write = lambda kv, *more: (written.append(weakref.ref(kv)), write(kv, *more))[1]
try:
    large.encode(ids)
except OutOfMemoryError as error:
    held = error
assert held and not any(one() for one in written), written
LayerKV.write = write
after = small.generate(small.encode(ids), [5, 6, 7], max_new_tokens=4).token_ids
print(json.dumps([errors, before, after]))
"""


def test_out_of_memory_in_phase_1() -> None:
    """Really, in a process of its own whose address space is limited; then a smaller request works in the same process."""
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    errors, before, after = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 2
    for error in errors:
        assert re.search(
            r"out of memory in phase 1 after 0 of 16,384 context tokens, with 16,384 tokens in one",
            error,
        )
        assert "lower tokens_per_forward (now 16,384; it sets the working memory)" in error
    assert before == after


GARBAGE = """
import gc, resource
import torch
from pathlib import Path
from star_attention.planning.segments import Segments
from star_attention.storage.kv import LayerKV

def filled():
    kv = LayerKV(Segments.prefix(1 << 18))
    kv.write(0, torch.zeros(8, 1, 64), torch.zeros(8, 1, 64))  # 2 x 512 MB of address space
    return kv

gc.disable()
waiting = [filled()]
waiting.append(waiting)
del waiting
words = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
limit = int(words["VmSize"].split()[0]) * 1024 + (768 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
kv = filled()  # there is room for one
try:
    filled()
except RuntimeError as error:
    print("full")
"""


def test_contexts_that_wait_for_the_garbage_collector_make_room() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GARBAGE], capture_output=True, text=True, check=False
    )
    assert done.stdout == "full\n", done.stderr[-3000:]
