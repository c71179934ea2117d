"""Batches on several ranks: rows answer as `generate` answers each alone."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import TorchComm
from star_attention.errors import InvalidInputError, NonFiniteError
from star_attention.hf.cache.rows import RowKV
from star_attention.hf.execution import finite, rows
from star_attention.storage.kv import ContextKV
from tests.dist.pool import Pool
from tests.dist.tp_models import on_disk, star_of
from tests.engines import assert_same_kv, engine, ids
from tests.row_mixes import check_mix

QUICK: dict[str, Any] = dict(max_new_tokens=6, ignore_eos=True)
SMALL: dict[str, Any] = dict(tokens_per_forward=32)


def held() -> tuple[int, int]:
    """Return how many shards of contexts, and how many rows, are in this process."""
    gc.collect()
    kinds = [type(item) for item in gc.get_objects()]
    return kinds.count(ContextKV), kinds.count(RowKV)


def led(
    comm: TorchComm,
    session: Callable[..., Any],
    settings: dict[str, Any] | None = None,
    plant: Callable[[], Any] | None = None,
    **more: Any,
) -> Any:
    """Run a session on rank 0, which the other ranks follow.

    Args:
        comm: the ranks.
        session: what rank 0 does.
        settings: those of the engine.
        plant: called on rank 1 before it follows; returns what undoes it.
        more: arguments of the session.

    Returns:
        What the session returns; of other ranks how many shards and rows they hold at its end.
    """
    settings = {"name": "llama", "block_size": 16, **(settings or {})}
    star = engine(settings.pop("name"), comm=comm, **settings)
    return follow_or_lead(star, session, plant, **more)


def follow_or_lead(
    star: StarLLM,
    session: Callable[..., Any],
    plant: Callable[[], Any] | None = None,
    **more: Any,
) -> Any:
    """Run a session as `led` does, on an engine that all ranks have made."""
    if star.rank == 0:
        try:
            return session(star, **more)
        finally:
            star.close()
    before = held()
    undo = plant() if plant is not None and star.rank == 1 else None
    try:
        star.follow()
    finally:
        if undo is not None:
            undo()
    return tuple(now - was for now, was in zip(held(), before, strict=True))


# ------------------------------------------------------------------ answers


def mix(star: StarLLM, count: int, **more: Any) -> None:
    # The last of them has no block for the last rank.
    contexts = [star.encode(ids(length, seed=length)) for length in (70, 45, 9)]
    check_mix(star, contexts, rows=count, seed=3, **more)


MIXES: list[Any] = [
    (2, {}),
    *(
        pytest.param(ranks, settings, marks=pytest.mark.slow)
        for ranks, settings in [
            (3, {}),
            (3, {"name": "gemma2"}),
            (2, {"name": "gpt_oss"}),
            (2, {"name": "gemma3n"}),
            (2, {"name": "deepseek_v3"}),
            (3, {"name": "phi3_longrope"}),
            (2, {"kv_dtype": "fp8"}),
            (3, {"lookback": 1}),
            (3, {"method": "ring"}),
            (2, {"method": "dense"}),
            (2, {"name": "llama_mha", "slice_weights": True}),
        ]
    ),
]


@pytest.mark.parametrize(("ranks", "settings"), MIXES, ids=str)
def test_any_mix_of_rows_equals_single_answers(
    pool: Pool, ranks: int, settings: dict[str, Any]
) -> None:
    _, *others = pool.run(led, ranks, session=mix, settings=settings, count=6)
    assert others == [(0, 0)] * (ranks - 1), "memory is held when nobody uses it"


def mix_in_a_mesh(comm: TorchComm, path: Path) -> Any:
    return follow_or_lead(star_of(comm, path, 2, block_size=16), mix, count=8)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_heads_take_part(pool: Pool, models: Path, ranks: int) -> None:
    pool.run(mix_in_a_mesh, ranks, path=on_disk(models, "llama"))


def sliced_traffic(star: StarLLM) -> int:
    """Return how many collectives a step of two rows takes."""
    context, comm = star.encode(ids(70)), star.runtime.comm
    with star.batch() as batch:
        for _ in range(2):
            batch.add(context, ids(3), **QUICK)
        batch.step()
        before = comm.cp_traffic.calls
        batch.step()
        return comm.cp_traffic.calls - before


@pytest.mark.slow
def test_rows_multiply_slices_of_the_weights(pool: Pool) -> None:
    counts = []
    for sliced in (False, True):
        settings = dict(name="llama_mha", slice_weights=sliced)
        count, _ = pool.run(led, 2, session=sliced_traffic, settings=settings)
        counts.append(count)
    assert counts[1] > 2 * counts[0] > 0


@pytest.mark.slow
def test_second_looks_are_of_each_row(pool: Pool) -> None:
    pool.run(led, 2, session=mix, count=4, second_look=0.3)


def everything(star: StarLLM) -> list[Any]:
    """Use a batch for all that it can do; return tokens, and what earlier turns kept."""
    sea, air = star.encode(ids(70, seed=1)), star.encode(ids(45, seed=2))
    seen: list[Any] = []

    def note(row: Any) -> Any:
        result = row.result()
        seen.append((result.token_ids, result.kept_tokens, result.finish_reason))
        return result

    with star.batch() as batch:
        first = batch.add(sea, ids(5), keep=True, **QUICK)
        other = batch.add(air, ids(3), max_new_tokens=40, ignore_eos=True)
        batch.step()
        # Other calls come between two steps.
        seen.append(star.generate(air, ids(4), **QUICK).token_ids)
        job = batch.encode(ids(90, seed=3))
        longer = star.extend(sea, ids(20, seed=4))
        second = note(batch.add(note(first), ids(4, seed=5), **QUICK))
        # A conversation of rows goes on in `generate`, and the other way round.
        reply = second.continue_with(ids(2, seed=6), **QUICK)
        seen.append((reply.token_ids, reply.kept_tokens))
        note(batch.add(reply, ids(3, seed=7), sources=2, **QUICK))
        land = job.result()
        changed = ids(90, seed=3)[:60] + ids(40, seed=9)
        again = batch.encode(changed, reuse=land)
        note(batch.add(longer, ids(3), second_look=0.2, **QUICK))
        note(batch.add(land, ids(3), **QUICK))
        note(batch.add(again.result(), ids(3), **QUICK))
        seen.append(again.result().reused_tokens)
        note(other)
        beams = star.generate(land, ids(3), num_beams=2, max_new_tokens=3)
        seen.append(beams.token_ids)
    return seen


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_batch_does_what_it_does_on_one_process(pool: Pool, ranks: int) -> None:
    seen, *others = pool.run(led, ranks, session=everything, settings=SMALL)
    assert seen == everything(engine("llama", block_size=16, **SMALL))
    assert others == [(0, 0)] * (ranks - 1)


# ------------------------------------------------------------------ contexts meanwhile


def encode_meanwhile(star: StarLLM, canceled_after: int) -> list[int]:
    """Encode a context beside a row, after one that is canceled; return tokens between forwards."""
    asked = star.encode(ids(40, seed=2))
    alone = star.with_config(tokens_per_forward=4).encode(ids(100))
    expected = star.generate(alone, ids(5), **QUICK)
    beside = star.generate(asked, ids(4), max_new_tokens=60, ignore_eos=True).token_ids
    seen: list[int] = []
    with star.batch() as batch:
        row = batch.add(asked, ids(4), max_new_tokens=60, ignore_eos=True)
        job = batch.encode(ids(100, seed=8))
        while job.progress == 0.0:
            batch.step()
        for _ in range(canceled_after):
            batch.step()
        job.cancel()
        started = len(row.token_ids)
        job = batch.encode(ids(100), progress=lambda *_: seen.append(len(row.token_ids) - started))
        context = job.result()
        reply = batch.add(context, ids(5), **QUICK).result()
        assert row.result().token_ids == beside
    assert_same_kv(context, alone)
    assert reply.token_ids == expected.token_ids
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "settings", "turns"),
    [
        # An anchor of 8 tokens takes two forwards of 4, for which the other ranks wait.
        (2, {"anchor_size": 8}, 11),
        (3, {"anchor_size": 8}, 7),
        (3, {"anchor_size": 8, "anchor_source": "local"}, 8),
        (2, {"anchor_size": 0}, 12),
        (2, {"method": "dense"}, 25),
        (2, {"lookback": 1}, 1),
        (2, {"method": "ring"}, 0),
    ],
    ids=str,
)
def test_rows_go_on_while_ranks_encode(
    pool: Pool, ranks: int, settings: dict[str, Any], turns: int
) -> None:
    sizes = dict(tokens_per_forward=4, **settings)
    for canceled_after in (0, 3):
        seen, *others = pool.run(
            led,
            ranks,
            session=encode_meanwhile,
            settings=sizes,
            canceled_after=canceled_after,
        )
        assert len(set(seen)) >= turns
        assert others == [(0, 0)] * (ranks - 1)


# ------------------------------------------------------------------ errors


def fail_once() -> Callable[[], None]:
    """Let this rank fail in its third forward of rows."""
    real, count = rows.follow_forward, [0]

    def failing(*arguments: Any) -> None:
        count[0] += 1
        if count[0] == 3:
            raise ZeroDivisionError("planted")
        real(*arguments)

    rows.follow_forward = failing  # type: ignore[assignment]

    def undo() -> None:
        rows.follow_forward = real

    return undo


def batch_after_a_fault(star: StarLLM) -> list[Any]:
    context = star.encode(ids(70))
    batch = star.batch()
    row = batch.add(context, ids(5), **QUICK)
    job = batch.encode(ids(400, seed=8), progress=False)
    with pytest.raises(ZeroDivisionError, match=r"planted \(on rank 1"):
        row.result()
    assert isinstance(row.error, ZeroDivisionError)
    assert isinstance(job.error, ZeroDivisionError)
    with pytest.raises(InvalidInputError, match="has failed"):
        batch.step()
    with star.batch() as batch:
        return batch.add(context, ids(5), **QUICK).result().token_ids


def test_an_error_of_one_rank_ends_the_batch_alone(pool: Pool) -> None:
    """The next batch works, and no rank holds anything of the one before."""
    tokens, *others = pool.run(led, 2, session=batch_after_a_fault, settings=SMALL, plant=fail_once)
    star = engine("llama", block_size=16)
    assert tokens == star.generate(star.encode(ids(70)), ids(5), **QUICK).token_ids
    assert others == [(0, 0)]


def see_infinity_once() -> Callable[[], None]:
    """Let this rank find numbers in its part of the second context that are not finite."""
    real, count = finite.problem_in, [0]

    def problem(*arguments: Any) -> Any:
        count[0] += 1
        return NonFiniteError("planted") if count[0] == 2 else real(*arguments)

    finite.problem_in = problem

    def undo() -> None:
        finite.problem_in = real

    return undo


def batch_with_a_bad_context(star: StarLLM) -> None:
    context = star.encode(ids(70))
    expected = star.generate(context, ids(5), max_new_tokens=30, ignore_eos=True).token_ids

    def failing(*_: Any) -> torch.Tensor:
        raise KeyError("mine")

    with star.batch() as batch:
        row = batch.add(context, ids(5), max_new_tokens=30, ignore_eos=True)
        bad = batch.add(context, ids(4), logits_processor=[failing], **QUICK)
        job = batch.encode(ids(40, seed=4))
        with pytest.raises(NonFiniteError, match="planted"):
            job.result()
        with pytest.raises(KeyError, match="mine"):
            bad.result()
        after = batch.encode(ids(40, seed=4))
        assert row.result().token_ids == expected
        assert len(after.result()) == 40


@pytest.mark.slow
def test_an_error_that_is_of_one_row_or_context_is_its_own(pool: Pool) -> None:
    pool.run(led, 2, session=batch_with_a_bad_context, plant=see_infinity_once)


def make_batches(comm: TorchComm) -> str:
    star = engine("llama", comm=comm, block_size=16)
    with pytest.raises(InvalidInputError) as raised:
        star.batch()
    return str(raised.value)


def test_only_rank_0_runs_a_batch(pool: Pool) -> None:
    refusal = "rank 0 runs a batch, and rank 1 follows it; call star.follow() there"
    for message in pool.run(make_batches, 2):
        assert message.startswith(refusal)
