"""Arguments of `generate` that cannot work, and values at their limits that do."""

from __future__ import annotations

from typing import Any

import pytest

from star_attention import EncodedContext, StarLLM
from star_attention.errors import (
    InvalidInputError,
    UnknownOptionError,
)
from tests.engines import bundled_tokenizer, engine, ids
from tests.refusals import refused

BLOCK = 20


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tempratur",
            "does not take 'tempratur'; did you mean 'temperature'",
        ),
        ("qqqq", "does not take 'qqqq'; it takes those of transformers' GenerationConfig"),
        (
            "generation_config",
            "does not take 'generation_config'; the model's own is in use already: give the",
        ),
        ("use_cache", "does not take 'use_cache'; the encoded context is the cache"),
        ("cache_implementation", "does not take 'cache_implementation'"),
        ("max_length", "max_length counts the context too; use max_new_tokens"),
        ("min_length", "min_length counts the context too; use min_new_tokens"),
        ("block_size", r"'block_size'; it is a setting of the engine: use star\.with_config"),
    ],
)
def test_an_unknown_argument_is_a_type_error(
    name: str, message: str, star: StarLLM, context: EncodedContext
) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        star.generate(context, ids(5), **{name: 1})
    assert isinstance(caught.value, UnknownOptionError)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "block_size",
            r"encode\(\) does not take 'block_size'; it is a setting of the engine: use"
            r" star\.with_config\(block_size=\.\.\.\)$",
        ),
        ("tool", r"does not take 'tool'; did you mean 'tools'\?$"),
        ("seed", r"does not take 'seed'; it takes progress, query, settings, tools, chat_template"),
    ],
)
def test_an_unknown_argument_of_encode(name: str, message: str, star: StarLLM) -> None:
    with pytest.raises(UnknownOptionError, match=message):
        star.encode(ids(5), **{name: 1})  # type: ignore[call-overload]
    with star.batch() as batch, pytest.raises(UnknownOptionError, match=message):
        batch.encode(ids(5), **{name: 1})  # type: ignore[misc]


BAD_ARGUMENTS = [
    (dict(max_new_tokens=0), "max_new_tokens 0 is not a positive number of tokens"),
    (dict(max_new_tokens=2.5), "max_new_tokens 2.5 is not a positive number of tokens"),
    (dict(max_new_tokens=None), "max_new_tokens None is not a positive number"),
    (dict(max_new_tokens=True), "max_new_tokens True is not a positive number"),
    (
        dict(min_new_tokens=5),
        "min_new_tokens: expected an integer up to max_new_tokens 3, got 5",
    ),
    (dict(temperature=-0.5), "temperature: expected a number of at least 0, got -0.5"),
    (dict(temperature="hot"), "temperature: expected a number of at least 0, got 'hot'"),
    (dict(temperature=float("nan")), "temperature: expected a number of at least 0, got nan"),
    (dict(top_p=2.0), "top_p: expected a number above 0 and at most 1, got 2.0"),
    (dict(top_p="x"), "top_p: expected a number above 0 and at most 1, got 'x'"),
    (dict(top_k=-1), "top_k: expected an integer of at least 0, got -1"),
    (dict(top_k=1.5), "top_k: expected an integer of at least 0, got 1.5"),
    (dict(min_p=3), "min_p: expected a number of at least 0 and at most 1, got 3"),
    (dict(typical_p=0.0), "typical_p: expected a number above 0 and at most 1, got 0.0"),
    (dict(repetition_penalty=0.0), "repetition_penalty: expected a number above 0, got 0.0"),
    (
        dict(no_repeat_ngram_size=-1),
        "no_repeat_ngram_size: expected an integer of at least 0, got -1",
    ),
    (dict(do_sample="maybe"), "do_sample: expected True or False, got 'maybe'"),
    (dict(num_beams=0), "num_beams: expected an integer of at least 1, got 0"),
    (dict(num_beams="2"), "num_beams: expected an integer of at least 1, got '2'"),
    (
        dict(num_return_sequences=0),
        "num_return_sequences: expected an integer of at least 1, got 0",
    ),
    (dict(num_return_sequences=2), "num_return_sequences"),
    (
        dict(num_return_sequences=3, num_beams=2),
        "`num_return_sequences` (3) has to be smaller or equal to",
    ),
    (dict(num_beams=2, length_penalty="x"), "length_penalty: expected a number, got 'x'"),
    (
        dict(num_beams=2, early_stopping="x"),
        "`early_stopping` must be a boolean or 'never', but is x",
    ),
    (dict(num_beams=2, return_logits=True), "not with beams; use StarLLM.logits instead"),
    (dict(max_time=-1), "max_time: expected a number above 0, got -1"),
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
    (dict(dola_layers="low"), "dola generation, which transformers no longer supports"),
    (
        dict(num_beams=4, num_beam_groups=2),
        "group beam search, which transformers no longer supports",
    ),
    (dict(constraints=[]), "constrained beam search, which transformers no longer supports"),
    (
        dict(do_sample=False, penalty_alpha=0.6, top_k=4),
        "contrastive search, which transformers no longer supports",
    ),
    (dict(seed="x"), "seed: expected an integer, got 'x'"),
    (dict(seed=1.5), "seed: expected an integer, got 1.5"),
    (dict(seed=2**64), "has more than 64 bits; give a smaller number"),
    (dict(stop=""), "stop string '' is empty or not a str; give at least one character"),
    (dict(stop=["a", 3]), "stop string 3 is empty or not a str"),
    (dict(stop=5), "stop 5: expected a str or a list of str, got int"),
    (dict(answer_prefix=5), "answer_prefix 5: expected a str, got int"),
    (dict(logits_processor=5), "logits_processor: expected a list, got int"),
    (dict(stopping_criteria=5), "stopping_criteria: expected a list, got int"),
]


@pytest.mark.parametrize(
    ("kwargs", "message"), BAD_ARGUMENTS, ids=[str(kwargs) for kwargs, _ in BAD_ARGUMENTS]
)
def test_a_bad_value_of_a_known_argument(
    kwargs: dict[str, Any], message: str, reader: StarLLM, capfd: pytest.CaptureFixture[str]
) -> None:
    context = reader.encode(ids(50))
    refused(
        InvalidInputError,
        message,
        call=lambda: reader.generate(context, ids(5), **{"max_new_tokens": 3} | kwargs),
    )


@pytest.mark.parametrize(
    "kwargs",
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
def test_values_at_their_limits_work(
    kwargs: dict[str, Any], star: StarLLM, context: EncodedContext
) -> None:
    """Forbids limits that are too narrow."""
    assert star.generate(context, ids(5), **{"max_new_tokens": 3} | kwargs).token_ids


def test_streams_have_one_answer(reader: StarLLM) -> None:
    context = reader.encode(ids(50))
    message = "a stream is one answer by greedy search or sampling; use generate"
    refused(InvalidInputError, message, call=lambda: reader.stream(context, ids(5), num_beams=2))
    refused(
        InvalidInputError,
        message,
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
