"""Rows of a batch go on with conversations, and are kept, as answers of `generate` are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from star_attention import EncodedContext, StarLLM
from star_attention.errors import ContextLengthError, InvalidInputError
from star_attention.generation.conversation import kept_by
from star_attention.hf.execution.request import Request
from tests.engines import CONTEXT, QUERY, engine, ids
from tests.recorders import Buckets

SIZES: dict[str, Any] = dict(block_size=16, anchor_size=5, reserve_tokens=128)
ANSWER: dict[str, Any] = dict(max_new_tokens=6, ignore_eos=True, return_logits=True)


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3", "gemma3n"])
def test_turns_in_any_company_equal_turns_alone(name: str) -> None:
    """Two conversations and a plain row share steps; each turn goes on from rows or answers."""
    star = engine(name, **SIZES)
    contexts = [star.encode(ids(CONTEXT)), star.encode(ids(CONTEXT - 30, seed=5))]
    alone: list[Any] = list(contexts)
    rows: list[Any] = list(contexts)
    with star.batch(max_rows=3) as batch:
        for turn in range(3):
            queries = [ids(QUERY + turn, seed=turn), ids(3 + 5 * turn, seed=20 + turn)]
            plain = batch.add(contexts[0], ids(4), max_new_tokens=9, ignore_eos=True)
            added = [
                batch.add(asked, query, keep=True, **ANSWER)
                for asked, query in zip(rows, queries, strict=True)
            ]
            rows = [row.result() for row in added]
            alone = [
                star.generate(asked, query, keep=True, **ANSWER)
                for asked, query in zip(alone, queries, strict=True)
            ]
            for row, right in zip(rows, alone, strict=True):
                assert row.token_ids == right.token_ids
                torch.testing.assert_close(row.logits, right.logits, atol=1e-3, rtol=1e-4)
                assert row.query_tokens == right.query_tokens
                assert row.kept_tokens == right.kept_tokens
                assert (row.kept_tokens > 0) == (turn > 0)
                assert row.conversation.turns == right.conversation.turns
                assert row.conversation.nbytes == right.conversation.nbytes
            assert plain.result().conversation is None
        # What a batch has kept, `generate` goes on with, and the other way round.
        last = rows[0].continue_with(ids(5), **ANSWER)
        assert last.token_ids == alone[0].continue_with(ids(5), **ANSWER).token_ids
        assert batch.add(last, ids(3), **ANSWER).result().conversation is not None
        assert batch.add(last, ids(3), keep=False, **ANSWER).result().conversation is None


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return engine("llama", **SIZES)


@pytest.fixture(scope="module")
def context(star: StarLLM) -> EncodedContext:
    return star.encode(ids(CONTEXT))


def test_branches_in_one_batch(star: StarLLM, context: EncodedContext) -> None:
    first = star.generate(context, ids(QUERY), keep=True, **ANSWER)
    with star.batch() as batch:
        rows = [batch.add(first, ids(5, seed=seed), **ANSWER) for seed in (1, 2, 1)]
        answers = [row.result().token_ids for row in rows]
    right = [first.continue_with(ids(5, seed=seed), **ANSWER).token_ids for seed in (1, 2)]
    assert answers == [right[0], right[1], right[0]]


def test_a_canceled_row_is_kept_as_far_as_it_came(star: StarLLM, context: EncodedContext) -> None:
    with star.batch() as batch:
        row = batch.add(context, ids(QUERY), keep=True, max_new_tokens=20, ignore_eos=True)
        waiting = batch.add(context, ids(QUERY), keep=True)
        while len(row.token_ids) < 3:
            batch.step()
        row.cancel()
        reply = row.result()
        following = batch.add(reply, ids(4, seed=8), **ANSWER).result()
        text = [*ids(QUERY), *reply.token_ids, *ids(4, seed=8)]
        assert following.token_ids == star.generate(context, text, **ANSWER).token_ids
        assert following.kept_tokens == QUERY + len(reply.token_ids) - 1
        late = batch.add(context, ids(QUERY), keep=True)
        late.cancel()
        assert late.result().conversation is not None
        waiting.cancel()


def test_a_second_look_and_sources_of_a_turn(star: StarLLM, context: EncodedContext) -> None:
    first = star.generate(context, ids(QUERY), keep=True, **ANSWER)
    with star.batch() as batch:
        for options in (dict(second_look=0.2), dict(sources=2)):
            row = batch.add(first, ids(5, seed=2), **ANSWER, **options).result()
            right = first.continue_with(ids(5, seed=2), **ANSWER, **options)
            assert row.token_ids == right.token_ids
            assert row.kept_tokens == right.kept_tokens
            assert (row.sources is None) == (right.sources is None)
            for mine, other in zip(row.sources or (), right.sources or (), strict=True):
                assert (mine.start, mine.stop) == (other.start, other.stop)


def test_refusals(star: StarLLM, context: EncodedContext) -> None:
    plain = star.generate(context, ids(QUERY), **ANSWER)
    with star.batch() as batch:
        with pytest.raises(InvalidInputError, match="not kept; ask with keep=True"):
            batch.add(plain, ids(3))
        with pytest.raises(InvalidInputError, match="expected an EncodedContext, got str"):
            batch.add("book", ids(3))  # type: ignore[arg-type]
        kept = star.generate(context, ids(QUERY), keep=True, **ANSWER)
        with pytest.raises(InvalidInputError, match="this conversation is token ids"):
            batch.add(kept, "And?")
    small = engine("gpt2", block_size=64)
    long = small.generate(small.encode(ids(400)), ids(50), keep=True, **ANSWER)
    with small.batch() as batch, pytest.raises(ContextLengthError, match="1 turn before it"):
        batch.add(long, ids(60), **ANSWER)


def test_what_was_kept_holds_after_an_equal_context(star: StarLLM, context: EncodedContext) -> None:
    """Forbids that an answer's keys and values keep a context in memory, or need that very one."""
    query = ids(QUERY)
    with star.batch() as batch:
        kept = kept_by(batch.add(context, query, keep=True, **ANSWER).result().conversation)
        assert kept is not None
        again = star.encode(ids(CONTEXT))
        longer = [*kept.ids, *ids(5)]
        row = batch.add(again, longer, begun=kept, keep=True, **ANSWER).result()
        right = star.generate(context, longer, **ANSWER)
        assert row.token_ids == right.token_ids
        torch.testing.assert_close(row.logits, right.logits, atol=1e-3, rtol=1e-4)
        assert row.kept_tokens == len(kept.ids)
        # What differs is computed.
        other = [*query[:4], *longer]
        row = batch.add(again, other, begun=kept, **ANSWER).result()
        assert row.token_ids == star.generate(context, other, **ANSWER).token_ids


def test_a_question_asked_again_needs_no_graph_of_its_own(
    star: StarLLM, context: EncodedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forbids that an answer waits for the capture of a graph that nothing else runs.

    All of the question but its last token is kept, and steps of rows have graphs of their own.
    """
    graphs = Buckets(star.runtime.handle)
    monkeypatch.setattr(Request, "graphs", graphs)
    query = ids(30)
    with star.batch() as batch:
        first = batch.add(context, query, keep=True, **ANSWER).result()
        kept = kept_by(first.conversation)
        again = batch.add(context, query, begun=kept, **ANSWER).result()
        single = batch.add(context, query[:1], **ANSWER).result()
    assert graphs.lengths == [32, 16, 16]
    assert again.kept_tokens == 14
    assert again.token_ids == first.token_ids
    torch.testing.assert_close(again.logits, first.logits, atol=1e-3, rtol=1e-4)
    assert single.token_ids == star.generate(context, query[:1], **ANSWER).token_ids
