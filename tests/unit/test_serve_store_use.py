"""The store under many threads at once, and under kill -9."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from star_attention.serve.contexts.store import ContextStore
from star_attention.serve.refusals import RefusalError
from tests.stores import FakeEncoder, places, settle, store, wanted

ROOT = Path(__file__).parents[2]
DOCUMENTS = [list(range(start, start + length)) for start, length in enumerate((3, 9, 14, 20, 30))]
REQUESTS = 300

# Makes, uses and deletes contexts until it is killed; prints what it has been promised.
SCRIPT = """
import itertools, random, sys
from pathlib import Path
from tests.stores import store, wanted
kept = store(folder=Path(sys.argv[1]), device_tokens=60)
chance = random.Random(int(sys.argv[2]))
print("ready", flush=True)
for number in itertools.count(int(sys.argv[2]) * 1000):
    view, _ = kept.create(wanted(*range(number, number + 8)), name=str(number))
    for _ in range(chance.randrange(6)):
        kept.step()
    listed = kept.list("ann")
    if len(listed) > 12:
        gone = chance.choice(listed)
        kept.delete("ann", gone.id)
        print(gone.id, flush=True)
"""


def requests(kept: ContextStore, seed: int, failures: list[BaseException]) -> None:
    """Ask, wait, leave early, create and delete, as clients do."""
    chance, tenant = random.Random(seed), f"tenant-{seed % 3}"
    mine: list[str] = []
    try:
        for _ in range(REQUESTS):
            ids = chance.choice(DOCUMENTS)
            try:
                if mine and chance.random() < 0.2:
                    kept.delete(tenant, mine.pop())
                elif chance.random() < 0.2:
                    mine.append(kept.create(wanted(*ids, tenant=tenant))[0].id)
                else:
                    ask(kept, ids, tenant, chance)
            except RefusalError as refusal:
                if refusal.code not in ("context_not_found", "context_deleted"):
                    raise
    except BaseException as error:
        failures.append(error)


def ask(kept: ContextStore, ids: list[int], tenant: str, chance: random.Random) -> None:
    with kept.acquire(wanted(*ids, tenant=tenant, keep=chance.random() < 0.7)) as lease:
        if chance.random() < 0.3:
            return
        context = lease.ready.result(timeout=60)
        # In use: still there, and still these tokens.
        assert context.ids.tolist() == ids
        assert lease.view().location == "device"


def test_many_threads_at_once(tmp_path: Path) -> None:
    """Nobody waits forever, gets another's context, or leaves anything held."""
    encoder = FakeEncoder()
    encoder.tokens_a_poll = 5
    kept = store(encoder, folder=tmp_path / "store", device_tokens=60, disk_tokens=100)
    failures: list[BaseException] = []
    threads = [
        threading.Thread(target=requests, args=(kept, seed, failures), daemon=True)
        for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        kept.step()
    assert failures == []
    settle(kept)
    assert kept.make_room() in (True, False)
    assert "device" not in places(kept)
    assert not kept.counts()[2]
    kept.close()


def started(folder: Path, seed: int) -> Any:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(seed)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_contexts_are_there_or_cleanly_gone_after_a_kill(tmp_path: Path) -> None:
    folder, deleted = tmp_path / "store", set()
    for seed in range(3):
        with started(folder, seed) as process:
            for line in process.stdout:
                deleted.add(line.strip())
                if len(deleted) > 12 * (seed + 1):
                    break
            process.send_signal(signal.SIGKILL)
            # Of what was printed before the end, a last line may be half there.
            deleted |= {line.strip() for line in process.stdout if line.endswith("\n")}
        kept = store(folder=folder)
        views = kept.list("ann")
        assert views
        assert not deleted & {view.id for view in views}
        for view in views:
            first = int(view.name or -1)
            with kept.lease("ann", view.id) as lease:
                settle(kept)
                assert lease.ready.result(0).ids.tolist() == list(range(first, first + 8))
        kept.close()
        names = {path.name for path in folder.glob("*/*") if path.parent.name != "aside"}
        left = {f"{view.id}{end}" for view in views for end in (".json", ".content", ".star")}
        assert names <= left
        assert list((folder / "aside").iterdir()) == []
