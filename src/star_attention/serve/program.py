"""A server from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import uvicorn

from star_attention.engine import StarLLM
from star_attention.errors import InvalidInputError
from star_attention.generation.batching.warming import warm_up
from star_attention.serve.answers import Answers
from star_attention.serve.connection import Connection
from star_attention.serve.contexts.encoder import BatchEncoder, engine_identity
from star_attention.serve.contexts.folder import StoreFolder
from star_attention.serve.contexts.store import ContextStore
from star_attention.serve.contexts.table import StoreSettings
from star_attention.serve.engine import Engine
from star_attention.serve.http.app import make_app
from star_attention.serve.keys import Keys
from star_attention.serve.service import Service
from star_attention.serve.settings import ServeSettings

_log = logging.getLogger(__name__)

_LAST_S = 2
"""Seconds that connections get after their answers, to take the last bytes."""
_LOOK_S = 0.05
_HOST_SHARE = 4
"""Contexts that leave a GPU take up to one part in so many of the host memory that is free."""


def run(
    service: Service,
    keys: Keys | None,
    listener: socket.socket,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal ends it, and all answers under way have ended.

    Args:
        service: a server's state, whose engine is not running yet.
        keys: its keys; None to serve everybody.
        listener: where to listen.
        ready: called once requests are taken.

    Raises:
        Exception: what ended the engine.
    """
    settings = service.settings
    config = uvicorn.Config(
        make_app(service, keys),
        log_config=None,
        access_log=False,
        http=Connection,
        ws="none",
        lifespan="off",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_LAST_S,
        server_header=False,
        h11_max_incomplete_event_size=64 * 1024,
    )
    service.engine.on_warm = _leave_garbage
    with _serving(service):
        asyncio.run(_Server(config, service, settings, ready).serve(sockets=[listener]))
    if service.engine.failure is not None:
        raise service.engine.failure
    # Whoever has lost a rank has not ended well.
    service.star.runtime.comm.check()


@contextlib.contextmanager
def _serving(service: Service) -> Iterator[None]:
    """Let the engine run while the block does, in a process that serves and does nothing else."""
    handle = service.star.runtime.handle
    # Signs of the weights lie on the device, where every question would wait for the step under
    # way to read them. Contexts are checked when they are made or loaded.
    handle.is_frozen = True
    service.engine.start()
    try:
        yield
    finally:
        service.close()
        gc.unfreeze()
        handle.is_frozen = False


def _leave_garbage() -> None:
    """Let the garbage collector pass over what is here: it stays until the server ends.

    Importing and compiling leave half a million objects and more, which take a collection a second
    or longer, in the middle of answers.
    """
    gc.collect()
    gc.freeze()


class _Server(uvicorn.Server):
    """A server whose first signal lets answers end, and whose second one does not."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        settings: ServeSettings,
        ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._service, self._settings, self._ready = service, settings, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self._watcher = asyncio.ensure_future(self._watch())
        self._ready()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Take a signal to end."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
        # In the main thread, between two steps of its event loop.
        self._service.draining = True

    async def _watch(self) -> None:
        """End the server when it is to end, or when the engine has failed."""
        service = self._service
        while not service.draining and service.engine.alive:
            await asyncio.sleep(_LOOK_S)
        service.draining = True
        if service.engine.alive and not self.should_exit:
            _log.info("shutting down: %d requests are open", service.open)
            await self._drain()
        # What is left gets an error, and its stream an end.
        await asyncio.to_thread(service.engine.stop, _LAST_S)
        self.should_exit = True

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.drain_timeout
        while self._service.open and loop.time() < deadline and not self.should_exit:
            await asyncio.sleep(_LOOK_S)


def make_service(star: StarLLM, name: str, settings: ServeSettings) -> Service:
    """Return the state of a server over an engine, whose thread is not running yet.

    Args:
        star: the engine; other ranks follow it.
        name: the model's name for clients.
        settings: the server's.

    Raises:
        InvalidInputError: the folder of contexts cannot be used, or a setting does not fit the
            device.
    """
    engines: list[Engine] = []

    def wake() -> None:
        if engines:
            engines[0].wake()

    identity = engine_identity(star)
    store = ContextStore(
        BatchEncoder(star, lambda: engines[0].batch),
        StoreSettings(
            device_bytes=settings.max_context_bytes or _spare_bytes(star) // 2,
            host_bytes=_host_bytes(star, settings),
            # Sizes are those on one rank, and all ranks write.
            disk_bytes=settings.max_store_bytes // star.num_ranks,
            ttl=settings.context_ttl,
            talks=settings.max_conversations,
            talk_ttl=settings.conversation_ttl,
        ),
        folder=None if settings.store is None else StoreFolder(settings.store, identity),
        identity=identity,
        wake=wake,
    )
    warming = partial(warm_up, star, settings.max_rows)
    answers = Answers(star, store, settings.max_rows, settings.max_rows_per_key)
    engine = Engine(answers, store, warming) if settings.warm_up else Engine(answers, store)
    engines.append(engine)
    service = Service(star, name, settings, store, engine)
    engine.on_step = service.metrics.step.observe
    return service


def _host_bytes(star: StarLLM, settings: ServeSettings) -> int:
    """Return the most bytes of host memory for contexts that leave the device.

    Raises:
        InvalidInputError: contexts are in host memory already, or on several ranks.
    """
    wanted = settings.max_host_bytes
    if star.num_ranks > 1:
        if wanted:
            raise InvalidInputError(
                f"max_host_bytes {wanted:,} does not work on {star.num_ranks} ranks, where contexts"
                " that leave the devices go to the store alone; leave it out"
            )
        return 0
    if star.device.type != "cpu" and star.config.kv_device is None:
        return free_bytes(torch.device("cpu")) // _HOST_SHARE if wanted is None else wanted
    if wanted:
        raise InvalidInputError(
            f"max_host_bytes {wanted:,} does not work here: contexts are in host memory from the"
            " start; leave it out, and set max_context_bytes"
        )
    return 0


def check_same(star: StarLLM, settings: ServeSettings) -> None:
    """Check that all ranks were started with the same options. Collective.

    Raises:
        InvalidInputError: they were not.
    """
    own, first = asdict(settings), asdict(star.from_rank_0(settings))
    names = [name for name, value in own.items() if value != first[name]]
    refusal = InvalidInputError(
        f"rank {star.rank} was started with another {', '.join(names)} than rank 0; start all ranks"
        " with the same options"
    )
    with star.runtime.collective("startup"):
        star.runtime.comm.raise_if_any_failed(refusal if names else None)


def _spare_bytes(star: StarLLM) -> int:
    """Return the memory for one rank that nothing uses."""
    free = free_bytes(star.device)
    # On a CPU other ranks take theirs of the same memory.
    return free if star.device.type == "cuda" else free // star.num_ranks


def free_bytes(device: torch.device) -> int:
    """Return the memory of a device that nothing uses."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        values = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(values["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
