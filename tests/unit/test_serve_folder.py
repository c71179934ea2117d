"""A store's folder: contexts come back after a restart, a kill and damage, or are cleanly gone."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from star_attention.errors import InvalidInputError
from star_attention.serve.contexts.entry import Content, Wanted
from star_attention.serve.contexts.folder import StoreFolder
from star_attention.serve.contexts.keys import Scope, as_ids
from star_attention.serve.refusals import RefusalError
from tests.stores import (
    IDENTITY,
    A,
    B,
    C,
    Clock,
    FakeContext,
    FakeEncoder,
    kill,
    settle,
    store,
    wanted,
)


def filled(folder: Path, *contexts: list[int], **settings: Any) -> list[str]:
    """Fill a store with contexts, and end it; return their ids."""
    kept = store(folder=folder, **settings)
    ids = [kept.create(wanted(*tokens), name=f"{tokens[0]}")[0].id for tokens in contexts]
    settle(kept)
    kept.close()
    return ids


def own(folder: Path) -> Path:
    return folder / IDENTITY.hex()[:16]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in own(folder).iterdir())


def ask(kept: Any, id: str) -> tuple[str, list[int]]:
    with kept.lease("ann", id) as lease:
        settle(kept)
        return lease.outcome, lease.ready.result(0).ids.tolist()


def test_contexts_come_back_after_a_restart(tmp_path: Path) -> None:
    (id,) = filled(tmp_path, A)
    encoder, clock = FakeEncoder(), Clock()
    clock.now += 500
    kept = store(encoder, folder=tmp_path, clock=clock)
    view = kept.get("ann", id)
    assert (view.name, view.status, view.location, view.created_at) == (
        "100",
        "ready",
        "disk",
        1000,
    )
    assert ask(kept, id) == ("hit", A)
    assert kept.acquire(wanted(*A)).outcome == "hit"
    assert encoder.encoded == []
    kept.close()


def test_a_folder_of_several_ranks_is_kept_and_removed_as_a_file_is(tmp_path: Path) -> None:
    (id,) = filled(tmp_path, A)
    keys = own(tmp_path) / f"{id}.star"
    keys.unlink()
    keys.mkdir()
    (keys / "rank-0").touch()
    kept = store(folder=tmp_path)
    assert kept.get("ann", id).location == "disk"
    kept.delete("ann", id)
    kept.close()
    assert names(tmp_path) == []


def test_what_was_noted_of_a_context_comes_back(tmp_path: Path) -> None:
    (id,) = filled(tmp_path, A)
    kept = store(folder=tmp_path)
    ask(kept, id)
    kept.update("ann", id, ttl=50, pin=True, name="mine")
    settle(kept)
    # Ended by force: what a client changed is there already.
    kill(tmp_path)
    kept = store(folder=tmp_path)
    view = kept.get("ann", id)
    assert (view.ttl, view.pinned, view.name, view.hits) == (50, True, "mine", 1)
    kept.close()


def test_everything_that_makes_a_context_comes_back(tmp_path: Path) -> None:
    content = Content(
        ids=as_ids(A),
        text="to <s> be",
        literal=((3, 6),),
        end={"text": "be", "literal": [], "encoded": 1, "ids": [4], "held_ids": [5]},
        messages=[{"role": "user", "content": "to <s> be"}],
        template_kwargs={"tools": [{"name": "f"}]},
    )
    kept = store(folder=tmp_path)
    view, _ = kept.create(Wanted(scope=Scope(tenant="ann", salt="é"), content=content))
    settle(kept)
    kept.close()
    kept = store(folder=tmp_path)
    again = kept.content("ann", view.id)
    assert again.ids.tolist() == A
    fields = ("text", "literal", "end", "messages", "template_kwargs")
    assert [getattr(again, name) for name in fields] == [getattr(content, name) for name in fields]
    assert kept.acquire(Wanted(scope=Scope(tenant="ann", salt="é"), content=content)).id == view.id
    assert kept.acquire(Wanted(scope=Scope(tenant="ann"), content=content)).id != view.id
    kept.close()


def test_contexts_are_written_before_they_have_to_leave(tmp_path: Path) -> None:
    """Forbids losing them when the server is killed."""
    kept = store(folder=tmp_path)
    view, _ = kept.create(wanted(*A))
    settle(kept)
    # A request alone is not worth a file; a second one is.
    for _ in range(2):
        with kept.acquire(wanted(*B)):
            settle(kept)
        with kept.acquire(wanted(*C, ttl=9)):
            settle(kept)
    kill(tmp_path)
    kept = store(folder=tmp_path)
    assert {view.total for view in kept.list("ann")} == {8}
    assert len(kept.list("ann")) == 3
    assert ask(kept, view.id) == ("hit", A)
    kept.close()


def test_one_off_contexts_never_touch_the_disk(tmp_path: Path) -> None:
    kept = store(folder=tmp_path, device_tokens=8)
    for ids in (A, B):
        with kept.acquire(wanted(*ids)):
            settle(kept)
    with kept.acquire(wanted(*C, keep=False)):
        settle(kept)
    kept.close()
    assert names(tmp_path) == []


def test_deleted_and_expired_contexts_leave_no_file(tmp_path: Path) -> None:
    clock = Clock()
    kept = store(folder=tmp_path, clock=clock)
    first, _ = kept.create(wanted(*A))
    kept.create(wanted(*B, ttl=10))
    settle(kept)
    assert len(names(tmp_path)) == 6
    kept.delete("ann", first.id)
    assert len(names(tmp_path)) == 3
    clock.now += 10
    settle(kept)
    assert names(tmp_path) == []
    kept.close()


def test_a_context_on_disk_may_be_deleted_while_it_is_used(tmp_path: Path) -> None:
    (id,) = filled(tmp_path, A)
    kept = store(folder=tmp_path)
    with kept.lease("ann", id) as lease:
        settle(kept)
        kept.delete("ann", id)
        settle(kept)
        assert lease.ready.result(0).ids.tolist() == A
    settle(kept)
    assert names(tmp_path) == []
    kept.close()


def test_a_context_deleted_while_it_is_written_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = FakeContext.save

    def slow_save(self: FakeContext, path: Path) -> None:
        save(self, path)
        kept.delete("ann", view.id)
        written.append(path)

    written: list[Path] = []
    monkeypatch.setattr(FakeContext, "save", slow_save)
    kept = store(folder=tmp_path)
    view, _ = kept.create(wanted(*A))
    while not written:
        kept.step()
    # Killed before anything was cleared away.
    kill(tmp_path)
    kept = store(folder=tmp_path)
    assert kept.list("ann") == []
    assert names(tmp_path) == []
    kept.close()


def test_files_are_for_this_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir(mode=0o755)
    filled(folder, A)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    written = {path for path in modes if path.is_file() and path.suffix != ".star"}
    assert {modes[path] for path in written} == {0o600}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}


def test_the_disk_has_a_limit(tmp_path: Path) -> None:
    """The files used longest ago go; their contexts are cold, and encoded again."""
    clock, encoder = Clock(), FakeEncoder()
    kept = store(encoder, clock=clock, folder=tmp_path, device_tokens=8, disk_tokens=16)
    ids = []
    for tokens in (A, B, C):
        clock.now += 1
        ids.append(kept.create(wanted(*tokens))[0].id)
        settle(kept)
    assert sum(name.endswith(".star") for name in names(tmp_path)) == 2
    assert [kept.get("ann", id).location for id in ids] == ["cold", "disk", "device"]
    assert ask(kept, ids[0]) == ("miss", A)
    kept.close()
    kept = store(folder=tmp_path)
    assert [kept.get("ann", id).location for id in ids].count("cold") == 1
    kept.close()


def test_a_lower_limit_counts_from_the_start(tmp_path: Path) -> None:
    ids = filled(tmp_path, A, B, C)
    kept = store(folder=tmp_path, disk_tokens=16)
    assert sorted(kept.get("ann", id).location for id in ids) == ["cold", "disk", "disk"]
    kept.close()


def test_pins_beyond_a_lower_limit_are_dropped_at_the_start(tmp_path: Path) -> None:
    """Forbids pinned contexts that leave no room for any other, ever."""
    kept = store(folder=tmp_path)
    for tokens in (A, B):
        kept.create(wanted(*tokens), pin=True)
    settle(kept)
    kept.close()
    kept = store(folder=tmp_path, device_tokens=20)
    assert sorted(view.pinned for view in kept.list("ann")) == [False, True]
    kept.close()


# ----------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_damaged_keys_are_moved_aside_and_encoded_again(tmp_path: Path, damage: str) -> None:
    (id,) = filled(tmp_path, A)
    path = own(tmp_path) / f"{id}.star"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "changed":
        path.write_bytes(b"\0" * path.stat().st_size)
    else:
        path.unlink()
    encoder = FakeEncoder()
    kept = store(encoder, folder=tmp_path)
    assert ask(kept, id)[1] == A
    assert encoder.encoded == [tuple(A)]
    assert len(list((tmp_path / "aside").iterdir())) == (damage != "missing")
    settle(kept)
    kept.close()
    encoder = FakeEncoder()
    kept = store(encoder, folder=tmp_path)
    assert ask(kept, id) == ("hit", A)
    kept.close()


def broken_json(record: Path) -> None:
    record.write_text("{")


def another_tenant(record: Path) -> None:
    sealed = json.loads(record.read_text())
    sealed["record"] = sealed["record"].replace('"ann"', '"bob"')
    record.write_text(json.dumps(sealed))


def another_name(record: Path) -> None:
    for path in record.parent.glob(f"{record.stem}.*"):
        path.rename(path.with_stem("ctx_00"))


def other_content(record: Path) -> None:
    path = record.with_suffix(".content")
    path.write_text(path.read_text().replace("A", "B"))


def no_content(record: Path) -> None:
    record.with_suffix(".content").unlink()


def other_secret(record: Path) -> None:
    (record.parents[1] / "secret").write_text("ab" * 32)


@pytest.mark.parametrize(
    "damage",
    [broken_json, another_tenant, another_name, other_content, no_content, other_secret],
)
def test_damaged_and_foreign_records_are_moved_aside(
    tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    id, other = filled(tmp_path, A, B)
    damage(own(tmp_path) / f"{id}.json")
    kept = store(folder=tmp_path)
    left = {view.id for view in kept.list("ann") + kept.list("bob")}
    assert left == (set() if damage is other_secret else {other})
    assert len(list((tmp_path / "aside").iterdir())) >= 2
    assert "was moved to" in caplog.text
    assert not any(id in name for name in names(tmp_path))
    kept.close()


def test_a_folder_that_lost_its_secret_says_what_to_do(tmp_path: Path) -> None:
    filled(tmp_path, A)
    (tmp_path / "secret").write_text("short")
    with pytest.raises(InvalidInputError, match="put it back from a copy, or remove the store"):
        store(folder=tmp_path)


def test_leftovers_of_a_killed_server_are_cleared_away(tmp_path: Path) -> None:
    filled(tmp_path, A)
    folder = own(tmp_path)
    (folder / ".ctx_1.json.x").write_text("half")
    (folder / "ctx_11.star").write_bytes(b"without a record")
    (folder / "ctx_12.content").write_bytes(b"without a record")
    (folder / "notes.txt").write_text("somebody's")
    (folder / "folder").mkdir()
    store(folder=tmp_path).close()
    assert len(names(tmp_path)) == 3
    aside = [path.name.partition("-")[2] for path in (tmp_path / "aside").iterdir()]
    assert sorted(aside) == ["folder", "notes.txt"]


def test_contexts_of_another_model_wait_in_their_own_folder(tmp_path: Path) -> None:
    (id,) = filled(tmp_path, A)
    kept = store(folder=tmp_path, identity=b"model two")
    with pytest.raises(RefusalError, match="there is no context"):
        kept.get("ann", id)
    kept.close()
    kept = store(folder=tmp_path)
    assert ask(kept, id) == ("hit", A)
    kept.close()


def test_files_of_another_model_do_not_pass_for_this_ones(tmp_path: Path) -> None:
    """Forbids answers from the keys and values of another model."""
    filled(tmp_path, A)
    own(tmp_path).rename(tmp_path / b"model two".hex()[:16])
    kept = store(folder=tmp_path, identity=b"model two")
    assert kept.list("ann") == []
    assert len(list((tmp_path / "aside").iterdir())) == 3
    kept.close()


def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    kept = store(folder=tmp_path)
    with pytest.raises(InvalidInputError, match="is used by another server; give each server"):
        store(folder=tmp_path)
    kept.close()
    store(folder=tmp_path).close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match=r"cannot be used: .*; give a folder"):
        StoreFolder(tmp_path / "file" / "store", IDENTITY)
    with pytest.raises(InvalidInputError, match=r"cannot be used: .*; give a folder"):
        StoreFolder(tmp_path / "no" / "store", IDENTITY)
