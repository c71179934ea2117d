"""The store of a server: who finds what, what is encoded, what has to go, what is refused."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from star_attention.serve.contexts.entry import Content, Entry, Wanted
from star_attention.serve.contexts.keys import KeyMaker, Scope, as_ids
from star_attention.serve.contexts.store import ContextStore
from star_attention.serve.contexts.table import StoreSettings
from star_attention.serve.refusals import RefusalError
from tests.stores import (
    BLOCK,
    BYTES,
    A,
    B,
    C,
    Clock,
    FakeEncoder,
    places,
    settle,
    store,
    use,
    wanted,
)

# ----------------------------------------------------------------------------------- found or not


def test_equal_contexts_are_encoded_once() -> None:
    encoder = FakeEncoder()
    kept = store(encoder)
    assert use(kept, *A) == "miss new"
    assert [use(kept, *A) for _ in range(5)] == ["hit"] * 5
    assert encoder.encoded == [tuple(A)]


def test_those_who_ask_meanwhile_join() -> None:
    encoder = FakeEncoder()
    encoder.tokens_a_poll = 1
    kept = store(encoder)
    first, second = kept.acquire(wanted(*A)), kept.acquire(wanted(*A))
    kept.step()
    third = kept.acquire(wanted(*A))
    assert [lease.outcome for lease in (first, second, third)] == ["miss", "joined", "joined"]
    assert first.id == second.id == third.id
    settle(kept)
    assert first.ready.result(0) is second.ready.result(0) is third.ready.result(0)
    assert len(encoder.jobs) == 1


def test_tenants_and_salts_never_meet() -> None:
    encoder = FakeEncoder()
    kept = store(encoder)
    view, _ = kept.create(wanted(*A), name="mine")
    settle(kept)
    assert use(kept, *A, tenant="bob") == "miss new"
    assert use(kept, *A, salt="x") == "miss new"
    assert use(kept, *A, 1, tenant="bob") == "miss input_changed"
    assert encoder.encoded == [tuple(A)] * 3 + [(*A, 1)]
    # No block of another tenant's is copied.
    assert [job.reuse is not None for job in encoder.jobs] == [False, False, False, True]
    for call in (kept.get, kept.lease, kept.delete, kept.update, kept.content):
        with pytest.raises(RefusalError, match="there is no context") as error:
            call("bob", view.id)
        assert (error.value.code, error.value.status) == ("context_not_found", 404)
    assert view.id not in [other.id for other in kept.list("bob")]
    whole = Content(ids=as_ids([*A, 5]))
    assert kept.prefix_of(Scope(tenant="cat"), whole) is None
    assert kept.prefix_of(Scope(tenant="ann"), whole) is not None


def test_equal_keys_do_not_make_contexts_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids answering from another document whose key collides."""
    monkeypatch.setattr(KeyMaker, "key", lambda *_: b"the same")
    encoder = FakeEncoder()
    kept = store(encoder)
    assert use(kept, *A) == "miss new"
    assert use(kept, *B) == "miss new"
    assert use(kept, *A, tenant="bob") == "miss new"
    assert use(kept, *A) == "hit"
    assert encoder.encoded == [tuple(A), tuple(B), tuple(A)]


def test_the_longest_context_that_a_prompt_begins_with() -> None:
    kept = store()
    for ids in (A[:4], A, B):
        use(kept, *ids)
    scope = Scope(tenant="ann")
    assert kept.prefix_of(scope, Content(ids=as_ids([*A, 1]))).ids.tolist() == A
    assert kept.prefix_of(scope, Content(ids=as_ids(A))).ids.tolist() == A[:4]
    assert kept.prefix_of(scope, Content(ids=as_ids(A[:4]))) is None


@pytest.mark.parametrize(
    ("literal", "is_found"), [((), False), (((2, 5),), True), (((2, 7),), True), (((3, 5),), False)]
)
def test_texts_begin_alike_where_the_same_of_them_is_users(
    literal: tuple[tuple[int, int], ...], is_found: bool
) -> None:
    """Forbids a control token of a template standing for one that a user spelled."""
    kept = store()
    scope = Scope(tenant="ann")
    content = Content(ids=as_ids(A), text="to <s>", literal=((2, 5),))
    request = wanted(*A)
    with kept.acquire(type(request)(scope=scope, content=content)):
        settle(kept)
    whole = Content(ids=as_ids([]), text="to <s> be", literal=literal)
    if literal == ((2, 7),):
        whole = Content(ids=as_ids([]), text="to <s> be", literal=((2, 5), (6, 7)))
    assert (kept.prefix_of(scope, whole) is not None) == is_found


