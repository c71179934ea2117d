"""Memory of a GPU that other processes of the host reach, through CUDA's driver.

Not torch's own sharing of tensors: that depends on the settings of its allocator, and counts
references in files.
"""

from __future__ import annotations

import ctypes
from functools import cached_property
from typing import Any

import torch

_HANDLE_BYTES = 64
_ENABLE_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = [("data", ctypes.c_byte * _HANDLE_BYTES)]


class CudaMemory:
    """Allocates on the current GPU, and opens what other processes have allocated.

    Methods raise `RuntimeError`, or `OSError` without a driver. Memory lives as long as the
    process: others may hold it open.
    """

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    @cached_property
    def _driver(self) -> Any:
        # The driver works in the context that torch has made by now.
        torch.zeros(1, device=self.device)
        return ctypes.CDLL("libcuda.so.1")

    def allocate(self, bytes: int) -> int:
        """Return the address of new memory."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(bytes))
        return address.value

    def export(self, address: int) -> str:
        """Return what another process needs to open this memory."""
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return ctypes.string_at(ctypes.byref(handle), _HANDLE_BYTES).hex()

    def open(self, exported: str) -> int:
        """Return the address, in this process, of another one's memory."""
        handle, address = _Handle.from_buffer_copy(bytes.fromhex(exported)), ctypes.c_uint64()
        flags = ctypes.c_uint(_ENABLE_PEER_ACCESS)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, flags)
        return address.value

    def clear(self, address: int, bytes: int) -> None:
        """Set memory of this process to zero."""
        value, size = ctypes.c_ubyte(0), ctypes.c_size_t(bytes)
        self._call("cuMemsetD8_v2", ctypes.c_uint64(address), value, size)

    def synchronize(self) -> None:
        """Wait until this process uses no memory on the GPU."""
        torch.cuda.synchronize(self.device)

    def flag(self) -> torch.Tensor:
        """Return a number in host memory that kernels can read."""
        return torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=True)

    def _call(self, function: str, *arguments: Any) -> None:
        result = getattr(self._driver, function)(*arguments)
        if result:
            raise RuntimeError(f"{function} failed with CUDA's error {result}")
