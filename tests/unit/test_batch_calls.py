"""Batches: texts and pieces, refusals, faults of one row, and what is freed."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from star_attention import EncodedContext, StarLLM
from star_attention.errors import (
    ContextLengthError,
    InvalidInputError,
    NonFiniteError,
    OutOfMemoryError,
    UnknownOptionError,
)
from star_attention.hf.cache.packed_tails import PackedTails
from star_attention.hf.execution.rows import RowForwards
from star_attention.storage.tail import Tail
from tests.engines import bundled_tokenizer, engine, ids, text_model
from tests.families import build
from tests.spelling import CONTEXT, QUERY, spell


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return StarLLM(text_model(), bundled_tokenizer(), block_size=16, anchor_size=16)


@pytest.fixture(scope="module")
def context(star: StarLLM) -> EncodedContext:
    context: EncodedContext = star.encode(CONTEXT)
    return context


# ------------------------------------------------------------------------------------------- texts


def test_stop_strings_and_pieces_are_those_of_a_stream(
    star: StarLLM, context: EncodedContext
) -> None:
    texts = ["The secret number is 4910508.", "naïve café — Größe", "日本語のテキスト、漢字。"]
    stops = [None, "café", ["漢", "zzz"]]
    with star.batch() as batch:
        rows = [
            batch.add(context, QUERY, stop=stop, **spell(context, text))
            for text, stop in zip(texts, stops, strict=True)
        ]
        pieces: dict[Any, str] = {}
        for row, delta in batch:
            pieces[row] = pieces.get(row, "") + delta.text
    for row, text, stop in zip(rows, texts, stops, strict=True):
        expected = star.generate(context, QUERY, stop=stop, **spell(context, text))
        assert pieces[row] == row.text == row.result().text == expected.text
        assert row.result().finish_reason == expected.finish_reason
        assert row.result().stop_string == expected.stop_string
        assert "".join(row) == expected.text


def test_pieces_of_a_row_run_the_others_too(star: StarLLM, context: EncodedContext) -> None:
    with star.batch() as batch:
        first = batch.add(
            context, QUERY, **spell(context, "a longer text than the other", then="<eos>")
        )
        second = batch.add(context, QUERY, **spell(context, "short", then="<eos>"))
        assert "".join(first) == "a longer text than the other"
        assert second.done
        assert second.result().text == "short"
        assert "done" not in repr(first)
        assert "stop" in repr(first) or "length" in repr(first)


def test_a_criterion_ends_its_row_alone(star: StarLLM, context: EncodedContext) -> None:
    class Third(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.tensor([input_ids.shape[1] >= start + 3])

    start = len(context.token_ids) + star.generate(context, QUERY, max_new_tokens=1).query_tokens
    criteria = StoppingCriteriaList([Third()])
    with star.batch() as batch:
        settings: dict[str, Any] = dict(max_new_tokens=8, ignore_eos=True)
        row = batch.add(context, QUERY, stopping_criteria=criteria, **settings)
        other = batch.add(context, QUERY, **settings)
        assert len(row.result().token_ids) == 3
        assert row.result().finish_reason == "stop"
        assert len(other.result().token_ids) == 8
        assert other.result().finish_reason == "length"


# ---------------------------------------------------------------------------------------- refusals


def test_refusals_come_with_add(star: StarLLM, context: EncodedContext) -> None:
    other = engine("llama", block_size=16)
    with star.batch() as batch:
        for error, fragment, call in [
            (InvalidInputError, "one query, got 2", lambda: batch.add(context, ["a", "b"])),
            (InvalidInputError, "not by beams", lambda: batch.add(context, "a", num_beams=2)),
            (
                InvalidInputError,
                "num_return_sequences 3",
                lambda: batch.add(context, "a", do_sample=True, num_return_sequences=3),
            ),
            (UnknownOptionError, "max_tokens", lambda: batch.add(context, "a", max_tokens=3)),
            (
                ContextLengthError,
                "positions",
                lambda: batch.add(context, "a", max_new_tokens=10_000),
            ),
            (InvalidInputError, "EncodedContext", lambda: batch.add("a", "b")),  # type: ignore[arg-type]
            (ValueError, "differs", lambda: batch.add(other.encode(ids(40)), "a")),
        ]:
            with pytest.raises(error, match=fragment):  # type: ignore[arg-type]
                call()
        assert (batch.running, batch.waiting) == (0, 0)
        assert batch.step() == []
    with pytest.raises(InvalidInputError, match=r"closed; make a new one: star.batch\(\)"):
        batch.add(context, "a")
    with pytest.raises(InvalidInputError, match="closed"):
        batch.step()


@pytest.mark.parametrize("max_rows", [0, -1, True, 2.0, "2"])
def test_a_number_of_rows_that_cannot_work(star: StarLLM, max_rows: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"max_rows: expected an integer of at least 1"):
        star.batch(max_rows=max_rows)


# --------------------------------------------------------------------------------- faults of a row


class Raises(LogitsProcessor):
    def __init__(self, after: int) -> None:
        self._left = after

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._left -= 1
        if self._left < 0:
            raise ZeroDivisionError("of the user's processor")
        return scores


def test_a_processor_that_raises_ends_its_row_alone() -> None:
    star = engine("llama", block_size=16)
    context = star.encode(ids(70))
    settings: dict[str, Any] = dict(max_new_tokens=6, ignore_eos=True)
    with star.batch() as batch:
        good = batch.add(context, ids(4), **settings)
        bad = batch.add(
            context, ids(5), logits_processor=LogitsProcessorList([Raises(2)]), **settings
        )
        ended = [row for row, _ in batch if row.done]
    assert ended == [bad, good]
    assert len(bad.token_ids) == 2
    with pytest.raises(ZeroDivisionError, match="user's"):
        bad.result()
    with pytest.raises(ZeroDivisionError):
        list(bad)
    assert good.result().token_ids == star.generate(context, ids(4), **settings).token_ids


def test_a_row_whose_logits_are_not_finite_ends_alone() -> None:
    """A query's token whose embedding is NaN spoils its own row."""
    model = build("llama")
    star = StarLLM(model, block_size=16)
    context = star.encode(ids(70))
    bad_token = 190
    assert bad_token not in ids(70)
    assert bad_token not in ids(4)
    expected = star.generate(context, ids(4), max_new_tokens=5, suppress_tokens=[bad_token])

    def spoil(_: Any, arguments: tuple[torch.Tensor], embedded: torch.Tensor) -> torch.Tensor:
        return embedded.masked_fill(arguments[0][..., None] == bad_token, float("nan"))

    model.get_input_embeddings().register_forward_hook(spoil)
    for queries in ([ids(4), [bad_token, 7, 8, 9]], [[bad_token, 7, 8, 9], ids(4)]):
        with star.batch() as batch:
            rows = [
                batch.add(context, query, max_new_tokens=5, suppress_tokens=[bad_token])
                for query in queries
            ]
            list(batch)
        good, bad = sorted(rows, key=lambda row: row.error is not None)
        assert good.result().token_ids == expected.token_ids
        with pytest.raises(NonFiniteError, match="NaN"):
            bad.result()


