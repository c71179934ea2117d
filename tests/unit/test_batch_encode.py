"""Contexts that a batch encodes while rows are answered."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import SoloComm
from star_attention.errors import ContextLengthError, InvalidInputError, OutOfMemoryError
from star_attention.generation.batching import encoding
from star_attention.generation.batching.leading import Encode, Lead
from star_attention.planning.plan import BlockPlan, Span
from star_attention.storage.kv import LayerKV
from tests.engines import assert_same_kv, bundled_tokenizer, engine, ids, text_model

METHODS: list[dict[str, Any]] = [
    {"block_size": 16, "anchor_size": 8},
    {"method": "dense"},
    {"method": "streaming_llm", "block_size": 20, "anchor_size": 3},
    {"block_size": 16, "kv_dtype": "fp8"},
    {"block_size": 16, "lookback": 1},
]


@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_a_context_encoded_meanwhile_equals_one_encoded_alone(settings: dict[str, Any]) -> None:
    star = engine("mistral", tokens_per_forward=8, **settings)
    asked = star.encode(ids(40, seed=2))
    expected = star.encode(ids(100))
    answer = star.generate(asked, ids(5), max_new_tokens=25, ignore_eos=True)
    with star.batch() as batch:
        row = batch.add(asked, ids(5), max_new_tokens=25, ignore_eos=True)
        job = batch.encode(ids(100))
        assert (job.done, job.context, job.progress) == (False, None, 0.0)
        context = job.result()
        assert job.done
        assert job.context is context
        assert job.progress == 1.0
        assert row.result().token_ids == answer.token_ids
        reply = batch.add(context, ids(6), max_new_tokens=5).result()
    assert_same_kv(context, expected, tolerance=0)
    assert reply.token_ids == star.generate(expected, ids(6), max_new_tokens=5).token_ids


def test_steps_and_forwards_take_turns() -> None:
    """A row gets a token at least between two forwards of a context."""
    star = engine("llama", block_size=16, anchor_size=16, tokens_per_forward=32)
    asked = star.encode(ids(40, seed=2))
    seen: list[tuple[int, int]] = []
    with star.batch() as batch:
        row = batch.add(asked, ids(5), max_new_tokens=400, ignore_eos=True)
        batch.step()

        def progress(span: Span, plan: BlockPlan) -> None:
            seen.append((span.stop, len(row.token_ids)))

        batch.encode(ids(100), progress=progress).result()
    assert [stop for stop, _ in seen] == [32, 64, 96, 100]
    tokens = [count for _, count in seen]
    assert tokens == sorted(set(tokens))


def test_steps_have_a_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, forwards = 0.0, 0

    def turns() -> Iterator[int]:
        nonlocal now, forwards
        while True:
            now, forwards = now + 1.0, forwards + 1
            yield 1

    monkeypatch.setattr(encoding, "time", SimpleNamespace(perf_counter=lambda: now))
    encodings = encoding.Encodings(torch.device("cpu"))
    first, lead = Encode(number=1), Lead(SoloComm())
    encodings.add(encoding.EncodeTask(100, turns(), lead, first))  # type: ignore[arg-type]
    for _ in range(160):
        encodings.step()
        encodings.spent(0.0625, more=True)
    # Ten seconds of steps, and forwards of a second each.
    assert 0.15 < 10 / forwards < 0.25
    before = forwards
    for _ in range(3):
        encodings.spent(0.0625, more=False)
        encodings.step()
    assert forwards == before + 3
    encodings.close()


def test_without_rows_nothing_waits() -> None:
    star = engine("llama", block_size=16, tokens_per_forward=16)
    with star.batch() as batch:
        first, second = batch.encode(ids(48)), batch.encode(ids(32, seed=2))
        assert list(batch) == []
        assert first.done
        assert second.done
        assert "48 of 48 tokens" in repr(first)
    assert second.result().token_ids.tolist() == ids(32, seed=2)


def test_a_context_that_is_canceled_frees_what_it_held(monkeypatch: pytest.MonkeyPatch) -> None:
    star = engine("llama", block_size=16, tokens_per_forward=16)
    written: list[Any] = []
    write = LayerKV.write

    def noted(kv: LayerKV, *parts: Any) -> None:
        written.append(weakref.ref(kv))
        write(kv, *parts)

    monkeypatch.setattr(LayerKV, "write", noted)
    gc.collect()
    gc.disable()
    try:
        with star.batch() as batch:
            job = batch.encode(ids(100))
            batch.step()
            batch.step()
            assert any(layer() for layer in written)
            job.cancel()
            assert not any(layer() for layer in written)
            assert job.done
            with pytest.raises(InvalidInputError, match="canceled; encode it again"):
                job.result()
            assert list(batch) == []
            left = batch.encode(ids(100))
            batch.step()
        assert left.done
        assert not any(layer() for layer in written)
    finally:
        gc.enable()


def test_without_memory_for_a_context_the_rows_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    star = engine("llama", block_size=16, tokens_per_forward=16)
    asked = star.encode(ids(40, seed=2))
    expected = star.generate(asked, ids(5), max_new_tokens=9, ignore_eos=True)
    write = LayerKV.write

    def without_memory(kv: LayerKV, start: int, *parts: Any) -> None:
        if start == 32:
            raise MemoryError
        write(kv, start, *parts)

    monkeypatch.setattr(LayerKV, "write", without_memory)
    with star.batch() as batch:
        row = batch.add(asked, ids(5), max_new_tokens=9, ignore_eos=True)
        job = batch.encode(ids(100))
        list(batch)
        assert isinstance(job.error, OutOfMemoryError)
        with pytest.raises(OutOfMemoryError, match="lower tokens_per_forward"):
            job.result()
    assert row.result().token_ids == expected.token_ids


def test_refusals_come_with_the_call() -> None:
    star = StarLLM(text_model(), bundled_tokenizer(), block_size=16)
    with star.batch() as batch:
        with pytest.raises(InvalidInputError, match="one context at a call, got 2"):
            batch.encode(["one text", "another text"])  # type: ignore[arg-type]
        with pytest.raises(ContextLengthError, match="positions"):
            batch.encode(ids(10_000))
        with pytest.raises(ContextLengthError, match="positions"):
            batch.encode("a text", query="a?", settings={"max_new_tokens": 10_000})
        assert list(batch) == []
    with pytest.raises(InvalidInputError, match="closed"):
        batch.encode("a text")


def test_a_new_version_is_encoded_meanwhile() -> None:
    star = engine("llama", block_size=16, anchor_size=8, tokens_per_forward=16)
    old = star.encode(ids(100))
    changed = [*ids(30), *ids(40, seed=7), *ids(100)[70:]]
    with star.batch() as batch:
        row = batch.add(old, ids(5), max_new_tokens=25, ignore_eos=True)
        job = batch.encode(changed, reuse=old)
        context = job.result()
        assert job.progress == 1.0
        assert row.result().text is not None
    assert context.reused_tokens == 100 - 64
    assert_same_kv(context, star.encode(changed), tolerance=1e-5)
