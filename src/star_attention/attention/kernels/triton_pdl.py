"""Programmatic dependent launch: a kernel starts while the one before it ends.

A decode step is some 500 small kernels, one after the other. Each of ours lets the next one start
early, and waits for its predecessor before it touches what that wrote (CUDA programming guide,
"Programmatic Dependent Launch and Synchronization"). Needs a GPU of compute capability 9.0.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def begin(PDL: tl.constexpr) -> None:
    """Wait for the kernel before, and let the next one start; call it before reading."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def options(device: torch.device) -> dict[str, Any]:
    """Return the arguments of a launch: `PDL` for the kernel, and an option of Triton's."""
    return dict(PDL=True, launch_pdl=True) if is_supported(device) else dict(PDL=False)


@functools.cache
def is_supported(device: torch.device) -> bool:
    """True if a device starts kernels early."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
