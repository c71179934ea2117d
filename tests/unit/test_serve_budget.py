"""What a store keeps, and how long: budgets, pins, expiry, and what it does after a fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from star_attention.errors import OutOfMemoryError
from star_attention.serve.refusals import RefusalError
from tests.stores import A, B, C, Clock, FakeEncoder, places, settle, store, use, wanted

# ------------------------------------------------------------------------------- budgets, lifetimes


def test_the_context_used_longest_ago_goes_first(tmp_path: Path) -> None:
    clock, encoder = Clock(), FakeEncoder()
    kept = store(encoder, clock=clock, folder=tmp_path / "store", device_tokens=16)
    for ids in (A, B, A):
        clock.now += 1
        use(kept, *ids)
    use(kept, *C)
    # A was asked for twice, B once, so B is cold now.
    assert places(kept) == {"device": 2, "cold": 1}
    assert use(kept, *A) == "hit"
    assert use(kept, *B) == "miss evicted"
    assert kept.counts()[0].again == 1
    kept.close()


def test_round_robin_over_too_many_documents_reads_them_from_disk(tmp_path: Path) -> None:
    """Forbids encoding documents again that evict one another in turn."""
    clock, encoder = Clock(), FakeEncoder()
    kept = store(encoder, clock=clock, folder=tmp_path / "store", device_tokens=16)
    for ids in (A, B, C):
        kept.create(wanted(*ids))
        settle(kept)
    for _ in range(3):
        for ids in (A, B, C):
            clock.now += 1
            assert use(kept, *ids) == "hit"
    assert len(encoder.encoded) == 3
    assert kept.counts()[0].reloads >= 6
    kept.close()


def test_what_is_in_use_or_pinned_never_goes() -> None:
    kept = store(device_tokens=24)
    pinned, _ = kept.create(wanted(*A), pin=True)
    used = kept.acquire(wanted(*B))
    settle(kept)
    use(kept, *C)
    waiting = kept.acquire(wanted(*C[:4], *A, *B[:3]))
    settle(kept)
    # 15 tokens wait for B's 8.
    assert not waiting.ready.done()
    assert kept.get("ann", pinned.id).location == "device"
    used.release()
    settle(kept)
    assert waiting.ready.done()
    assert kept.get("ann", pinned.id).location == "device"


def test_pins_have_a_limit_of_their_own() -> None:
    kept = store(device_tokens=40, pinned_tokens=10)
    first, _ = kept.create(wanted(*A), pin=True)
    with pytest.raises(RefusalError, match="takes 80 bytes, and 20 of 100 are left") as error:
        kept.create(wanted(*B), pin=True)
    assert error.value.code == "pin_budget"
    second, _ = kept.create(wanted(*B))
    with pytest.raises(RefusalError, match="unpin another one"):
        kept.update("ann", second.id, pin=True)
    assert kept.update("ann", first.id, pin=False).pinned is False
    assert kept.update("ann", second.id, pin=True).pinned is True
    assert len(kept.list("ann")) == 2


def test_a_context_that_can_never_fit_is_refused_at_once() -> None:
    encoder = FakeEncoder()
    kept = store(encoder, device_tokens=7)
    with pytest.raises(RefusalError, match="8 tokens takes 80 bytes, and this server has 70") as e:
        kept.acquire(wanted(*A))
    assert e.value.code == "context_too_large"
    assert encoder.jobs == []


def test_a_context_that_pins_left_no_room_for_is_refused_when_its_turn_comes() -> None:
    """Forbids waiting forever for memory that stays pinned."""
    encoder = FakeEncoder()
    encoder.tokens_a_poll = 1
    kept = store(encoder, device_tokens=20, pinned_tokens=15)
    first, _ = kept.create(wanted(*A))
    kept.step()
    large = kept.acquire(wanted(*range(15)))
    kept.update("ann", first.id, pin=True)
    settle(kept)
    with pytest.raises(RefusalError, match="unpin another one"):
        large.ready.result(0)


def test_an_unused_context_expires_and_a_hit_renews_it() -> None:
    clock = Clock()
    kept = store(clock=clock, ttl=100)
    view, _ = kept.create(wanted(*A))
    use(kept, *B)
    clock.now += 99
    assert use(kept, *A) == "hit"
    clock.now += 99
    assert kept.get("ann", view.id).status == "ready"
    clock.now += 1
    assert kept.get("ann", view.id).status == "expired"
    with pytest.raises(RefusalError, match="has expired, 100 seconds after its last use") as error:
        kept.lease("ann", view.id)
    assert (error.value.code, error.value.status) == ("context_expired", 404)


def test_expiry_is_seen_without_a_step() -> None:
    clock = Clock()
    kept = store(clock=clock, ttl=10)
    use(kept, *A)
    clock.now += 10
    lease = kept.acquire(wanted(*A))
    assert (lease.outcome, lease.reason) == ("miss", "expired")


@pytest.mark.parametrize(
    ("own", "asked", "ttl"), [(None, 10, None), (5, 10, 10), (20, 10, 20), (20, None, 20)]
)
def test_a_request_may_ask_for_a_longer_life(
    own: float | None, asked: float | None, ttl: float | None
) -> None:
    """Forbids a mark that shortens the life of what others keep."""
    kept = store(ttl=own)
    use(kept, *A, ttl=asked)
    use(kept, *B)
    use(kept, *B, ttl=asked)
    assert [view.ttl for view in kept.list("ann")] == [ttl, ttl]


def test_expired_contexts_are_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("star_attention.serve.contexts.registry.MOST_EXPIRED", 2)
    clock = Clock()
    kept = store(clock=clock, ttl=10)
    for ids in (A, B, C):
        kept.create(wanted(*ids))
        settle(kept)
        clock.now += 1
    clock.now += 10
    settle(kept)
    assert [view.status for view in kept.list("ann")] == ["expired"] * 2
    assert [view.created_at for view in kept.list("ann")] == [1002, 1001]


def test_a_context_in_use_does_not_expire() -> None:
    clock = Clock()
    kept = store(clock=clock, ttl=10)
    lease = kept.acquire(wanted(*A))
    settle(kept)
    clock.now += 1000
    settle(kept)
    assert places(kept) == {"device": 1}
    lease.release()
    clock.now += 9
    settle(kept)
    assert places(kept) == {"device": 1}
    clock.now += 1
    settle(kept)
    assert places(kept) == {}


# Tokens alone would let somebody keep millions of short ones, which every request looks through.
@pytest.mark.parametrize("limit", [{"cold_tokens": 8}, {"cold_contexts": 1}], ids=str)
def test_cold_contexts_are_forgotten_beyond_a_limit(limit: dict[str, int]) -> None:
    clock = Clock()
    kept = store(clock=clock, device_tokens=8, **limit)
    for ids in (A, B, C):
        clock.now += 1
        use(kept, *ids)
    settle(kept)
    assert places(kept) == {"device": 1, "cold": 1}
    assert use(kept, *B) == "miss evicted"
    assert use(kept, *A) == "miss new"


# ------------------------------------------------------------------------------------------ faults


def test_running_out_of_memory_evicts_and_tries_once_more() -> None:
    encoder = FakeEncoder()
    kept = store(encoder)
    use(kept, *A)
    used = kept.acquire(wanted(*B))
    settle(kept)
    encoder.failures = [OutOfMemoryError("8 GiB are too little")]
    assert use(kept, *C) == "miss new"
    assert places(kept) == {"device": 2, "cold": 1}
    assert used.ready.result(0).ids.tolist() == B


def test_running_out_of_memory_twice_fails_that_context_alone() -> None:
    encoder = FakeEncoder()
    kept = store(encoder)
    encoder.failures = [OutOfMemoryError("too little")] * 2
    lease, next_one = kept.acquire(wanted(*A)), kept.acquire(wanted(*B))
    settle(kept)
    with pytest.raises(OutOfMemoryError):
        lease.ready.result(0)
    assert next_one.ready.result(0).ids.tolist() == B
    lease.release()
    settle(kept)
    assert kept.counts()[0].encodes == {"failed": 1, "done": 1}
    assert use(kept, *A) == "miss new"


def test_a_failed_context_of_a_client_says_why_and_can_be_made_again() -> None:
    encoder = FakeEncoder()
    kept = store(encoder)
    encoder.failures = [ValueError("no")]
    view, _ = kept.create(wanted(*A))
    settle(kept)
    failed = kept.get("ann", view.id)
    assert (failed.status, failed.error) == ("failed", "no")
    with pytest.raises(RefusalError, match="could not be encoded: no; delete it") as error:
        kept.lease("ann", view.id)
    assert error.value.code == "context_failed"
    again, is_new = kept.create(wanted(*A))
    assert (again.id, is_new) == (view.id, False)
    settle(kept)
    assert kept.get("ann", view.id).status == "ready"


def test_make_room_drops_what_nobody_uses() -> None:
    kept = store()
    use(kept, *A)
    lease = kept.acquire(wanted(*B))
    settle(kept)
    assert kept.make_room() is True
    assert places(kept) == {"device": 1, "cold": 1}
    assert kept.make_room() is False
    lease.release()


def test_closing_refuses_who_waits() -> None:
    kept = store()
    lease = kept.acquire(wanted(*A))
    kept.close()
    with pytest.raises(RefusalError, match="this server is ending") as error:
        lease.ready.result(0)
    assert error.value.status == 503
