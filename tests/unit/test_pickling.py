"""Pickle and copies: contexts and engines stay in their process, answers and errors travel."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch

from star_attention import EncodedContext, StarConfig, StarLLM, errors, supported
from tests.engines import BUNDLED

TEXT = "The tea is hot.\n" * 40


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return StarLLM.from_pretrained(BUNDLED, block_size=256, dtype="float32")


@pytest.fixture(scope="module")
def context(star: StarLLM) -> EncodedContext:
    return star.encode(TEXT)


def test_a_context_is_saved_instead(context: EncodedContext) -> None:
    """Forbids `cannot pickle 'weakref.ReferenceType' object`, and a silent copy of the KV."""
    remedy = r"write it with context\.save\(path\)"
    for store in (pickle.dumps, lambda value: torch.save({"a": value}, io.BytesIO())):
        with pytest.raises(TypeError, match=f"EncodedContext cannot be pickled.*{remedy}"):
            store(context)
    with pytest.raises(TypeError, match=r"share it.*context\.save\(path\)"):
        copy.deepcopy([context])


def test_engines_and_what_they_hold_stay(star: StarLLM, context: EncodedContext) -> None:
    with star.stream(context, "How is the tea?", max_new_tokens=2) as stream:
        remedies = {
            star: "StarLLM cannot be pickled.*StarLLM.from_pretrained",
            star.runtime: "Runtime cannot be pickled.*StarLLM.from_pretrained",
            star.runtime.handle: "ModelHandle cannot be pickled.*StarLLM.from_pretrained",
            stream: "Stream cannot be pickled.*take its result",
        }
        for value, message in remedies.items():
            with pytest.raises(TypeError, match=message):
                pickle.dumps(value)
            with pytest.raises(TypeError, match=r"cannot be copied by copy\.deepcopy; "):
                copy.deepcopy(value)


def test_pydantic_fields_take_them_as_they_are(star: StarLLM, context: EncodedContext) -> None:
    """Forbids `SchemaError: Error building "definitions" validator`."""
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("App", star=(StarLLM, ...), context=(EncodedContext | None, None))
    app = model(star=star, context=context)
    assert app.star is star
    assert app.context is context
    with pytest.raises(pydantic.ValidationError, match="instance of EncodedContext"):
        model(star=star, context="book.star")


def test_the_remedies_work(star: StarLLM, context: EncodedContext) -> None:
    """A copy of the model, shallow copies and other settings answer as before."""
    expected = star.generate(context, "How is the tea?", max_new_tokens=4).token_ids
    other = StarLLM(copy.deepcopy(star.model), star.tokenizer, block_size=256)
    engines = {other: other.encode(TEXT), copy.copy(star): copy.copy(context)}
    for engine, encoded in engines.items():
        answer = engine.generate(encoded, "How is the tea?", max_new_tokens=4)
        assert answer.token_ids == expected
    assert star.with_config(method="dense").config.method == "dense"


def test_answers_and_settings_travel(star: StarLLM, context: EncodedContext) -> None:
    answer = star.generate(context, "How is the tea?", max_new_tokens=4, return_logits=True)
    arrived = pickle.loads(pickle.dumps(answer))
    assert arrived.as_dict() == answer.as_dict()
    assert torch.equal(arrived.logits, answer.logits)
    assert copy.deepcopy(answer).as_dict() == answer.as_dict()
    for value in (StarConfig(block_size="4k"), context.plan, supported(star.model)):
        assert pickle.loads(pickle.dumps(value)) == value
    prepared = pickle.loads(pickle.dumps(star.prepare(TEXT, "How is the tea?", max_new_tokens=4)))
    assert star.generate(context, prepared).token_ids == answer.token_ids


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "UnsupportedModelError": ("a model", ["it is an encoder", "it has no cache"]),
    "ContextMismatchError": ("dtype", "it differs in dtype: float32"),
    "RankError": (3, "encode", "it died"),
}


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if kind.__module__ == errors.__name__
    ],
)
def test_every_error_travels(kind: type[errors.StarAttentionError]) -> None:
    """Forbids an error that breaks the process pool which brings it home."""
    error = kind(*ARGUMENTS.get(kind.__name__, ("a message",)))
    error.add_note("a note")
    for arrived in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error), copy.copy(error)):
        assert type(arrived) is kind
        assert str(arrived) == str(error)
        assert vars(arrived) == vars(error)
