"""Programmatic dependent launch: a kernel starts while the one before it ends.

A decode step is some 500 small kernels, one after the other. Each of ours lets the next one start
early, and waits for its predecessor before it touches what that wrote; since all programs of a
kernel wait before they let the next one start, what earlier kernels wrote is there by then (CUDA
programming guide, "Programmatic Dependent Launch and Synchronization"). Needs a GPU of compute
capability 9.0.
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


@triton.jit
def fetch(ptr, nbytes, PDL: tl.constexpr):
    """Bring some memory, 16 bytes or a multiple, to the L2 cache, for the kernels that follow.

    What a kernel before writes need not be there yet: reading it later is right all the same.
    """
    if PDL:
        # One thread of the program asks for all of it.
        tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .b32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.b32 $0, 0;
            }""",
            "=r,l,r",
            [ptr.to(tl.int64), nbytes.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def go_on(PDL: tl.constexpr) -> None:
    """Let the next kernel start, and do not wait for the one before.

    For a kernel that finds out by itself when all that the one before does is done, and that reads
    nothing else of it. That one has waited for those before it.
    """
    if PDL:
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
