"""Host memory that a GPU copies from and to by itself, while Python and the GPU go on.

torch's own pinned memory comes in powers of two, and stays pinned for good. Here every tensor has
just its bytes, which go back to the system with it.
"""

from __future__ import annotations

import mmap
import sys
import warnings
from contextlib import suppress
from math import prod
from typing import Any

import torch
from torch import Tensor

from star_attention.storage.oom import allocate


class _Region(mmap.mmap):
    """Memory of whole pages, pinned for as long as a tensor is in it."""

    address = 0
    """Where it is, once it is pinned."""
    device: torch.device
    """The device that copies from and to it."""

    def __del__(self) -> None:
        if not self.address or sys.is_finalizing():
            return
        if torch.cuda.is_current_stream_capturing():
            # Nobody may wait for the device now: the region stays a little longer.
            _released.append(self)
        else:
            self.unpin()

    def unpin(self) -> None:
        # Copies that nobody has waited for.
        torch.cuda.synchronize(self.device)
        _cudart().cudaHostUnregister(self.address)
        self.address = 0


_released: list[_Region] = []
"""Regions without tensors that could not be unpinned yet."""


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor in host memory, for copies from or to a device; `torch.empty` on a CPU.

    Memory that cannot be pinned is used as it is, with a warning: copies then wait for each other.

    Args:
        shape: shape of the tensor.
        dtype: its precision.
        device: the device.

    Raises:
        MemoryError: the machine has too little memory.
    """
    nbytes = prod(shape) * dtype.itemsize
    if device.type != "cuda" or not nbytes:
        return allocate(lambda: torch.empty(shape, dtype=dtype, device="cpu"))

    unpin_released()

    def make() -> Tensor:
        region = _region(nbytes)
        flat = torch.frombuffer(region, dtype=torch.uint8, count=nbytes)
        _pin(region, flat.data_ptr(), device)
        return flat.view(dtype).view(shape)

    return allocate(make)


def unpin_released() -> None:
    """Unpin what could not be when it was released."""
    while _released:
        _released.pop().unpin()


def copy_of(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on the CPU in memory that `device` copies from by itself; itself on a CPU."""
    if device.type != "cuda":
        return tensor
    return empty(tuple(tensor.shape), tensor.dtype, device).copy_(tensor)


def _region(nbytes: int) -> _Region:
    try:
        region = _Region(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot allocate {nbytes:,} bytes of host memory: {error}") from error
    with suppress(OSError):
        # There are fewer large pages to pin. Not every kernel has them.
        region.madvise(mmap.MADV_HUGEPAGE)
    return region


def _pin(region: _Region, address: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        error = int(_cudart().cudaHostRegister(address, len(region), 0))
        if not error:
            region.address, region.device = address, device
            return
        # CUDA reports the error once more, to whatever is launched next.
        with suppress(RuntimeError):
            torch.ones(1, device=device).add_(1)
    warnings.warn(
        f"{len(region):,} bytes of host memory cannot be pinned (CUDA error {error}): the GPU waits"
        " for copies of keys and values; let the system pin more, or keep more layers on the GPU"
        " (kv_resident)",
        stacklevel=2,
    )


def _cudart() -> Any:
    return torch.cuda.cudart()
