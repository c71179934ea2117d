"""Attention kernels, one short module each, with one interface.

A kernel module has two functions. `unsupported(call) -> list[str]` returns the reasons why it
cannot run a call, none if it can.
`attend(q_BQHD, k_BKGD, v_BKGD, *, call, scale, mask_BQK) -> State` computes attention, and converts
layouts and dtypes so that every state's `lse_BQH` is fp32.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch.nn.attention import current_flash_attention_impl

from star_attention.errors import UnsupportedCallError

KERNELS = {
    "cudnn": "star_attention.attention.kernels.cudnn",
    "cuda_flash": "star_attention.attention.kernels.cuda_flash",
    "cuda_efficient": "star_attention.attention.kernels.cuda_efficient",
    "cpu_flash": "star_attention.attention.kernels.cpu_flash",
    "math": "star_attention.attention.kernels.math",
}
"""Modules of the kernels in order of preference, imported on use."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """The shape of one kernel call.

    Attributes:
        device: type of the device, "cpu" or "cuda".
        dtype: precision of queries, keys and values.
        queries: number of query rows.
        keys: number of keys.
        heads: query heads.
        kv_heads: heads of keys and values.
        head_size: elements of a head's query, key or value.
        causal: True if query i sees the keys up to `keys - queries + i` (aligned bottom-right),
            False if it sees all.
        window: number of those keys that it sees, counted from the last; None for all.
        masked: True if an explicit boolean mask decides instead of `causal` and `window`.
        softcap: softcap of the scores, None for none.
    """

    device: str
    dtype: torch.dtype
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_size: int
    causal: bool = False
    window: int | None = None
    masked: bool = False
    softcap: float | None = None

    @property
    def square(self) -> bool:
        """True if there are as many queries as keys."""
        return self.queries == self.keys


@cache
def load(name: str) -> ModuleType:
    """Import and return a kernel's module."""
    return importlib.import_module(KERNELS[name])


def find(call: Call, name: str | None = None) -> str | None:
    """Return the first kernel that can run the call, None if there is none.

    Args:
        call: shape of the call.
        name: the only kernel to consider.
    """
    candidates = [name] if name else _in_order()
    return next((kernel for kernel in candidates if not load(kernel).unsupported(call)), None)


def _in_order() -> list[str]:
    """Names in order of preference, FlashAttention first if version 3 or 4 is active in torch.

    Users activate it by `torch.nn.attention.activate_flash_attention_impl`.
    """
    if current_flash_attention_impl() is None:
        return list(KERNELS)
    return sorted(KERNELS, key=lambda name: name != "cuda_flash")


def choose(call: Call, name: str | None = None) -> str:
    """Return the first kernel that can run the call.

    Args:
        call: shape of the call.
        name: the only kernel to consider.

    Raises:
        UnsupportedCallError: no kernel can; the message lists every kernel's reasons.
    """
    chosen = find(call, name)
    if chosen is None:
        reasons = [
            f"{kernel}: {', '.join(load(kernel).unsupported(call))}"
            for kernel in ([name] if name else KERNELS)
        ]
        raise UnsupportedCallError(f"no attention kernel can run {call}: " + "; ".join(reasons))
    return chosen


@cache
def triton_works(device: torch.device) -> bool:
    """True if Triton's kernels, and with them compiled layers, run on a device.

    They need a C compiler, which may be missing.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    from star_attention.attention.kernels import triton_merge

    out_BQHD, lse_BQH = torch.zeros(1, 1, 1, 16, device=device), torch.zeros(1, 1, 1, device=device)
    try:
        triton_merge.merge(out_BQHD, lse_BQH, out_BQHD, lse_BQH, dtype=torch.float32)
    except Exception as error:
        # Whatever fails, compiler or driver: torch's own operations do the same work.
        logging.getLogger("star_attention").info("continuing without Triton: %s", error)
        return False
    return True


def half_precision_cuda(call: Call, *, head_size_limit: int) -> list[str]:
    """Return the reasons against a call that torch's fused half-precision CUDA kernels share.

    Args:
        call: shape of the call.
        head_size_limit: largest head size of the kernel.
    """
    reasons = []
    if call.device != "cuda":
        reasons.append(f"runs on cuda, not {call.device}")
    if call.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"takes float16 and bfloat16, not {call.dtype}")
    if call.masked:
        reasons.append("takes no explicit mask")
    if call.softcap is not None:
        reasons.append("has no softcap")
    if call.head_size > head_size_limit or call.head_size % 8:
        reasons.append(
            f"takes head sizes up to {head_size_limit} in steps of 8, not {call.head_size}"
        )
    return reasons
