"""`generate` of several queries or answers: rows that end leave the steps of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from star_attention.errors import OutOfMemoryError
from star_attention.generation import start
from star_attention.hf.cache.rows import RowSet
from star_attention.hf.execution.rows import RowForwards
from tests.engines import engine, ids


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each shared forward."""
    seen: list[int] = []
    run = RowForwards.run

    def counted(self: RowForwards, rows: RowSet, *arguments: Any) -> torch.Tensor:
        seen.append(len(rows))
        return run(self, rows, *arguments)

    monkeypatch.setattr(RowForwards, "run", counted)
    return seen


def test_queries_that_end_leave(sizes: list[int]) -> None:
    star = engine("llama", block_size=16)
    context = star.encode(ids(70))
    queries = [ids(length, seed=length) for length in (3, 9, 4, 20)]
    alone = [star.generate(context, query, max_new_tokens=20, ignore_eos=True) for query in queries]
    # Tokens that end some answers early, and one query at once.
    ends = [alone[0].token_ids[4], alone[2].token_ids[9]]
    expected = [
        star.generate(context, query, max_new_tokens=20, eos_token_id=ends) for query in queries
    ]
    assert not sizes
    replies = star.generate(context, queries, max_new_tokens=20, eos_token_id=ends)
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in expected]
    lengths = [len(reply.token_ids) for reply in replies]
    assert len(set(lengths)) > 1
    assert sizes == [sum(length > step for length in lengths) for step in range(1, max(lengths))]


@pytest.mark.parametrize("queries", [1, 3])
def test_several_answers_are_those_of_one_batch(
    queries: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers to a query share random numbers, also after some of them have ended."""
    star = engine("llama", block_size=16)
    context = star.encode(ids(70))
    asked: Any = [ids(3 + number) for number in range(queries)]
    settings: dict[str, Any] = dict(
        do_sample=True, num_return_sequences=3, seed=5, max_new_tokens=12, eos_token_id=[7, 9]
    )
    replies = star.generate(context, asked if queries > 1 else asked[0], **settings)
    assert sizes
    sizes.clear()
    monkeypatch.setattr(start, "serves", lambda *_: False)
    expected = star.generate(context, asked if queries > 1 else asked[0], **settings)
    assert not sizes
    if queries == 1:
        replies, expected = [replies], [expected]
    assert [[reply.token_ids for reply in each] for each in replies] == [
        [reply.token_ids for reply in each] for each in expected
    ]


class Same(LogitsProcessor):
    """Counts the rows that it sees."""

    def __init__(self) -> None:
        self.rows: set[int] = set()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.rows.add(len(input_ids))
        return scores


def test_processors_of_the_user_see_all_rows(sizes: list[int]) -> None:
    star = engine("llama", block_size=16)
    context = star.encode(ids(70))
    processor = Same()
    processors = LogitsProcessorList([processor])
    star.generate(context, [ids(3), ids(4)], max_new_tokens=5, logits_processor=processors)
    assert processor.rows == {2}
    assert not sizes


def test_sources_and_records_of_several_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    star = engine("mistral", block_size=16)
    context = star.encode(ids(70))
    queries = [ids(3), ids(8)]
    settings: dict[str, Any] = dict(
        sources=2, logprobs=2, return_logits=True, max_new_tokens=6, ignore_eos=True
    )
    replies = star.generate(context, queries, **settings)
    monkeypatch.setattr(start, "serves", lambda *_: False)
    for reply, expected in zip(replies, star.generate(context, queries, **settings), strict=True):
        assert reply.token_ids == expected.token_ids
        torch.testing.assert_close(reply.logits, expected.logits, atol=1e-4, rtol=0)
        assert [s.start for s in reply.sources] == [s.start for s in expected.sources]
        assert reply.timings.sources_s > 0
        assert reply.timings.ttft_s > 0
        assert reply.timings.tokens_per_s > 0
        assert [each.id for each in reply.logprobs] == reply.token_ids


def test_without_memory_the_call_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    star = engine("llama", block_size=16)
    context = star.encode(ids(70))

    def without_memory(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(RowForwards, "run", without_memory)
    with pytest.raises(OutOfMemoryError, match=r"3 answers at once over 70 .*ask fewer queries"):
        star.generate(context, [ids(3), ids(4), ids(5)], max_new_tokens=5)