def test_without_memory_for_a_query_its_row_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    star = engine("llama", block_size=16)
    context = star.encode(ids(70))
    expected = star.generate(context, ids(4), max_new_tokens=5)
    append = Tail.append

    def without_memory(tail: Tail, k_BGSD: torch.Tensor, v_BGSD: torch.Tensor) -> None:
        # A query of 7 tokens, alone or padded to that length.
        if k_BGSD.shape[2] == 7 and (k_BGSD.shape[0] > 1 or tail.length == 0):
            raise MemoryError
        append(tail, k_BGSD, v_BGSD)

    monkeypatch.setattr(Tail, "append", without_memory)
    with star.batch() as batch:
        good = batch.add(context, ids(5), max_new_tokens=5)
        bad = batch.add(context, ids(7), max_new_tokens=5)
        list(batch)
    assert good.result().token_ids == star.generate(context, ids(5), max_new_tokens=5).token_ids
    with pytest.raises(OutOfMemoryError, match=r"query of 7 tokens.*max_rows"):
        bad.result()
    assert star.generate(context, ids(4), max_new_tokens=5).token_ids == expected.token_ids


@pytest.mark.parametrize(
    ("name", "appends", "raises_at"),
    # In the middle of the third step: of rows together, and of a row alone.
    [("llama", PackedTails, 3 * 2 + 2), ("jetmoe", Tail, 3 * 3 * 2 + 2)],
)
def test_without_memory_for_a_step_the_youngest_row_ends(
    name: str, appends: Any, raises_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is repeated for the others, whose tails hold each token once."""
    star = engine(name, block_size=16)
    context = star.encode(ids(70))
    settings: dict[str, Any] = dict(max_new_tokens=8, ignore_eos=True)
    expected = [star.generate(context, ids(4 + n), **settings).token_ids for n in range(3)]
    append, calls = appends.append, 0

    def without_memory(self: Any, k_BGSD: torch.Tensor, v_BGSD: torch.Tensor) -> None:
        nonlocal calls
        calls += k_BGSD.shape[2] == 1
        if calls == raises_at:
            calls += 1
            raise MemoryError
        append(self, k_BGSD, v_BGSD)

    monkeypatch.setattr(appends, "append", without_memory)
    with star.batch() as batch:
        rows = [batch.add(context, ids(4 + n), **settings) for n in range(3)]
        list(batch)
    failed = [row for row in rows if row.error is not None]
    assert len(failed) == 1
    if name == "llama":
        assert failed == rows[2:]
    with pytest.raises(OutOfMemoryError, match="youngest, was dropped"):
        failed[0].result()
    for row, token_ids in zip(rows, expected, strict=True):
        if row not in failed:
            assert row.result().token_ids == token_ids


def test_after_a_fault_of_the_model_the_batch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    star = engine("llama", block_size=16)
    context = star.encode(ids(70))

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("the model is broken")

    batch = star.batch()
    row = batch.add(context, ids(4), max_new_tokens=8, ignore_eos=True)
    batch.step()
    monkeypatch.setattr(RowForwards, "run", broken)
    with pytest.raises(RuntimeError, match="broken"):
        batch.step()
    assert batch.running == 0
    with pytest.raises(InvalidInputError, match=r"has failed \(RuntimeError\); make a new one"):
        batch.add(context, ids(4))
    with pytest.raises(RuntimeError, match="broken"):
        row.result()


# ------------------------------------------------------------------------------------ what is freed


def test_a_row_that_is_canceled_frees_what_it_held() -> None:
    star = engine("llama", block_size=16)
    kept = star.encode(ids(45, seed=2))
    gc.collect()
    gc.disable()
    try:
        context = star.encode(ids(70))
        shard = weakref.ref(context.kv)
        with star.batch() as batch:
            other = batch.add(kept, ids(3), max_new_tokens=30, ignore_eos=True)
            row = batch.add(context, ids(4), max_new_tokens=30, ignore_eos=True)
            waiting = batch.add(context, ids(4), max_new_tokens=30)
            del context
            for _ in range(4):
                batch.step()
            assert shard() is not None
            waiting.cancel()
            row.cancel()
            assert shard() is None
            assert row.result().finish_reason == "canceled"
            assert len(row.result().token_ids) == 4
            assert len(other.result().token_ids) == 30
            row.cancel()
            assert row.result().finish_reason == "canceled"
    finally:
        gc.enable()


def test_many_rows_leave_nothing() -> None:
    star = engine("llama", block_size=16)
    context = star.encode(ids(70))
    with star.batch(max_rows=8) as batch:

        def run(rows: int) -> int:
            for number in range(rows):
                row = batch.add(
                    context,
                    ids(1 + number % 7),
                    max_new_tokens=1 + number % 4,
                    seed=number,
                    do_sample=number % 2 == 0,
                )
                if number % 5 == 0:
                    row.cancel()
                batch.step()
            list(batch)
            del row
            gc.collect()
            return len(gc.get_objects())

        run(30)
        before = run(30)
        assert run(300) - before < 50
        assert sum(type(each) is Tail for each in gc.get_objects()) == 0
