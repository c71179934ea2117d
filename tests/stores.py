"""Stores of contexts without a model: a clock, an encoder and contexts of plain numbers."""

from __future__ import annotations

import os
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np

from star_attention.errors import ContextNotFoundError, CorruptContextError
from star_attention.serve.contexts.entry import Content, Wanted
from star_attention.serve.contexts.folder import StoreFolder
from star_attention.serve.contexts.keys import Scope, as_ids
from star_attention.serve.contexts.store import ContextStore
from star_attention.serve.contexts.table import StoreSettings

BYTES = 10
"""Bytes of a token's keys and values."""
BLOCK = 4
A, B, C = ([start + token for token in range(8)] for start in (100, 200, 300))
"""Contexts of eight tokens each."""
IDENTITY = b"model one"


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeContext:
    """A context that holds its token ids alone."""

    def __init__(self, ids: np.ndarray, reused_tokens: int = 0) -> None:
        self.ids = np.array(ids)
        self.nbytes = BYTES * len(ids)
        self.reused_tokens = reused_tokens

    def save(self, path: Path) -> None:
        path.write_bytes(self.ids.tobytes())


class FakeJob:
    """An encode that takes as many polls as it has tokens, or ends by an error."""

    def __init__(self, encoder: FakeEncoder, ids: np.ndarray, reuse: FakeContext | None) -> None:
        self.ids, self.reuse = ids, reuse
        self.tokens, self.canceled = 0, False
        self._encoder = encoder

    @property
    def done(self) -> bool:
        self.tokens = min(len(self.ids), self.tokens + self._encoder.tokens_a_poll)
        return self.tokens == len(self.ids)

    def advance(self) -> None:
        pass

    def result(self) -> FakeContext:
        if self._encoder.failures:
            raise self._encoder.failures.pop(0)
        self._encoder.encoded.append(tuple(self.ids))
        return FakeContext(self.ids, 0 if self.reuse is None else BLOCK)

    def cancel(self) -> None:
        self.canceled = True


class FakeLoad:
    """A context that is read in two pieces, and found damaged at the end."""

    def __init__(self, path: Path, ids: np.ndarray) -> None:
        self._path, self._ids, self._pieces = path, ids, 2
        self.tokens = 0

    @property
    def done(self) -> bool:
        return not self._pieces

    def advance(self) -> None:
        self._pieces -= 1

    def result(self) -> FakeContext:
        saved = np.frombuffer(self._path.read_bytes(), dtype=np.int32)
        if not np.array_equal(saved, self._ids):
            raise CorruptContextError(f"{self._path} holds other tokens")
        return FakeContext(saved)

    def cancel(self) -> None:
        self._pieces = 0


class FakeParked:
    """A context in host memory."""

    def __init__(self, context: FakeContext) -> None:
        self.ids, self.nbytes = context.ids, context.nbytes

    def on_host(self) -> FakeContext:
        return FakeContext(self.ids)


class FakeParking:
    """A context that goes to host memory in two pieces."""

    def __init__(self, context: FakeContext) -> None:
        self._context, self._pieces = context, 2

    @property
    def done(self) -> bool:
        return not self._pieces

    def advance(self) -> None:
        self._pieces -= 1

    def result(self) -> FakeParked:
        return FakeParked(self._context)

    def cancel(self) -> None:
        self._pieces = 0


class FakeReturn(FakeParking):
    """A context that comes back from there."""

    tokens = 0

    def __init__(self, parked: FakeParked) -> None:
        super().__init__(parked.on_host())

    def result(self) -> Any:
        return self._context


class FakeEncoder:
    """Makes contexts of token ids.

    Attributes:
        tokens_a_poll: tokens encoded between two polls.
        failures: errors of the next encodes.
        encoded: the ids of all finished encodes.
        jobs: all encodes.
    """

    def __init__(self) -> None:
        self.tokens_a_poll = 1_000_000
        self.failures: list[Exception] = []
        self.encoded: list[tuple[int, ...]] = []
        self.jobs: list[FakeJob] = []

    def nbytes(self, tokens: int) -> int:
        return BYTES * tokens

    def block_size(self, tokens: int) -> int:
        return BLOCK

    def start(self, ids: np.ndarray, reuse: Any) -> FakeJob:
        self.jobs.append(FakeJob(self, ids, reuse))
        return self.jobs[-1]

    def load(self, path: Path, ids: np.ndarray) -> FakeLoad:
        if not path.exists():
            raise ContextNotFoundError(f"there is no saved context at {path}")
        return FakeLoad(path, ids)

    def host_bytes(self, context: FakeContext) -> int:
        return context.nbytes

    def park(self, context: FakeContext) -> FakeParking:
        if self.failures:
            raise self.failures.pop(0)
        return FakeParking(context)

    def bring_back(self, parked: FakeParked) -> FakeReturn:
        return FakeReturn(parked)

    def free_memory(self) -> None:
        pass


class InlineExecutor(Executor):
    """Runs everything at once."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def wanted(*ids: int, tenant: str = "ann", salt: str = "", **fields: Any) -> Wanted:
    """A request for a context of these ids."""
    content = Content(ids=as_ids(ids))
    return Wanted(scope=Scope(tenant=tenant, salt=salt), content=content, **fields)


def store(
    encoder: FakeEncoder | None = None,
    *,
    clock: Clock | None = None,
    folder: Path | None = None,
    device_tokens: int = 100,
    identity: bytes = IDENTITY,
    **settings: Any,
) -> ContextStore:
    """A store whose limits are given in tokens where they are called so."""
    files = None if folder is None else StoreFolder(folder, identity)
    for name in ("pinned", "host", "disk"):
        if f"{name}_tokens" in settings:
            settings[f"{name}_bytes"] = BYTES * settings.pop(f"{name}_tokens")
    return ContextStore(
        encoder or FakeEncoder(),
        StoreSettings(device_bytes=BYTES * device_tokens, **settings),
        folder=files,
        identity=identity,
        clock=clock or Clock(),
        writer=InlineExecutor(),
    )


def settle(store: ContextStore) -> None:
    """Let the engine's thread do all that can be done now."""
    store.step()
    while store.step():
        pass
    store.step()


def use(kept: Any, *ids: int, **fields: Any) -> str:
    """Ask for a context, wait for it, let it go; return what was found."""
    with kept.acquire(wanted(*ids, **fields)) as lease:
        settle(kept)
        assert lease.ready.result(timeout=0).ids.tolist() == list(ids)
        return f"{lease.outcome} {lease.reason}".strip()


def places(kept: Any) -> dict[str, int]:
    """Return the contexts at each location."""
    return {place: number for place, (number, _) in kept.counts()[1].items() if number}


def kill(folder: Path) -> None:
    """End the server of a folder by force, as far as the folder shows it: only its lock goes."""
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if os.path.exists(path) and os.readlink(path) == str(folder / "lock"):
            os.close(int(name))
