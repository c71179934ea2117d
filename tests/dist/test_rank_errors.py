"""Errors on several ranks: raised on all of them, and the next call works."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from star_attention import StarLLM, runtime
from star_attention.distributed import TorchComm
from star_attention.errors import (
    ContextLengthError,
    InvalidInputError,
    NonFiniteError,
    RankError,
    TokenError,
)
from tests.dist.pool import Pool
from tests.engines import CONTEXT, bundled_tokenizer, engine, ids, text_model, tiny
from tests.families import build

SIZES = dict(block_size=24, anchor_size=10)


def make_different_calls(comm: TorchComm) -> list[str]:
    """Return the errors of ranks that are not in the same call; the next call works."""
    star = engine("llama", comm=comm, **SIZES)
    context = star.encode(ids(CONTEXT))
    messages = []

    def generate() -> list[int]:
        return star.generate(context, [5], max_new_tokens=3).token_ids

    with pytest.raises(InvalidInputError) as raised:
        generate() if comm.rank == 1 else star.encode(ids(CONTEXT))
    messages.append(str(raised.value))
    text_star = StarLLM(text_model(), bundled_tokenizer(), comm=comm, block_size=32)
    story = text_star.encode("The hill is tall. " * 20)
    stream = text_star.stream(story, "A dog", max_new_tokens=5, ignore_eos=True)
    next(stream)
    with pytest.raises(InvalidInputError) as raised:
        generate() if comm.rank == 1 else list(stream)
    messages.append(str(raised.value))
    assert generate()
    return messages


def test_ranks_in_different_calls_are_named(pool: Pool) -> None:
    first, *others = pool.run(make_different_calls, 3)
    assert "rank 0 is in encode, rank 1 in generate: every call is collective" in first[0]
    assert "rank 0 is in the stream of an answer, rank 1 in generate" in first[1]
    assert all("every call is collective" in message for messages in others for message in messages)


def pass_bad_arguments(comm: TorchComm) -> list[str]:
    """Return the errors of rank 0's bad arguments, and an answer afterwards."""
    star = engine("llama", comm=comm, **SIZES)
    context = star.encode(ids(CONTEXT))
    messages = []
    too_long: Any = dict(query=[5], settings=dict(max_new_tokens=512))
    for kind, call in (
        (TokenError, lambda: star.encode([])),
        (TokenError, lambda: star.encode([500] if comm.rank == 0 else [5])),
        (TokenError, lambda: star.generate(context, [])),
        (ContextLengthError, lambda: star.encode(ids(CONTEXT), **too_long)),
        (TypeError, lambda: star.generate(context, [5], maximum=3)),
        (InvalidInputError, lambda: star.generate(context, [5], top_p=7)),
        (InvalidInputError, lambda: star.stream(context, [5])),
    ):
        with pytest.raises(kind) as raised:
            call()
        messages.append(str(raised.value))
    return [*messages, str(star.generate(context, [5], max_new_tokens=3).token_ids)]


def test_bad_arguments_of_rank_0_are_refused_on_all_ranks(pool: Pool) -> None:
    first, *others = pool.run(pass_bad_arguments, 3)
    assert len(first) == 8
    assert others == [first] * 2


def fail_on_rank_1(comm: TorchComm, phase: int) -> tuple[str, str, list[int]]:
    """Return an exception in the middle of one rank's work, and an answer afterwards."""
    star = engine("llama", comm=comm, **SIZES)
    context = star.encode(ids(CONTEXT))
    real = star.runtime.handle.encode

    def answer() -> list[int]:
        return star.generate(context, [5, 6], max_new_tokens=3).token_ids

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory, or so")

    if comm.rank == 1:
        star.runtime.handle.encode = fail  # type: ignore[method-assign]
    with pytest.raises(MemoryError) as raised:
        star.encode(ids(CONTEXT, seed=7)) if phase == 1 else answer()
    star.runtime.handle.encode = real  # type: ignore[method-assign]
    return type(raised.value).__name__, str(raised.value), answer()


