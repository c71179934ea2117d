"""Copies of small tensors to a device, which keeps computing meanwhile."""

from __future__ import annotations

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
