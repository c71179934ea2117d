"""Rows that join while others run: their queries are read by a step, and answers are as alone.

A stand-in for the graphs of rows runs a forward of each token on the CPU. Others read
queries by the kernel: tests/unit/test_row_graphs.py, tests/gpu/test_rows_cuda.py.
"""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.errors import NonFiniteError
from star_attention.generation.batching import scheduler
from star_attention.generation.batching.cohort import Cohort
from star_attention.generation.batching.mixed import MOST_TOKENS
from star_attention.hf.cache.rows import RowsCache, RowSet
from tests.engines import engine, ids
from tests.row_mixes import assert_same, check_mix


class TokenByToken:
    """Stands in for CUDA graphs: a forward of its own for each row, in order.

    Attributes:
        queries: of each forward that has read queries, how many and their tokens.
        faults: what to do in place of forwards with queries: raise an exception, or return None.
        broken: token whose logits are not numbers.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.of_rows = self
        # No contexts are encoded by graphs.
        self.of_encoding = SimpleNamespace(run=lambda *_, **__: False)
        self.queries: list[tuple[int, int]] = []
        self.faults: list[type[Exception] | None] = []
        self.broken: int | None = None

    def look(self) -> None:
        """Drop nothing: nothing was captured."""

    def serve(self, *_: Any) -> bool:
        """Leave single answers alone."""
        return False

    def run(
        self,
        rows: RowSet,
        tokens_R: torch.Tensor,
        comm: Any,
        wanted: list[int] | None = None,
        sliced: tuple[str, ...] = (),
    ) -> torch.Tensor | None:
        tokens = tokens_R.tolist()
        if wanted is not None:
            if self.faults:
                fault = self.faults.pop()
                if fault is not None:
                    raise fault("out of memory")
                return None
            counts = [at - before for before, at in zip([-1, *wanted], wanted, strict=False)]
            read = [
                count
                for count, at in zip(counts, wanted, strict=True)
                if count > 1 or not rows.rows[at].tail_tokens
            ]
            self.queries.append((len(read), sum(read)))
        logits = [
            self._forward(replace(row, ahead=0), token, comm)
            for row, token in zip(rows.rows, tokens, strict=True)
        ]
        return torch.cat(logits if wanted is None else [logits[at] for at in wanted])

    def _forward(self, row: Any, token: int, comm: Any) -> torch.Tensor:
        cache = RowsCache(RowSet([row]), self._handle.windows, comm)
        at = torch.tensor([[row.position]])
        logits_11V = self._handle.logits(torch.tensor([[token]]), at, cache, None)
        logits_1V = logits_11V[:, -1].float()
        return logits_1V * math.nan if token == self.broken else logits_1V


def served(star: StarLLM) -> TokenByToken:
    graphs = TokenByToken(star.runtime.handle)
    # `graphs` is a cached property.
    star.runtime.handle.__dict__["graphs"] = graphs
    return graphs


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Forwards after Python has looked at a step's tokens, and before."""

    def cohort(*arguments: Any, is_ahead: bool) -> Cohort:
        return Cohort(*arguments, is_ahead=request.param)

    monkeypatch.setattr(scheduler, "Cohort", cohort)
    return bool(request.param)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gpt_oss",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("qwen3", "gemma2", "gemma3n", "mistral")
        ),
    ],
)
def test_any_mix_of_rows_equals_single_answers(name: str, ahead: bool) -> None:
    star = engine(name, block_size=16)
    graphs = served(star)
    contexts = [star.encode(ids(length, seed=length)) for length in (70, 45, 30)]
    check_mix(star, contexts, rows=16, seed=3)
    assert len(graphs.queries) >= 4


@pytest.mark.parametrize(
    "settings", [{"kv_dtype": "fp8"}, {"method": "dense"}, {"lookback": 1}], ids=str
)
def test_rows_of_other_contexts(settings: dict[str, Any], ahead: bool) -> None:
    star = engine("mistral", **({"block_size": 16} | settings))
    graphs = served(star)
    contexts = [star.encode(ids(length, seed=length)) for length in (70, 45)]
    check_mix(star, contexts, rows=8, seed=8)
    assert graphs.queries


def test_rows_that_no_step_reads() -> None:
    """Second looks, and layers that expand their keys."""
    for name, more in (("llama", {"second_look": 0.3}), ("jetmoe", {})):
        star = engine(name, block_size=16)
        graphs = served(star)
        check_mix(star, [star.encode(ids(70))], rows=5, seed=7, **more)
        assert not graphs.queries


def test_a_step_reads_few_queries_and_nobody_overtakes(ahead: bool) -> None:
    star = engine("llama", block_size=16)
    graphs = served(star)
    contexts = [star.encode(ids(20 + number, seed=number)) for number in range(6)]
    short: dict[str, Any] = dict(max_new_tokens=2, ignore_eos=True)
    jobs = [(context, ids(50, seed=10 + at)) for at, context in enumerate(contexts[:5])]
    # A query that is too long for any step, and one after it that is not.
    jobs += [(contexts[5], ids(MOST_TOKENS + 1, seed=20)), (contexts[1], ids(3, seed=21))]
    with star.batch() as batch:
        batch.add(contexts[0], ids(4), max_new_tokens=30, ignore_eos=True)
        for _ in range(3):
            batch.step()
        rows = [batch.add(context, query, **short) for context, query in jobs]
        begun: list[int] = []
        while not all(row.done for row in rows):
            batch.step()
            begun += [at for at, row in enumerate(rows) if row.token_ids and at not in begun]
        results = [row.result() for row in rows]
    if ahead:
        # Its forward has ended when that of the query before it begins.
        begun.remove(5)
    assert begun == sorted(begun)
    assert graphs.queries[:2] == [(2, 100), (2, 100)]
    assert max(tokens for _, tokens in graphs.queries) <= MOST_TOKENS
    assert sum(queries for queries, _ in graphs.queries) == len(jobs) - 1
    for (context, query), result in zip(jobs, results, strict=True):
        assert_same(result, star.generate(context, query, **short))


