"""The engine's public surface: settings as an object, other settings, prepared queries, records."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest

import star_attention
from star_attention import StarConfig, StarLLM
from star_attention.config import StarSettings
from star_attention.encoding import EncodeOptions
from star_attention.errors import (
    ContextLengthError,
    InvalidInputError,
    SizeError,
    UnknownOptionError,
)
from star_attention.generation.settings import GenerateOptions, GenerationSettings
from tests.engines import bundled_tokenizer, ids, text_model, tiny

SIZES: dict[str, Any] = dict(block_size=16, anchor_size=8)
TEXT = "The key to the garden lies under the third stone. " * 12


def text_engine(**settings: Any) -> StarLLM:
    return StarLLM(text_model(), bundled_tokenizer(), **(SIZES | settings))


def test_public_names_are_the_documented_ones() -> None:
    assert set(star_attention.__all__) == {
        "Batch",
        "BlockPlan",
        "Conversation",
        "EncodedContext",
        "Generation",
        "Row",
        "StarConfig",
        "StarLLM",
        "Stream",
        "__version__",
        "errors",
        "pipeline",
        "read_document",
        "supported",
    }
    assert all(hasattr(star_attention, name) for name in star_attention.__all__)


def test_typed_keywords_are_the_fields_of_star_config() -> None:
    """Forbids a setting that editors do not know."""
    names = [field.name for field in fields(StarConfig)]
    assert list(StarSettings.__annotations__) == ["quality", *names]


def test_typed_keywords_of_generate_are_all_taken() -> None:
    """Forbids a typed keyword that `generate` refuses as unknown."""
    star = text_engine()
    for name in GenerateOptions.__annotations__:
        try:
            GenerationSettings.of(**{name: None if name != "stop" else "."}).resolve(
                star.runtime.handle, star.tokenizer
            )
        except UnknownOptionError as error:
            pytest.fail(str(error))
        except InvalidInputError:
            pass


def test_typed_keywords_of_encode_are_its_own() -> None:
    """Forbids a keyword that only the typed calls or only `encode` has."""
    _, _, *own, unknown = inspect.signature(StarLLM.encode).parameters
    assert list(EncodeOptions.__annotations__) == own
    assert unknown == "unknown"


def test_config_as_an_object_and_keywords_on_top_of_it() -> None:
    config = StarConfig(block_size=16, method="star")
    star = StarLLM(tiny("llama"), config=config, anchor_size="4")
    assert star.config == StarConfig(block_size=16, anchor_size=4)
    assert config == StarConfig(block_size=16)


def test_sizes_of_a_config_may_be_written_in_words() -> None:
    config = StarConfig(block_size="4k", anchor_size="1k", tokens_per_forward="8k")
    assert config == StarConfig(block_size=4096, anchor_size=1024, tokens_per_forward=8192)
    assert config.plan(32768).num_blocks == 8
    with pytest.raises(SizeError, match="block_size '4q' is not a number of tokens"):
        StarConfig(block_size="4q")


def test_a_config_of_another_type_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="config: expected a StarConfig, got str"):
        StarLLM(tiny("llama"), config="star")  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [StarLLM, lambda model, **words: StarConfig.of(**words)])
def test_an_unknown_setting_names_the_nearest(make: Any) -> None:
    with pytest.raises(UnknownOptionError, match="'blok_size'; did you mean 'block_size'"):
        make(tiny("llama"), blok_size=16)


def test_with_config_shares_the_model_and_leaves_the_engine_alone() -> None:
    star = text_engine()
    dense = star.with_config(method="dense", block_size=None, anchor_size=None)
    assert dense.runtime.handle is star.runtime.handle
    assert (star.config.method, star.config.block_size) == ("star", 16)
    plain = StarLLM(text_model(), bundled_tokenizer(), method="dense")
    answers = [
        engine.generate(engine.encode(TEXT), "Where?", max_new_tokens=4).token_ids
        for engine in (dense, plain)
    ]
    assert answers[0] == answers[1]
    with pytest.raises(SizeError, match="anchor_size"):
        star.with_config(anchor_size=17)


@pytest.mark.parametrize("query", ["Where is it?", ["Where is it?", "What opens it?"]])
@pytest.mark.parametrize("as_chat", [False, True])
def test_prepared_queries_are_answered_as_if_given(query: Any, as_chat: bool) -> None:
    star = text_engine()
    content = [{"role": "user", "content": TEXT}] if as_chat else TEXT
    prepared = star.prepare(content, query, max_new_tokens=5, answer_prefix="It")
    context = star.encode(prepared)
    replies = star.generate(context, prepared)
    expected = star.generate(star.encode(content), query, max_new_tokens=5, answer_prefix="It")
    if isinstance(query, str):
        replies, expected = [replies], [expected]  # type: ignore[list-item]
    assert [reply.token_ids for reply in replies] == [
        reply.token_ids
        for reply in expected  # type: ignore[union-attr]
    ]


def test_prepared_queries_are_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from star_attention import inputs

    calls: list[Any] = []
    original = inputs.prompt_ids
    monkeypatch.setattr(inputs, "prompt_ids", lambda *a, **k: calls.append(a) or original(*a, **k))
    star = text_engine()
    prepared = star.prepare(TEXT, ["Where?", "What?"], max_new_tokens=2)
    star.generate(star.encode(prepared), prepared)
    assert len(calls) == 2


def test_a_prepared_query_belongs_to_its_context_and_settings() -> None:
    star = text_engine()
    prepared = star.prepare(TEXT, "Where?", max_new_tokens=2)
    other = star.encode(TEXT + " And more.")
    with pytest.raises(InvalidInputError, match="prepared for another context of"):
        star.generate(other, prepared)
    with pytest.raises(InvalidInputError, match="brings its own settings, got seed too"):
        star.generate(star.encode(prepared), prepared, seed=1)
    with pytest.raises(InvalidInputError, match="brings its own query and settings"):
        star.encode(prepared, query="Where?")
    with pytest.raises(ContextLengthError, match="lower max_new_tokens"):
        star.prepare(TEXT, "Where?", max_new_tokens=10**6)
    with pytest.raises(InvalidInputError, match="prepare takes one context, got 2"):
        star.prepare([TEXT, TEXT], "Where?")  # type: ignore[arg-type]


def test_records_of_context_and_answer_make_a_line_of_json() -> None:
    star = StarLLM(tiny("llama"), **SIZES)
    context = star.encode(ids(40))
    reply = star.generate(context, ids(5), max_new_tokens=3, ignore_eos=True)
    record = context.as_dict() | reply.as_dict()
    assert record["token_ids"] == reply.token_ids
    assert (record["context_tokens"], record["block_size"], record["blocks"]) == (40, 16, 3)
    assert record["query_tokens"] == 5
    assert record["wire_bytes_phase2"] == 0
