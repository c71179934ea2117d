"""A store whose disk is full, or has little room: nothing fails, and what has to be is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from star_attention.errors import ContextSaveError
from tests.stores import IDENTITY, A, B, Clock, FakeContext, FakeEncoder, settle, store, use, wanted


def files(folder: Path) -> list[str]:
    return [path.name for path in (folder / IDENTITY.hex()[:16]).iterdir()]


def test_a_full_disk_costs_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, path: Path) -> None:
        raise ContextSaveError("No space left on device")

    monkeypatch.setattr(FakeContext, "save", fail)
    encoder = FakeEncoder()
    kept = store(encoder, folder=tmp_path, device_tokens=8)
    ids = [kept.create(wanted(*tokens))[0].id for tokens in (A, B)]
    settle(kept)
    assert [kept.get("ann", id).location for id in ids] == ["cold", "device"]
    assert use(kept, *A) == "miss evicted"
    assert kept.counts()[0].unwritten == 2
    kept.close()
    # Half of a context is none.
    kept = store(folder=tmp_path)
    assert kept.list("ann") == []
    assert files(tmp_path) == []
    kept.close()


@pytest.mark.parametrize("how", ["later", "pin", "end"])
def test_a_disk_that_has_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Forbids that what a full disk did not take is never written, or tried all the time."""
    tries = []

    def fail(self: Any, path: Path) -> None:
        tries.append(path)
        raise ContextSaveError("No space left on device")

    clock = Clock()
    kept = store(clock=clock, folder=tmp_path)
    with monkeypatch.context() as full:
        full.setattr(FakeContext, "save", fail)
        id = kept.create(wanted(*A))[0].id
        for _ in range(2):
            for _ in range(3):
                settle(kept)
            clock.now += 400
        assert len(tries) == 2
        assert caplog.text.count("is not kept on disk") == kept.counts()[0].unwritten == 1
    if how == "pin":
        clock.now -= 400
        kept.update("ann", id, pin=True)
    if how != "end":
        settle(kept)
        assert f"{id}.star" in files(tmp_path)
    kept.close()
    assert f"{id}.star" in files(tmp_path)


def test_a_context_that_made_room_on_disk_is_written_once_it_is_pinned(tmp_path: Path) -> None:
    """Forbids that a client pins what a restart then forgets."""
    clock = Clock()
    kept = store(clock=clock, folder=tmp_path, disk_tokens=8)
    ids = []
    for tokens in (A, B):
        clock.now += 1
        ids.append(kept.create(wanted(*tokens))[0].id)
        settle(kept)
    assert [f"{id}.star" in files(tmp_path) for id in ids] == [False, True]
    kept.update("ann", ids[0], pin=True)
    settle(kept)
    assert [f"{id}.star" in files(tmp_path) for id in ids] == [True, False]
    kept.close()
