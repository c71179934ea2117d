"""Laws of the store, whatever requests do, in any order: budgets, holds, single flight, crashes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from star_attention.errors import OutOfMemoryError
from star_attention.serve.contexts.lease import Lease
from star_attention.serve.refusals import RefusalError
from tests.stores import BLOCK, BYTES, Clock, FakeEncoder, kill, settle, store, wanted

DEVICE, PINNED, HOST, DISK = 20, 9, 15, 30
# Some share a beginning, and so blocks.
DOCUMENTS = [
    list(range(5)),
    list(range(8)),
    [*range(8), 90, 91],
    [*range(8), 90, 91, 92, 93],
    list(range(50, 58)),
    list(range(60, 61)),
    list(range(30, 30 + DEVICE)),
]
# Files are synced one by one, which takes its time on a disk.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
TENANTS = st.sampled_from(["ann", "bob"])
DOCUMENT = st.sampled_from(DOCUMENTS)


@contextmanager
def refused(*codes: str) -> Iterator[list[RefusalError]]:
    """Yield a list that gets the refusal, which must be of one of these codes."""
    refusals: list[RefusalError] = []
    try:
        yield refusals
    except RefusalError as refusal:
        refusals.append(refusal)
        if refusal.code not in codes:
            raise


class StoreLaws(RuleBasedStateMachine):
    """Requests, clients, time, faults and sudden ends."""

    leases = Bundle("leases")
    names = Bundle("names")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY)
        self.clock, self.encoder = Clock(), FakeEncoder()
        self.encoder.tokens_a_poll = 3
        self.held: dict[Lease, list[int]] = {}
        self.known: dict[str, tuple[str, list[int]]] = {}
        self.host_tokens = 0
        self.open()

    @initialize(tokens=st.sampled_from([0, HOST]))
    def begin(self, tokens: int) -> None:
        """Let half of the runs have host memory between device and disk."""
        self.kept.close()
        self.host_tokens = tokens
        self.open()

    def open(self) -> None:
        self.kept = store(
            self.encoder,
            clock=self.clock,
            folder=Path(self.folder.name),
            device_tokens=DEVICE,
            pinned_tokens=PINNED,
            host_tokens=self.host_tokens,
            disk_tokens=DISK,
            ttl=100,
            linger_s=10,
            cold_tokens=40,
        )

    def teardown(self) -> None:
        for lease in self.held:
            lease.release()
        settle(self.kept)
        self.kept.close()
        self.folder.cleanup()

    # ------------------------------------------------------------------------------ what happens

    @rule(target=leases, tenant=TENANTS, ids=DOCUMENT, keep=st.booleans())
    def ask(self, tenant: str, ids: list[int], keep: bool) -> Any:
        with refused("context_too_large") as refusal:
            lease = self.kept.acquire(wanted(*ids, tenant=tenant, keep=keep))
        if refusal:
            return None
        self.held[lease] = ids
        return lease

    @rule(target=names, tenant=TENANTS, ids=DOCUMENT, pin=st.booleans())
    def create(self, tenant: str, ids: list[int], pin: bool) -> Any:
        with refused("context_too_large", "pin_budget") as refusal:
            view, _ = self.kept.create(wanted(*ids, tenant=tenant), pin=pin)
        if refusal:
            return None
        self.known[view.id] = (tenant, ids)
        return view.id

    @rule(target=leases, name=names)
    def ask_by_name(self, name: str | None) -> Any:
        if name is None:
            return None
        tenant, ids = self.known[name]
        with pytest.raises(RefusalError, match="there is no context"):
            self.kept.lease("bob" if tenant == "ann" else "ann", name)
        codes = ("context_not_found", "context_expired", "context_failed", "context_too_large")
        with refused(*codes) as refusal:
            lease = self.kept.lease(tenant, name)
        if refusal:
            return None
        self.held[lease] = ids
        return lease

    @rule(name=names, pin=st.booleans())
    def change(self, name: str | None, pin: bool) -> None:
        if name is not None:
            codes = ("context_not_found", "context_expired", "context_too_large", "pin_budget")
            with refused(*codes):
                self.kept.update(self.known[name][0], name, pin=pin, ttl=50)

    @rule(name=consumes(names))
    def delete(self, name: str | None) -> None:
        if name is not None:
            tenant, _ = self.known[name]
            with refused("context_not_found"):
                self.kept.delete(tenant, name)
            assert name not in [view.id for view in self.kept.list(tenant)]

    @rule(lease=consumes(leases))
    def leave(self, lease: Lease | None) -> None:
        if lease is not None:
            self.held.pop(lease, None)
            lease.release()

    @rule(steps=st.integers(1, 6))
    def work(self, steps: int) -> None:
        for _ in range(steps):
            self.kept.step()

    @rule(seconds=st.sampled_from([1, 11, 60, 101]))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule(error=st.sampled_from([OutOfMemoryError("too little"), ValueError("no")]))
    def fail_next(self, error: Exception) -> None:
        self.encoder.failures.append(error)

    @rule()
    def run_out_of_memory(self) -> None:
        self.kept.make_room()

    @rule(orderly=st.booleans())
    def restart(self, orderly: bool) -> None:
        self.held.clear()
        before = {id: self.kept_view(id) for id in self.known}
        if orderly:
            self.kept.close()
        else:
            # Killed: only the lock goes.
            kill(Path(self.folder.name))
        self.open()
        for id, (tenant, ids) in self.known.items():
            after = self.kept_view(id)
            if after is not None and after.status != "expired":
                assert before[id] is not None
                assert self.kept.content(tenant, id).ids.tolist() == ids

    def kept_view(self, id: str) -> Any:
        try:
            return self.kept.get(self.known[id][0], id)
        except RefusalError:
            return None

    @precondition(lambda self: self.held)
    @rule()
    def everybody_is_answered(self) -> None:
        """Every hold gets its context or an error once others let go of the memory."""
        self.encoder.failures.clear()
        for lease in list(self.held):
            settle(self.kept)
            if not lease.ready.done():
                # Its turn comes after that of those before it.
                for other in list(self.held):
                    if other is not lease and other.ready.done():
                        other.release()
                        del self.held[other]
                settle(self.kept)
        for lease in self.held:
            assert lease.ready.done() or len(self.held) > 1

    # ------------------------------------------------------------------------------ what is true

    @invariant()
    def holds_are_answered_with_their_own_tokens(self) -> None:
        for lease, ids in self.held.items():
            if lease.ready.done() and lease.ready.exception() is None:
                assert lease.ready.result().ids.tolist() == ids
                view = lease.view()
                # In use: neither dropped nor evicted, whatever else happens.
                assert (view.status, view.location) == ("ready", "device")

    @invariant()
    def budgets_hold(self) -> None:
        _, places, _ = self.kept.counts()
        encoding = [job for job in self.encoder.jobs[-1:] if not job.canceled]
        assert places["device"][1] <= BYTES * DEVICE
        assert places["host"][1] <= BYTES * self.host_tokens
        assert len(encoding) <= 1
        views = [view for tenant in ("ann", "bob") for view in self.kept.list(tenant)]
        pinned = [view for view in views if view.pinned]
        assert sum(BYTES * view.total for view in pinned) <= BYTES * PINNED
        files = Path(self.folder.name).glob("*/*.star")
        assert sum(path.stat().st_size for path in files) <= DISK * 4

    @invariant()
    def a_document_has_one_context_for_each_tenant(self) -> None:
        for tenant in ("ann", "bob"):
            living = [v for v in self.kept.list(tenant) if v.status != "expired"]
            contents = [tuple(self.kept.content(tenant, view.id).ids) for view in living]
            assert len(contents) == len(set(contents))


TestStoreLaws = StoreLaws.TestCase
TestStoreLaws.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)


def test_only_one_encode_runs_at_a_time_for_a_document() -> None:
    encoder = FakeEncoder()
    encoder.tokens_a_poll = 1
    kept = store(encoder)
    leases = [kept.acquire(wanted(*range(BLOCK))) for _ in range(50)]
    settle(kept)
    assert len({id(lease.ready.result(0)) for lease in leases}) == 1
    assert len(encoder.jobs) == 1