def test_of_many_contexts_few_are_looked_at_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids that a short chat takes the longer the more is kept: 27 ms beside 10,000."""
    kept, scope = store(device_tokens=1000), Scope(tenant="ann")
    for number in range(50):
        content = Content(ids=as_ids([number, *A]), text=f"{number}: the sky is blue")
        with kept.acquire(Wanted(scope=Scope(tenant="ann"), content=content)):
            settle(kept)
    looked: list[str] = []
    location = Entry.location.fget
    assert location is not None

    def counted(entry: Entry) -> Any:
        looked.append(entry.id)
        return location(entry)

    monkeypatch.setattr(Entry, "location", property(counted))
    text = Content(ids=as_ids([]), text="7: the sky is blue, and wide")
    found = kept.prefix_of(scope, text)
    assert found is not None
    assert found.text == "7: the sky is blue"
    assert kept.of_text(scope, text) is None
    assert kept.shared_text(scope, text) == 0
    assert len(looked) == 1


def test_why_a_document_is_encoded_again() -> None:
    """A date at the top defeats every cache, which nobody sees without being told."""
    kept = store(device_tokens=1000)
    document = list(range(80))
    assert use(kept, 900, *document) == "miss new"
    assert use(kept, 901, *document) == "miss beginning_changed"
    assert use(kept, 901, *document, 7) == "miss input_changed"
    assert use(kept, 902, *document, tenant="bob") == "miss new"
    assert use(kept, *A) == "miss new"


@pytest.mark.parametrize(
    ("scope", "fields", "is_known"),
    [
        (Scope(tenant="ann"), {}, True),
        (Scope(tenant="bob"), {}, False),
        (Scope(tenant="ann", salt="x"), {}, False),
        (Scope(tenant="ann"), {"literal": ()}, False),
        (Scope(tenant="ann"), {"text": "a <s> "}, False),
        (Scope(tenant="ann"), {"raw": True}, False),
    ],
)
def test_a_text_is_known_by_all_of_it(scope: Scope, fields: dict[str, Any], is_known: bool) -> None:
    kept, text = store(), {"text": "a <s> b", "literal": ((2, 5),)}
    content = Content(ids=as_ids(A), **text)
    with kept.acquire(Wanted(scope=Scope(tenant="ann"), content=content)):
        settle(kept)
    found = kept.of_text(scope, Content(ids=as_ids([]), **(text | fields)))
    assert (found is content) == is_known
    longer = text | {"text": "a <s> b, c"} | ({} if "text" in fields else fields)
    begun = kept.prefix_of(scope, Content(ids=as_ids([]), **longer))
    assert (begun is content) == (is_known or "text" in fields)


def test_a_new_version_reuses_blocks_of_the_nearest_one() -> None:
    encoder = FakeEncoder()
    kept = store(encoder, device_tokens=1000)
    base = list(range(4 * BLOCK))
    use(kept, *base)
    use(kept, *base[: 2 * BLOCK], 90, 91, 92, 93)
    changed = [*base[: 3 * BLOCK], 80]
    assert use(kept, *changed) == "miss input_changed"
    assert encoder.jobs[-1].reuse.ids.tolist() == base
    # Another beginning, which all blocks see: nothing can be copied.
    assert use(kept, 99, *base[1:]) == "miss new"
    assert encoder.jobs[-1].reuse is None


# ------------------------------------------------------------------------- who leaves, who lingers


def test_an_encode_lingers_for_a_client_that_comes_back() -> None:
    """Forbids throwing an encode away as soon as a client's deadline has passed."""
    clock, encoder = Clock(), FakeEncoder()
    encoder.tokens_a_poll = 1
    kept = store(encoder, clock=clock, linger_s=30)
    lease = kept.acquire(wanted(*A))
    kept.step(), kept.step()
    lease.release()
    clock.now += 29
    kept.step()
    again = kept.acquire(wanted(*A))
    assert again.outcome == "joined"
    clock.now += 60
    settle(kept)
    assert again.ready.result(0) is not None
    assert len(encoder.jobs) == 1


@pytest.mark.parametrize(
    ("polls", "others", "is_canceled"), [(2, 0, True), (6, 0, False), (6, 1, True)]
)
def test_an_encode_that_nobody_waits_for(polls: int, others: int, is_canceled: bool) -> None:
    """It ends after a while, unless it is more than half done and nothing else waits."""
    clock, encoder = Clock(), FakeEncoder()
    encoder.tokens_a_poll = 1
    kept = store(encoder, clock=clock, linger_s=30)
    lease = kept.acquire(wanted(*A))
    for _ in range(polls):
        kept.step()
    lease.release()
    for _ in range(others):
        kept.acquire(wanted(*B))
    clock.now += 30
    settle(kept)
    assert encoder.jobs[0].canceled == is_canceled
    assert (tuple(A) in encoder.encoded) != is_canceled
    assert kept.counts()[0].encodes["canceled"] == is_canceled


def test_a_request_that_left_the_queue_is_not_encoded() -> None:
    clock, encoder = Clock(), FakeEncoder()
    encoder.tokens_a_poll = 1
    kept = store(encoder, clock=clock, linger_s=5)
    kept.acquire(wanted(*A))
    kept.step()
    kept.acquire(wanted(*B)).release()
    clock.now += 5
    settle(kept)
    assert encoder.encoded == [tuple(A)]
    assert lost(kept, *B)