@pytest.mark.parametrize("phase", [1, 2])
def test_an_exception_on_one_rank_is_raised_on_all(pool: Pool, phase: int) -> None:
    results = pool.run(fail_on_rank_1, 3, phase=phase)
    star = engine("llama", **SIZES)
    tokens = star.generate(star.encode(ids(CONTEXT)), [5, 6], max_new_tokens=3).token_ids
    assert [result[2] for result in results] == [tokens] * 3
    assert all("or so" in message or "out of memory" in message for _, message, _ in results)
    assert "(on rank 1" in results[0][1]
    assert "(on rank 1" in results[2][1]


def compute_nan(comm: TorchComm, is_everywhere: bool) -> tuple[list[str], list[int]]:
    """Return the errors of NaN in a context and a query, and an answer afterwards."""
    model, bad = build("llama"), 77
    with torch.no_grad():
        sound = model.model.embed_tokens.weight[bad].clone()
        model.model.embed_tokens.weight[bad] = float("nan")
    star = StarLLM(model, comm=comm, **SIZES)
    plain = [token for token in ids(CONTEXT) if token != bad]
    context, messages = star.encode(plain), []
    # In the last block alone, or in the anchor and so in all.
    tokens = [bad, *plain] if is_everywhere else [*plain, bad]
    for call in (
        lambda: star.encode(tokens),
        lambda: star.generate(context, [5, bad], max_new_tokens=3),
        lambda: star.generate(context, [5, bad], max_new_tokens=3, num_beams=2),
        lambda: star.extend(context, [5, bad]),
    ):
        with pytest.raises(NonFiniteError) as raised:
            call()
        messages.append(str(raised.value))
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = sound
    return messages, star.generate(star.encode(plain), [5, 6], max_new_tokens=3).token_ids


@pytest.mark.parametrize("is_everywhere", [True, False])
def test_nan_on_any_rank_is_refused_on_all(pool: Pool, is_everywhere: bool) -> None:
    results = pool.run(compute_nan, 3, is_everywhere=is_everywhere)
    assert [answer for _, answer in results] == [results[0][1]] * 3
    cause = "its weight model.embed_tokens.weight has such values in float32"
    for (encode, answer, beams, extend), _ in results:
        assert f"while encoding: {cause}" in encode
        assert f"while encoding: {cause}" in extend
        assert f"logits are NaN or infinite: {cause}" in answer
        assert f"logits are NaN or infinite: {cause}" in beams


# ------------------------------------------------------------------ startup


def start_with_odd_rank_1(comm: TorchComm, field: str) -> str:
    """Return the error of engines that differ in one field on rank 1."""
    model, settings = tiny("llama"), dict[str, Any](SIZES)
    is_odd = comm.rank == 1
    # transformers replaces its module while it is imported, so there may be two.
    transformers: Any = runtime.transformers
    version = transformers.__version__
    if field == "weights":
        model = build("llama", seed=3 if is_odd else 0)
    elif field == "dtype":
        model = build("llama", torch.bfloat16 if is_odd else torch.float32)
    elif field == "config.num_hidden_layers":
        model = build("granite") if is_odd else tiny("llama")
        field = "config.model_type"
    elif field == "settings.block_size":
        settings["block_size"] = 32 if is_odd else 24
    elif field == "transformers":
        transformers.__version__ = "0.1" if is_odd else version
    try:
        with pytest.raises(RankError) as raised:
            StarLLM(model, comm=comm, **settings)
    finally:
        transformers.__version__ = version
    assert raised.value.rank == 1
    assert f"it differs in {field}: " in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "field", ["weights", "dtype", "config.num_hidden_layers", "settings.block_size", "transformers"]
)
def test_ranks_that_differ_are_refused_at_startup(pool: Pool, field: str) -> None:
    messages = pool.run(start_with_odd_rank_1, 3, field=field)
    assert messages == [messages[0]] * 3
    assert len(pool.run(pass_bad_arguments, 3)) == 3, "and the next engine works"
