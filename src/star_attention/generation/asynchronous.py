"""`encode`, `generate` and `stream` for asyncio: one thread per model does the work, in order."""

from __future__ import annotations

import asyncio
import functools
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from star_attention.errors import InvalidInputError
from star_attention.generation.result import Asked, Delta, Generation
from star_attention.generation.stream import Stream
from star_attention.inputs import Prepared

_workers: weakref.WeakKeyDictionary[Any, ThreadPoolExecutor] = weakref.WeakKeyDictionary()
"""The thread of each model."""
_workers_lock = threading.Lock()


class AsyncCalls:
    """The methods of `StarLLM` that are awaited.

    Calls on one model, whatever its engine, wait for each other; streams take turns piece by piece.
    The event loop is never blocked. A call that waits can be canceled; an answer under way then
    ends after its current token, while a context is encoded to its end. On several ranks every call
    is collective, so await one after another, in the same order everywhere.
    """

    async def aencode(self: Any, content: Any, **options: Any) -> Any:
        """Encode a context, as `encode` does.

        Args:
            content, options: as for `encode`.

        Returns:
            An encoded context; for a list of contexts, a list.
        """
        call = functools.partial(self.encode, content, **options)
        return await _submit(self.runtime.handle, call, threading.Event())

    async def agenerate(self: Any, context: Asked, query: Any = None, **settings: Any) -> Any:
        """Answer a query on a context, as `generate` does.

        Args:
            context, query, settings: as for `generate`.

        Returns:
            An answer; for a list of queries, a list.
        """
        canceled = threading.Event()
        query, settings = _stoppable(query, settings, canceled)
        call = functools.partial(self.generate, context, query, **settings)
        return await _submit(self.runtime.handle, call, canceled)

    def astream(self: Any, context: Asked, query: Any = None, **settings: Any) -> AsyncStream:
        """Answer one query piece by piece, as `stream` does: `async for piece in astream(...)`.

        Errors of the arguments come with the first piece.

        Args:
            context, query, settings: as for `generate`.
        """
        canceled = threading.Event()
        query, settings = _stoppable(query, settings, canceled)
        start = functools.partial(self.stream, context, query, **settings)
        return AsyncStream(self.runtime.handle, start, canceled)


class AsyncStream(AsyncIterator[str]):
    """The text of one answer while it is generated, in pieces that are awaited.

    `async for piece in stream` gives the text, `async for delta in stream.deltas()` the model's
    reasoning, too. Canceling the task that waits for a piece ends the answer, and so do `aclose()`
    and the end of an `async with` block.
    """

    def __init__(self, handle: Any, start: Callable[[], Stream], canceled: threading.Event) -> None:
        self._handle, self._start, self._canceled = handle, start, canceled
        self._stream: Stream | None = None

    async def __anext__(self) -> str:
        while (delta := await self._advance()) is not None:
            if delta.text:
                return delta.text
        raise StopAsyncIteration

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yield what each step adds, as `Stream.deltas` does."""
        while (delta := await self._advance()) is not None:
            yield delta

    async def _advance(self) -> Delta | None:
        try:
            delta: Delta | None = await _submit(self._handle, self._next, self._canceled)
        except asyncio.CancelledError:
            # In the model's own time: the task may not wait any more.
            _worker(self._handle).submit(self._close)
            raise
        return delta

    def _next(self) -> Delta | None:
        if self._stream is None:
            self._stream = self._start()
        return next(self._stream.deltas(), None)

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    @property
    def result(self) -> Generation:
        """The whole answer, once the stream has ended.

        Raises:
            InvalidInputError: the stream has not ended, or never began.
        """
        if self._stream is None:
            raise InvalidInputError("the stream has not begun; iterate over it first")
        return self._stream.result

    async def aclose(self) -> None:
        """End the answer here."""
        await _submit(self._handle, self._close, threading.Event())

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


class _Canceled(StoppingCriteria):
    """Ends every answer of a call that was canceled."""

    def __init__(self, canceled: threading.Event) -> None:
        self._canceled = canceled

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self._canceled.is_set(), device=input_ids.device)


def _stoppable(
    query: Any, settings: dict[str, Any], canceled: threading.Event
) -> tuple[Any, dict[str, Any]]:
    """Return a query and its settings with a criterion that ends the answers once canceled."""
    if not isinstance(query, Prepared):
        criteria = settings.get("stopping_criteria")
        # A value that is refused stays as it is.
        if criteria is None or isinstance(criteria, list):
            settings = settings | {"stopping_criteria": _with(criteria, canceled)}
        return query, settings
    prepared = query.settings
    # Other ranks than 0 prepare nothing.
    if prepared is None:
        return query, settings
    criteria = _with(prepared.arguments.stopping_criteria, canceled)
    arguments = replace(prepared.arguments, stopping_criteria=criteria)
    return replace(query, settings=replace(prepared, arguments=arguments)), settings


def _with(criteria: Any, canceled: threading.Event) -> StoppingCriteriaList:
    return StoppingCriteriaList([*(criteria or []), _Canceled(canceled)])


def _worker(handle: Any) -> ThreadPoolExecutor:
    """Return the thread of a model."""

    device = handle.device

    def set_device() -> None:
        # A thread starts on the first GPU, and kernels of our own run on the current one.
        if device.type == "cuda":
            torch.cuda.set_device(device)

    with _workers_lock:
        worker = _workers.get(handle)
        if worker is None:
            worker = ThreadPoolExecutor(1, "star-attention", initializer=set_device)
            _workers[handle] = worker
        return worker


async def _submit(handle: Any, call: Callable[[], Any], canceled: threading.Event) -> Any:
    """Await a call in the model's thread; set `canceled` if the task is canceled meanwhile."""
    try:
        return await asyncio.get_running_loop().run_in_executor(_worker(handle), call)
    except asyncio.CancelledError:
        canceled.set()
        raise
