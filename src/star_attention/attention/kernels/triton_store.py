"""Storing of a forward's keys and values where a table on the device says, in Triton.

A CUDA graph of a forward that encodes a context holds no address of the context: it reads them from
the table, so that one graph serves every context of its length and of lengths a little below.

Axes: B contexts, L layers, G KV heads, S tokens of the forward, D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4
"""Of a layer and a context: the addresses of keys and values, `[G, tokens, D]`, the first token of
the forward that is stored, and how many."""

_ROWS = 32


@triton.jit
def _copy(
    x_ptr, address, at_S, inside, first, count, g, x_s,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :]
    x_SD = tl.load(x_ptr + (at_S * x_s)[:, None] + d[None, :], mask=mask)
    target_S = (g * count + at_S - first) * D
    target_ptr = address.to(tl.pointer_type(DTYPE))
    tl.store(target_ptr + target_S[:, None] + d[None, :], x_SD, mask=mask)


@triton.jit
def _store(
    k_ptr, v_ptr, table_ptr,
    k_b, k_g, k_s, v_b, v_g, v_s, tokens,
    K_D: tl.constexpr, V_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    g = tl.program_id(1).to(tl.int64)
    at_S = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ptr = table_ptr + b * COLUMNS
    first, count = tl.load(row_ptr + 2), tl.load(row_ptr + 3)
    inside = (at_S < tokens) & (at_S >= first) & (at_S < first + count)
    _copy(
        k_ptr + b * k_b + g * k_g, tl.load(row_ptr), at_S, inside, first, count, g, k_s,
        K_D, BLOCK_K,
    )  # fmt: skip
    _copy(
        v_ptr + b * v_b + g * v_g, tl.load(row_ptr + 1), at_S, inside, first, count, g, v_s,
        V_D, BLOCK_V,
    )  # fmt: skip


def store(k_BGSD: Tensor, v_BGSD: Tensor, *, table_LBC: Tensor, layer: int) -> None:
    """Copy the tokens of a layer that are kept to where the table says.

    Args:
        k_BGSD: keys of the forward.
        v_BGSD: values; their head size may differ from that of the keys.
        table_LBC: int64 `[L, B, COLUMNS]` on the device.
        layer: row of the table.
    """
    B, G, S, K_D = k_BGSD.shape
    V_D = v_BGSD.shape[3]
    k_BGSD, v_BGSD = (t if t.stride(3) == 1 else t.contiguous() for t in (k_BGSD, v_BGSD))
    _store[(triton.cdiv(S, _ROWS), G, B)](
        k_BGSD, v_BGSD, table_LBC[layer],
        *k_BGSD.stride()[:3], *v_BGSD.stride()[:3], S,
        K_D=K_D, V_D=V_D,
        BLOCK_K=triton.next_power_of_2(K_D), BLOCK_V=triton.next_power_of_2(V_D),
        ROWS=_ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip


def new_table(layers: int, contexts: int, device: torch.device) -> Tensor:
    """Return a table by which nothing is stored."""
    return torch.zeros(layers, contexts, COLUMNS, dtype=torch.int64, device=device)
