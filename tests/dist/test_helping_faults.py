"""A call that ends while rank 0 computes layers for other ranks: later calls are as ever.

tests/dist/test_faults.py has ranks that are lost there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import TorchComm
from star_attention.hf.cache.helping import HelpReceiver, HelpSender
from star_attention.hf.execution.handle import ModelHandle
from star_attention.hf.execution.layer_part import layers_of
from tests.dist.helped import attention_counts, shards
from tests.dist.pool import Pool
from tests.dist.test_batch_faults_ranks import fail_in
from tests.dist.test_batch_ranks import follow_or_lead
from tests.engines import CONTEXT, bundled_tokenizer, ids, text_model

SIZES: dict[str, Any] = dict(block_size=16, anchor_size=16, tokens_per_forward=16)
OPTIONS: dict[str, Any] = dict(max_new_tokens=5, ignore_eos=True)
QUERY = "A dog"


def helped_engine(comm: TorchComm | None = None) -> StarLLM:
    return StarLLM(text_model(), bundled_tokenizer(), comm=comm or "solo", **SIZES)


def left_over(star: StarLLM) -> list[str]:
    """Return what a call has left in the model or in memory."""
    gc.collect()
    kinds = (HelpReceiver, HelpSender)
    held = [type(item).__name__ for item in gc.get_objects() if isinstance(item, kinds)]
    layers = layers_of(star.runtime.handle.decoder)
    return held + [f"layer {i}" for i, layer in enumerate(layers) if "forward" in vars(layer)]


def call_again(star: StarLLM) -> list[Any]:
    """Return what comes after a call that has failed: a context, and an answer in pieces."""
    context = star.encode(ids(CONTEXT))
    with star.stream(context, QUERY, **OPTIONS) as stream:
        pieces = list(stream)
    tokens = star.generate(context, QUERY, **OPTIONS).token_ids
    return [shards([context]), "".join(pieces), tokens]


def check_later_calls(results: list[list[Any]]) -> None:
    """Compare shards, text and tokens of `call_again` with those of one process."""
    ((whole,), text, tokens) = call_again(helped_engine())
    for (own,), *answer in results:
        assert answer == [text, tokens]
        for layer, whole_layer in zip(own, whole, strict=True):
            assert len(layer) == len(whole_layer) == 1
    for index, ((keys, values),) in enumerate(whole):
        parts = [own[index][0] for (own,), *_ in results]
        assert torch.equal(torch.cat([part[0] for part in parts], 2), keys)
        assert torch.equal(torch.cat([part[1] for part in parts], 2), values)


# ------------------------------------------------------------------ exceptions

PLACES: dict[str, tuple[Any, str, int]] = {
    # Rank 0 is in the middle of a layer, or of what it sends after the last one.
    "send": (HelpSender, "send", 1),
    "hidden": (HelpSender, "send_hidden", 1),
    # Rank 0 has sent everything, and is in a forward of its own.
    "own": (ModelHandle, "encode", 3),
    # Rank 2 takes what rank 0 has computed; it has just asked for it, as rank 1 does too.
    "request": (HelpReceiver, "request", 1),
    "keep": (HelpReceiver, "hidden_states", 1),
}


def fail_while_rank_0_helps(
    comm: TorchComm, victim: int, place: str, error: type[Exception]
) -> list[Any]:
    star = helped_engine(comm)
    with attention_counts():
        owner, name, number = PLACES[place]
        undo = fail_in(owner, name, number, after=place in ("send", "request"), error=error)
        if comm.rank != victim:
            undo()
        try:
            with pytest.raises(error) as raised:
                star.encode(ids(CONTEXT, seed=7))
        finally:
            undo()
        message = str(raised.value)
        del raised
        left = left_over(star)
        return [message, left, *call_again(star)]


FAULTS = [
    (0, "send", ZeroDivisionError),
    (2, "keep", MemoryError),
    *(
        pytest.param(victim, place, error, marks=pytest.mark.slow)
        for victim, place, error in [
            (0, "send", MemoryError),
            (0, "hidden", ZeroDivisionError),
            (0, "own", ZeroDivisionError),
            (1, "request", ZeroDivisionError),
            (2, "request", MemoryError),
            (2, "keep", ZeroDivisionError),
        ]
    ),
]


@pytest.mark.parametrize(("victim", "place", "error"), FAULTS)
def test_an_exception_is_raised_on_all_and_later_calls_work(
    pool: Pool, victim: int, place: str, error: type[Exception]
) -> None:
    results = pool.run(fail_while_rank_0_helps, 3, victim=victim, place=place, error=error)
    for rank, (message, left, *_) in enumerate(results):
        if error is MemoryError:
            assert "out of memory in phase 1 for layers that rank 0 " in message
            assert ": set balance_ranks=False (--no-balance-ranks), or lower" in message
        else:
            assert "planted" in message
        assert (f"(on rank {victim}, in phase 1" in message) == (rank != victim)
        assert left == []
    check_later_calls([again for _, _, *again in results])


# ------------------------------------------------------------------ calls that the user ends


def cancel(star: StarLLM, error: type[BaseException]) -> list[Any]:
    """End an encode after rank 0's first forward: what it computed for others is on its way."""

    def stop(*_: Any) -> None:
        raise error

    with pytest.raises(error):
        star.encode(ids(CONTEXT, seed=7), progress=stop)
    return [left_over(star), call_again(star)]


def led(comm: TorchComm, session: Callable[..., Any], **arguments: Any) -> Any:
    with attention_counts():
        return follow_or_lead(helped_engine(comm), session, **arguments)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_calls_after_a_canceled_one_work(pool: Pool, error: type[BaseException]) -> None:
    """As Ctrl-C in a notebook cancels one; the other ranks follow."""
    (left, (_, *answer)), *held = pool.run(led, 3, session=cancel, error=error)
    assert left == []
    assert answer == call_again(helped_engine())[1:]
    assert held == [(0, 0)] * 2
