"""Capturing work on a GPU as a CUDA graph."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from star_attention.distributed.comm import Comm
from star_attention.errors import first_line
from star_attention.hf.loading import fingerprint, identity

_log = logging.getLogger("star_attention")

# Longest wait for a launch to return, before a graph is released.
_LAUNCH_S = 1.0


class Validity:
    """Tells when captured forwards are void.

    They hold addresses of weights, which may have moved, and know one set of adapters.

    Args:
        handle: the `ModelHandle` of the model.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._weights: int | None = None

    def has_ended(self) -> bool:
        """Return True if what was captured before the last call is void."""
        if self._handle.is_frozen and self._weights is not None:
            return False
        outer = self._handle.outer
        weights = hash((*identity.adapters(outer), fingerprint.addresses(outer)))
        before, self._weights = self._weights, weights
        return weights != before


class Recorder:
    """Captures the forwards of one model, which share the memory that they work in.

    Args:
        handle: the `ModelHandle` of the model.

    Attributes:
        broken: modes of compiled layers that no graph can hold: compiling them takes long.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._pool: Any = None
        # Keeps the pool: torch frees a pool with its last graph, and cannot use it again.
        self._keeper: torch.cuda.CUDAGraph | None = None
        self.broken: set[str] = set()
        self._chain: _Chain | None = None

    def validity(self) -> Validity:
        """Return what tells the owner of captured forwards when to drop them."""
        return Validity(self._handle)

    def try_record(
        self,
        forward: Callable[[str | None], None],
        *,
        mode: str | None,
        after: Callable[[], Any],
        comm: Comm,
        subject: str,
    ) -> Callable[[], None] | None:
        """Capture a forward by compiled layers or, if that fails, by the layers as they are.

        Args:
            forward: runs the forward by layers compiled for a mode, None for layers as they are.
            mode: the mode to try first (`hf.execution.compiled`).
            after: what follows the forward on the device.
            comm: the ranks of its collectives.
            subject: what is captured, for the log.

        Returns:
            The function that replays it, None if it cannot be captured.
        """
        modes = [mode] if mode is not None and mode not in self.broken else []
        for chosen in (*modes, None):

            def warm_up(chosen: str | None = chosen) -> None:
                forward(chosen)

            def work(chosen: str | None = chosen) -> None:
                forward(chosen)
                after()

            try:
                return self.record(work, warm_up=warm_up, comm=comm)
            except Exception as error:
                # The fault of another rank, if it is one.
                comm.tick()
                # Whatever a model does that cannot be captured, the plain forward can do.
                details = _log.isEnabledFor(logging.DEBUG)
                if chosen is None:
                    _log.info("no CUDA graph for %s: %s", subject, error, exc_info=details)
                    continue
                self.broken.add(chosen)
                _log.warning(
                    "no compiled layers in the CUDA graph for %s, plain ones take longer: %s",
                    subject,
                    first_line(error),
                    exc_info=details,
                )
        return None

    def record(
        self, work: Callable[[], None], *, warm_up: Callable[[], Any], comm: Comm
    ) -> Callable[[], None]:
        """Capture `work`, and return the function that replays it.

        Neither the warm-up nor the capture waits for other ranks.

        Args:
            work: the forward, and what follows it on the device.
            warm_up: the forward alone, which compiles and allocates at its first use.
            comm: the ranks of its collectives.
        """
        if self._pool is None:
            self._open_pool()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), comm.rehearsal():
            for _ in range(2):
                warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        current = torch.cuda.current_stream()
        try:
            with comm.recording() as recorded:
                self._chain = graph = _Chain()
                _capture(work, graph, self._pool)
        except Exception:
            torch.cuda.set_stream(current)
            _reset_after_broken_capture(self._handle.device, self._pool)
            self._pool = None
            raise
        finally:
            self._chain = None

        lock = threading.Lock()

        def replay() -> None:
            with lock:
                graph.replay()
            recorded.replayed()

        def release() -> None:
            # Another thread's launch may wait for the device.
            if lock.acquire(timeout=_LAUNCH_S):
                graph.reset()
                lock.release()

        recorded.release = release
        return replay

    def _open_pool(self) -> None:
        pool, keeper = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        try:
            _capture_little(keeper, pool, self._handle.device)
        except Exception:
            _reset_after_broken_capture(self._handle.device, pool)
            raise
        self._pool, self._keeper = pool, keeper

    def interlude(self, act: Callable[[], None]) -> None:
        """Let Python do something at this place of the captured work, at every replay.

        One graph ends here, and another begins. A warm-up has no interludes.
        """
        if self._chain is not None:
            self._chain.cut(act)


class _Chain:
    """CUDA graphs that run one after the other, and what Python does between them.

    They are captured as one: `torch.cuda.graph` takes this for a graph.
    """

    def __init__(self) -> None:
        self._graphs = [torch.cuda.CUDAGraph()]
        self._acts: list[Callable[[], None]] = []
        self._options: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

    def capture_begin(self, *args: Any, **kwargs: Any) -> None:
        self._options = args, kwargs
        self._graphs[-1].capture_begin(*args, **kwargs)

    def cut(self, act: Callable[[], None]) -> None:
        self.capture_end()
        self._acts.append(act)
        self._graphs.append(torch.cuda.CUDAGraph())
        args, kwargs = self._options
        self.capture_begin(*args, **kwargs)

    def capture_end(self) -> None:
        self._graphs[-1].capture_end()

    def replay(self) -> None:
        first, *others = self._graphs
        first.replay()
        for act, graph in zip(self._acts, others, strict=True):
            act()
            graph.replay()

    def reset(self) -> None:
        for graph in self._graphs:
            graph.reset()


def _capture(work: Callable[[], Any], graph: Any, pool: Any) -> None:
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        work()


def _reset_after_broken_capture(device: torch.device, pool: Any) -> None:
    """Restore torch's state: it would keep allocating from the pool, and refuse random numbers."""
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is not None:
        # torch may have ended it by itself.
        with suppress(RuntimeError):
            end(device.index or 0, pool)
    # A capture that succeeds ends the broken one for the random number generator.
    _capture_little(torch.cuda.CUDAGraph(), None, device)


def _capture_little(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    scratch = torch.zeros(1, device=device)
    _capture(lambda: scratch.zero_(), graph, pool)
