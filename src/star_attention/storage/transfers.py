"""Copies of small tensors to a device, which keeps computing meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def send(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return numbers on a device, without waiting for what runs there.

    Args:
        values: numbers, in nested lists.
        device: where they are wanted.
        dtype: their precision.
    """
    pinned = device.type == "cuda"
    # torch waits for copies from other host memory.
    on_host = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=pinned)
    return on_host.to(device, non_blocking=True)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device, without waiting for what runs there."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def overwrite(target: Tensor, values: Tensor) -> None:
    """Copy numbers from the host into a tensor, without waiting for its device."""
    target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)


class Beside:
    """Work on a device that does not wait for what is issued after this object was made.

    It sees what was written to the device's memory before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, None
        if device.type == "cuda":
            self._before = torch.cuda.Event()
            self._before.record(torch.cuda.current_stream(device))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Issue the work of this block; all of it has to be waited for in the block."""
        if self._before is None:
            yield
            return
        stream = _beside(self._device)
        stream.wait_event(self._before)
        with torch.cuda.stream(stream):
            yield


@functools.cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of small work on a device, which goes first where both are ready."""
    return torch.cuda.Stream(device, priority=-1)