def lost(kept: Any, *ids: int) -> bool:
    return kept.prefix_of(Scope(tenant="ann"), Content(ids=as_ids([*ids, 1]))) is None


def test_a_context_of_one_request_is_dropped_after_it() -> None:
    kept = store()
    assert use(kept, *A, keep=False) == "miss new"
    settle(kept)
    assert places(kept) == {}
    with kept.acquire(wanted(*A, keep=False)):
        settle(kept)
        assert kept.list("ann") == []
        # Somebody wants to keep it.
        assert use(kept, *A) == "hit"
    settle(kept)
    assert places(kept) == {"device": 1}


def test_delete_cancels_an_encode_and_refuses_who_waits() -> None:
    encoder = FakeEncoder()
    encoder.tokens_a_poll = 1
    kept = store(encoder)
    view, is_new = kept.create(wanted(*A))
    lease = kept.lease("ann", view.id)
    kept.step()
    assert is_new
    assert kept.get("ann", view.id).status == "encoding"
    kept.delete("ann", view.id)
    with pytest.raises(RefusalError, match="was deleted") as error:
        lease.ready.result(0)
    assert error.value.status == 409
    settle(kept)
    assert encoder.jobs[0].canceled
    assert kept.list("ann") == []
    assert use(kept, *A) == "miss new"


def test_a_deleted_context_stays_for_those_who_use_it() -> None:
    kept = store()
    view, _ = kept.create(wanted(*A))
    settle(kept)
    lease = kept.lease("ann", view.id)
    kept.delete("ann", view.id)
    settle(kept)
    assert lease.ready.result(0).ids.tolist() == A
    assert places(kept) == {"device": 1}
    lease.release()
    settle(kept)
    assert places(kept) == {}


@pytest.mark.parametrize("has_folder", [False, True])
def test_nothing_of_a_deleted_context_is_held(tmp_path: Path, *, has_folder: bool) -> None:
    """Forbids a server that remembers the texts of all contexts that clients ever made."""
    kept = store(folder=tmp_path if has_folder else None)
    asked = wanted(*A)
    gone = weakref.ref(asked.content)
    view, _ = kept.create(asked)
    del asked
    settle(kept)
    kept.update("ann", view.id, name="a book")
    kept.delete("ann", view.id)
    settle(kept)
    gc.collect()
    assert gone() is None


# --------------------------------------------------------------------------------------- what shows


def test_what_a_client_sees() -> None:
    encoder, clock = FakeEncoder(), Clock()
    encoder.tokens_a_poll = 3
    kept = store(encoder, clock=clock)
    view, is_new = kept.create(wanted(*A, ttl=60), name="report")
    assert is_new
    assert view.as_dict() == {
        "id": view.id,
        "object": "context",
        "status": "queued",
        "location": None,
        "progress": {"done": 0, "total": 8},
        "tokens": 8,
        "bytes": None,
        "created_at": 1000,
        "last_used_at": 1000,
        "expires_at": 1060,
        "ttl": 60,
        "pinned": False,
        "name": "report",
        "hits": 0,
        "error": None,
    }
    kept.step(), kept.step()
    assert kept.get("ann", view.id).as_dict()["progress"] == {"done": 3, "total": 8}
    settle(kept)
    same, is_new = kept.create(wanted(*A))
    assert (same.id, is_new, same.name) == (view.id, False, "report")
    ready = kept.update("ann", view.id, ttl=None, name=None).as_dict()
    assert (ready["status"], ready["location"], ready["bytes"]) == ("ready", "device", 8 * BYTES)
    assert (ready["ttl"], ready["expires_at"], ready["name"]) == (None, None, None)
    with pytest.raises(RefusalError, match="give at most 200 characters"):
        kept.update("ann", view.id, name="x" * 201)


def test_changes_are_reported_without_the_lock() -> None:
    """Forbids a callback that waits for a thread which waits for the store."""
    seen: list[str] = []
    encoder = FakeEncoder()
    encoder.tokens_a_poll = 4

    def changed(id: str) -> None:
        with ThreadPoolExecutor(1) as other:
            seen.append(other.submit(kept.get, "ann", id).result(timeout=10).status)

    kept = ContextStore(encoder, StoreSettings(device_bytes=1000), changed=changed, clock=Clock())
    kept.create(wanted(*A))
    settle(kept)
    assert list(dict.fromkeys(seen)) == ["queued", "encoding", "ready"]


def test_lists_are_of_what_is_kept_the_newest_first() -> None:
    clock = Clock()
    kept = store(clock=clock)
    ids = []
    for tokens in (A, B):
        clock.now += 1
        ids.append(kept.create(wanted(*tokens))[0].id)
    kept.acquire(wanted(*C, keep=False))
    assert [view.id for view in kept.list("ann")] == ids[::-1]
