"""Faults of one rank in a batch: what can go on goes on, on all ranks alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.distributed import TorchComm
from star_attention.errors import OutOfMemoryError
from star_attention.hf.cache.decode import AnswerCache
from star_attention.hf.cache.encode import EncodeCache
from star_attention.hf.cache.rows import RowsCache
from star_attention.hf.execution.rows import RowForwards
from tests.dist.pool import Pool
from tests.dist.test_batch_ranks import follow_or_lead
from tests.engines import engine, ids

OPTIONS: dict[str, Any] = dict(max_new_tokens=12, ignore_eos=True)
SIZES: dict[str, Any] = dict(block_size=16, tokens_per_forward=32)


def fail_in(owner: Any, name: str, number: int, *, after: bool, error: type[Exception]) -> Any:
    """Let a method's call of that number fail, before or after its work; return what undoes it."""
    real, calls = getattr(owner, name), [0]

    def failing(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == number and not after:
            raise error("planted")
        result = real(*arguments, **options)
        if calls[0] == number:
            raise error("planted")
        return result

    setattr(owner, name, failing)
    return lambda: setattr(owner, name, real)


PLACES: dict[str, tuple[Any, str]] = {
    "query": (AnswerCache, "begin"),
    "step": (RowsCache, "begin"),
    "end of a step": (RowForwards, "run"),
    "context": (EncodeCache, "attend"),
}


def with_a_fault(
    comm: TorchComm, session: Callable[..., Any], rank: int, place: str, number: int, **fault: Any
) -> Any:
    """Run a session that a fault of one rank interrupts; see `fail_in`."""
    star = engine("llama", comm=comm, **SIZES)
    undo: Any = None
    if star.rank == rank:
        undo = fail_in(*PLACES[place], number, **fault)
    try:
        return follow_or_lead(star, session)
    finally:
        if undo is not None:
            undo()


def three_rows(star: StarLLM) -> list[Any]:
    """Run two rows and a context, and then a row that comes later; return what became of them."""
    context, other = star.encode(ids(70)), star.encode(ids(45, seed=2))
    with star.batch() as batch:
        rows = [batch.add(context, ids(5), **OPTIONS), batch.add(other, ids(4), **OPTIONS)]
        for _ in range(4):
            batch.step()
        rows.append(batch.add(context, ids(3), **OPTIONS))
        job = batch.encode(ids(80, seed=3))
        try:
            list(batch)
        except Exception as error:
            return [type(error)]
        outcomes: list[Any] = [row.error or row.result().token_ids for row in rows]
        outcomes.append(job.error or batch.add(job.result(), ids(4), **OPTIONS).result().token_ids)
    # The next batch works, whatever happened.
    with star.batch() as batch:
        assert batch.add(context, ids(5), **OPTIONS).result().token_ids
    return outcomes


def kinds(outcomes: list[Any]) -> list[Any]:
    return [type(each) if isinstance(each, Exception) else each for each in outcomes]


MEMORY = OutOfMemoryError
FAULTS: list[Any] = [
    # The other rank has run the step, and runs it again without the youngest row.
    (2, dict(rank=0, place="end of a step", number=6, after=True, error=MEMORY)),
    *(
        pytest.param(ranks, dict(**fault, number=number, after=after), marks=pytest.mark.slow)
        for ranks, fault, number, after in [
            # The query of the row that comes later.
            (2, dict(rank=1, place="query", error=MEMORY), 3, False),
            (2, dict(rank=0, place="query", error=ZeroDivisionError), 3, True),
            (3, dict(rank=1, place="query", error=MEMORY), 3, True),
            (2, dict(rank=1, place="step", error=MEMORY), 6, False),
            (3, dict(rank=0, place="end of a step", error=MEMORY), 6, True),
        ]
    ),
]


@pytest.mark.parametrize(("ranks", "fault"), FAULTS, ids=str)
def test_what_is_of_one_row_ends_it_alone(pool: Pool, ranks: int, fault: dict[str, Any]) -> None:
    expected = kinds(three_rows(engine("llama", **SIZES)))
    outcomes, *others = pool.run(with_a_fault, ranks, session=three_rows, **fault)
    assert others == [(0, 0)] * (ranks - 1)
    *rows, context = kinds(outcomes)
    assert rows == [*expected[:2], fault["error"]]
    # It may have been half encoded.
    assert context in (expected[3], fault["error"])


@pytest.mark.slow
def test_what_is_of_one_context_ends_it_alone(pool: Pool) -> None:
    """Rank 0 does not wait for the other one there, and hears of its fault in a later command."""
    expected = kinds(three_rows(engine("llama", **SIZES)))
    fault = dict(rank=1, place="context", number=12, after=False, error=MEMORY)
    outcomes, held = pool.run(with_a_fault, 2, session=three_rows, **fault)
    assert held == (0, 0)
    assert kinds(outcomes) == [*expected[:3], MEMORY]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        # Rank 0 has gone on meanwhile.
        dict(rank=1, place="end of a step", number=6, after=True, error=MEMORY),
        dict(rank=1, place="step", number=6, after=False, error=ZeroDivisionError),
    ],
    ids=str,
)
def test_what_leaves_ranks_with_other_rows_ends_the_batch(
    pool: Pool, fault: dict[str, Any]
) -> None:
    (outcome,), held = pool.run(with_a_fault, 2, session=three_rows, **fault)
    assert outcome is fault["error"]
    assert held == (0, 0)
