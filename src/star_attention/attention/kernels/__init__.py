"""Attention kernels, one short file each, all behind one shape of call.

A kernel module has `unsupported(call) -> list[str]` (why it cannot run; empty when it can) and
`attend(q_BQHD, k_BKGD, v_BKGD, *, call, scale, mask_BQK) -> State`. It converts at its own border, so that callers only
ever see states with `lse_BQH` in fp32.
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
"""In order of preference; modules are imported on use."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """The shape of one kernel call.

    Without `masked`, `causal` says whether query i sees keys up to `keys - queries + i` (bottom-right; square when
    the counts are equal) or all of them; `window` limits that to the last `window` keys. With `masked`, an explicit
    boolean mask says everything.
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
        return self.queries == self.keys


def load(name: str) -> ModuleType:
    """The kernel module of that name."""
    return importlib.import_module(KERNELS[name])


def find(call: Call, name: str | None = None) -> str | None:
    """The first kernel that can run the call, or None; `name` asks about that one only."""
    return next(
        (n for n in ([name] if name else _in_order()) if not load(n).unsupported(call)), None
    )


def _in_order() -> list[str]:
    """FlashAttention first where version 3 or 4 was activated in torch (`torch.nn.attention.activate_flash_attention_impl`)."""
    newer = current_flash_attention_impl() is not None
    return sorted(KERNELS, key=lambda name: name != "cuda_flash") if newer else list(KERNELS)


def choose(call: Call, name: str | None = None) -> str:
    """The first kernel that can run the call (`name`: that one or none).

    Raises `UnsupportedCallError` with every kernel's reasons when none can.
    """
    found = find(call, name)
    if found is None:
        reasons = [
            f"{n}: {', '.join(load(n).unsupported(call))}" for n in ([name] if name else KERNELS)
        ]
        raise UnsupportedCallError(f"no attention kernel can run {call}: " + "; ".join(reasons))
    return found


@cache
def triton_works(device: torch.device) -> bool:
    """Whether Triton's kernels, and with them compiled layers, run there: they need a C compiler, which may be missing."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    from star_attention.attention.kernels import triton_merge

    out_BQHD, lse_BQH = torch.zeros(1, 1, 1, 16, device=device), torch.zeros(1, 1, 1, device=device)
    try:
        triton_merge.merge(out_BQHD, lse_BQH, out_BQHD, lse_BQH, dtype=torch.float32)
    except Exception as error:  # of the compiler, of the driver: whatever it is, torch's own operations do the same work
        logging.getLogger("star_attention").info("going on without Triton: %s", error)
        return False
    return True


def half_precision_cuda(call: Call, *, head_size_limit: int) -> list[str]:
    """What the fused half-precision CUDA kernels of torch all ask for."""
    why = []
    if call.device != "cuda":
        why.append(f"runs on cuda, not {call.device}")
    if call.dtype not in (torch.float16, torch.bfloat16):
        why.append(f"takes float16 and bfloat16, not {call.dtype}")
    if call.masked:
        why.append("takes no explicit mask")
    if call.softcap is not None:
        why.append("has no softcap")
    if call.head_size > head_size_limit or call.head_size % 8:
        why.append(f"takes head sizes up to {head_size_limit} in steps of 8, not {call.head_size}")
    return why