def test_many_queries_on_a_context_are_read_by_themselves() -> None:
    """Forbids to let a crowd wait for steps where one forward reads all of their queries."""
    star = engine("llama", block_size=16)
    graphs = served(star)
    context = star.encode(ids(40))
    with star.batch() as batch:
        batch.add(context, ids(4), max_new_tokens=9, ignore_eos=True)
        batch.step()
        batch.step()
        rows = [batch.add(context, ids(50, seed=seed), max_new_tokens=2) for seed in range(3)]
        batch.step()
        assert all(row.token_ids for row in rows)
    assert not graphs.queries


@pytest.mark.parametrize("fault", [None, torch.OutOfMemoryError], ids=["capture", "memory"])
def test_where_a_step_cannot_read_queries_nothing_is_lost(
    fault: type[Exception] | None, ahead: bool
) -> None:
    """Neither a capture that fails nor memory for the larger forward alone ends a row."""
    star = engine("llama", block_size=16)
    graphs = served(star)
    contexts = [star.encode(ids(length, seed=length)) for length in (70, 45)]
    graphs.faults = [fault] * 100
    check_mix(star, contexts, rows=8, seed=4)
    assert len(graphs.faults) < 100
    assert not graphs.queries


def test_a_row_whose_logits_are_not_numbers_ends_alone(ahead: bool) -> None:
    star = engine("llama", block_size=16)
    graphs = served(star)
    context = star.encode(ids(70))
    settings: dict[str, Any] = dict(max_new_tokens=12, ignore_eos=True)
    expected = star.generate(context, ids(4), **settings)
    graphs.broken = ids(5, seed=6)[-1]
    assert graphs.broken not in expected.token_ids
    with star.batch() as batch:
        first = batch.add(context, ids(4), **settings)
        batch.step()
        batch.step()
        broken = batch.add(context, ids(5, seed=6), **settings)
        with pytest.raises(NonFiniteError, match="NaN"):
            broken.result()
        assert_same(first.result(), expected)
    assert graphs.queries == [(1, 5)]


def test_a_query_that_is_not_read_yet_can_be_canceled() -> None:
    star = engine("llama", block_size=16)
    served(star)
    context, other = star.encode(ids(70)), star.encode(ids(30, seed=2))
    freed = weakref.ref(other)
    settings: dict[str, Any] = dict(max_new_tokens=12, ignore_eos=True)
    with star.batch() as batch:
        first = batch.add(context, ids(4), **settings)
        batch.step()
        batch.step()
        # The forward of this step's tokens comes before the long query, and the short one after.
        long = batch.add(context, ids(MOST_TOKENS + 1, seed=3), **settings)
        short = batch.add(other, ids(5, seed=4), **settings)
        batch.step()
        assert (batch.running, batch.waiting) == (3, 0)
        assert (len(long.token_ids), len(short.token_ids)) == (1, 0)
        del other
        short.cancel()
        gc.collect()
        assert freed() is None
        assert batch.running == 2
        results = [first.result(), long.result()]
    assert short.result().finish_reason == "canceled"
    for query, result in zip((ids(4), ids(MOST_TOKENS + 1, seed=3)), results, strict=True):
        assert_same(result, star.generate(context, query, **settings))


def test_a_conversation_goes_on_from_what_it_kept(ahead: bool) -> None:
    star = engine("llama", block_size=16)
    graphs = served(star)
    context = star.encode(ids(70))
    reply = star.generate(context, ids(6), max_new_tokens=5, keep=True)
    question, settings = ids(9, seed=8), dict(max_new_tokens=6)
    expected = star.generate(reply, question, **settings)
    with star.batch() as batch:
        batch.add(context, ids(4), max_new_tokens=20, ignore_eos=True)
        batch.step()
        batch.step()
        result = batch.add(reply, question, **settings).result()
        assert_same(result, expected)
        assert result.kept_tokens == expected.kept_tokens > 6
        again = batch.add(result, ids(3, seed=9), **settings).result()
    assert_same(again, star.generate(expected, ids(3, seed=9), **settings))
    assert len(graphs.queries) == 2
    assert graphs.queries[0] == (1, result.query_tokens - result.kept_tokens)


def test_rows_end_while_queries_wait_for_their_step(ahead: bool) -> None:
    """Without rows under way the queries have a forward of their own."""
    star = engine("llama", block_size=16)
    served(star)
    context = star.encode(ids(70))
    for tokens in (2, 3, 4):
        with star.batch() as batch:
            first = batch.add(context, ids(4), max_new_tokens=tokens, ignore_eos=True)
            batch.step()
            batch.step()
            last = batch.add(context, ids(5, seed=2), max_new_tokens=4, ignore_eos=True)
            assert len(last.result().token_ids) == 4
            assert first.done
            assert (batch.running, batch.waiting) == (0, 0)
