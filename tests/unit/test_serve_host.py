"""Host memory between device and disk: what goes there comes back without being encoded or read."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention.errors import InvalidInputError, OutOfMemoryError
from star_attention.serve.contexts.encoder import BatchEncoder
from star_attention.storage.context import EncodedContext
from tests.engines import CONTEXT, QUERY, engine, ids
from tests.stores import A, B, C, Clock, FakeEncoder, places, settle, store, use, wanted

SIZES: dict[str, Any] = dict(block_size=16, anchor_size=5)
ANSWER: dict[str, Any] = dict(max_new_tokens=6, ignore_eos=True, return_logits=True)


def two_rooms(**settings: Any) -> tuple[Any, FakeEncoder, Clock]:
    """A store whose device holds one context."""
    encoder, clock = FakeEncoder(), Clock()
    return store(encoder, clock=clock, device_tokens=10, **settings), encoder, clock


def use_all(kept: Any, clock: Clock, *documents: list[int]) -> list[str]:
    found = []
    for document in documents:
        clock.now += 1
        found.append(use(kept, *document))
    return found


def test_what_leaves_the_device_comes_back_from_host_memory() -> None:
    kept, encoder, clock = two_rooms(host_tokens=20)
    assert use_all(kept, clock, A, B, A) == ["miss new", "miss new", "hit"]
    assert len(encoder.encoded) == 2
    assert places(kept) == {"device": 1, "host": 1}
    counts = kept.counts()[0]
    assert (counts.returns, counts.evicted["host"]) == (1, 2)
    # Its copy is still there: it leaves again at once.
    use_all(kept, clock, B, A)
    assert len(encoder.encoded) == 2


def test_the_one_used_longest_ago_leaves_host_memory_first() -> None:
    kept, _, clock = two_rooms(host_tokens=16)
    documents = [[start + token for token in range(8)] for start in (100, 200, 300, 400)]
    use_all(kept, clock, *documents)
    assert places(kept) == {"device": 1, "host": 2, "cold": 1}
    assert use_all(kept, clock, documents[2], documents[0]) == ["hit", "miss evicted"]


@pytest.mark.parametrize("asked", [1, 2])
def test_it_goes_to_disk_from_there(tmp_path: Path, asked: int) -> None:
    kept, encoder, clock = two_rooms(host_tokens=8, folder=tmp_path)
    use_all(kept, clock, *[A] * asked, B, C)
    assert places(kept) == {"device": 1, "host": 1, "disk" if asked == 2 else "cold": 1}
    kept.close()
    kept = store(encoder, clock=clock, folder=tmp_path)
    assert use(kept, *A) == ("hit" if asked == 2 else "miss new")


def test_it_is_used_while_it_is_on_its_way() -> None:
    """Forbids that a context is missing, or encoded twice, between the two places."""
    kept, _, clock = two_rooms(host_tokens=20)
    use_all(kept, clock, A)
    waiting = kept.acquire(wanted(*B))
    assert kept.step()
    assert places(kept) == {"device": 1}
    with kept.acquire(wanted(*A)) as lease:
        assert lease.outcome == "hit"
        settle(kept)
        assert lease.ready.result(0).ids.tolist() == A
        assert lease.view().location == "device"
        assert not waiting.ready.done()
    settle(kept)
    assert waiting.ready.done()
    assert places(kept) == {"device": 1, "host": 1}
    waiting.release()


def test_one_that_is_deleted_on_its_way_is_gone() -> None:
    kept, _, clock = two_rooms(host_tokens=20)
    view, _ = kept.create(wanted(*A))
    settle(kept)
    clock.now += 1
    waiting = kept.acquire(wanted(*B))
    kept.step()
    kept.delete("ann", view.id)
    settle(kept)
    assert waiting.ready.done()
    assert places(kept) == {"device": 1}
    assert len(kept.list("ann")) == 1


def test_without_memory_for_it_it_goes_where_it_went_before(tmp_path: Path) -> None:
    kept, encoder, clock = two_rooms(host_tokens=20, folder=tmp_path)
    use_all(kept, clock, A, A)
    encoder.failures.append(OutOfMemoryError("too little host memory"))
    assert use_all(kept, clock, B) == ["miss new"]
    assert places(kept) == {"device": 1, "disk": 1}


def test_memory_that_runs_out_sends_all_of_it_there() -> None:
    kept, _, clock = two_rooms(host_tokens=20)
    use_all(kept, clock, A)
    assert kept.make_room()
    assert places(kept) == {"host": 1}
    assert use_all(kept, clock, A) == ["hit"]


# -------------------------------------------------------------------------------- real contexts


@pytest.mark.parametrize(
    ("name", "settings"),
    [("llama", {}), ("llama", {"kv_dtype": "fp8"}), ("deepseek_v3", {}), ("gemma3n", {})],
)
def test_a_context_that_was_away_answers_alike(
    tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    star = engine(name, **SIZES, **settings)
    encoder = BatchEncoder(star, star.batch)
    context = star.encode(ids(CONTEXT))
    right = star.generate(context, ids(QUERY), **ANSWER)
    parking = encoder.park(context)
    steps = 0
    while not parking.done:
        parking.advance()
        steps += 1
    # A layer at a time, so that others decode between them.
    assert steps == len(context.kv.layers)
    parked = parking.result()
    assert parked.nbytes == context.nbytes == encoder.host_bytes(context)
    parking.cancel()
    before = [weakref.ref(layer) for layer in context.kv.layers]
    del context
    gc.collect()
    assert all(layer() is None for layer in before)
    coming = encoder.bring_back(parked)
    steps = 0
    while not coming.done:
        coming.advance()
        steps += 1
    back = coming.result()
    check(star.generate(back, ids(QUERY), **ANSWER), right)
    assert steps == sum(not layer.is_empty for layer in back.kv.layers)
    # Both are of their own memory, and the copy can be saved from where it is.
    parked.on_host().save(tmp_path / "saved.star")
    check(star.generate(star.load_context(tmp_path / "saved.star"), ids(QUERY), **ANSWER), right)
    assert pointers(back).isdisjoint(pointers(parked.on_host()))


def check(reply: Any, right: Any) -> None:
    assert reply.token_ids == right.token_ids
    assert torch.equal(reply.logits, right.logits)


def pointers(context: EncodedContext) -> set[int]:
    layers = [layer for layer in context.kv.layers if not layer.is_empty]
    return {tensor.data_ptr() for layer in layers for tensor in layer.stored()}


def test_a_server_on_a_cpu_has_no_such_memory() -> None:
    pytest.importorskip("starlette")
    from tests.servers import running

    with running(max_host_bytes=0) as server:
        assert server.metric("contexts", location="host") == 0
    message = "max_host_bytes 1,024 does not work here"
    with pytest.raises(InvalidInputError, match=message), running(max_host_bytes=1024):
        pass
