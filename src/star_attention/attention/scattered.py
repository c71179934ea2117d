"""Attention of query rows at scattered positions of a context, to all keys up to their own.

Rows are cut into tiles. Keys up to a tile's first row need no mask and go through the fast kernels;
only those between its first and its last row take a limit for each row.

Axes: B batch, Q queries, K keys, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from star_attention.attention.attend import Rule, attend, call_of, run
from star_attention.attention.kernels import triton_works
from star_attention.attention.state import State, empty_state, join_rows, merge

_TILE_ROWS = {"cpu": 256, "cuda": 1024}
"""Rows of a tile: more are more work with limits, fewer are more calls."""
_SHARED_STEP = {"cuda": 4096}
"""Keys without a mask are cut to a multiple of this: cuDNN prepares every new length anew."""


@dataclass(frozen=True)
class Rows:
    """Positions of query rows in the context, in increasing order; several may stand at one.

    Attributes:
        positions: the positions, known on the host: nothing waits for the device.
        device: where the rows are.
    """

    positions: list[int]
    device: torch.device

    @cached_property
    def on_device(self) -> Tensor:
        """The positions on the device, int32 `[Q]`."""
        return torch.tensor(self.positions, dtype=torch.int32, device=self.device)

    def before(self, position: int) -> int:
        """Return the number of rows before a position."""
        return bisect_left(self.positions, position)


def attend_rows(
    q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, *, rule: Rule, rows: Rows, first_key: int
) -> State:
    """Compute attention of query rows over a run of keys: each sees those up to its own position.

    Args:
        q_BQHD: queries.
        k_BKGD: keys of consecutive context tokens.
        v_BKGD: their values.
        rule: scale, window and softcap.
        rows: positions of the queries.
        first_key: position of key 0.

    Returns:
        The state over these keys; the empty state in rows that see none of them.
    """
    K, window = k_BKGD.shape[1], rule.window
    if window is not None and rows.positions[-1] - first_key < window:
        # Even the last row reaches the first key.
        window = None
    whole = replace(rule, window=None)
    # Rows before `start` see no keys yet, and those from `stop` on see no more; without a window
    # they see all of them.
    start = rows.before(first_key)
    stop = rows.before(first_key + K - 1 if window is None else first_key + K - 1 + window)
    parts: list[State] = []

    def add_empty(count: int) -> None:
        if count:
            H, v_size = q_BQHD.shape[2], v_BKGD.shape[3]
            parts.append(empty_state(q_BQHD.shape[0], count, H, v_size, q_BQHD.device))

    add_empty(start)
    device = q_BQHD.device.type
    tile, step = _TILE_ROWS.get(device, _TILE_ROWS["cpu"]), _SHARED_STEP.get(device, 1)
    for first in range(start, stop, tile):
        part = slice(first, min(first + tile, stop))
        q = q_BQHD[:, part]
        # Keys that all rows of the tile see, and those that some of them see.
        shared = 0
        if window is None:
            shared = (rows.positions[part.start] - first_key + 1) // step * step
        lowest = 0 if window is None else rows.positions[part.start] - first_key - window + 1
        near = slice(max(shared, lowest), min(K, rows.positions[part.stop - 1] - first_key + 1))
        states: list[State] = []
        if shared:
            states.append(attend(q, k_BKGD[:, :shared], v_BKGD[:, :shared], rule=whole, offset=K))
        if near.start < near.stop:
            # Layers may lie on several devices.
            last_Q = rows.on_device[part].to(q.device) - (first_key + near.start)
            keys, values = k_BKGD[:, near], v_BKGD[:, near]
            states.append(_limited(q, keys, values, replace(rule, window=window), last_Q))
        parts.append(merge(states, dtype=rule.dtype))
    if stop < len(rows.positions):
        if window is None:
            parts.append(attend(q_BQHD[:, stop:], k_BKGD, v_BKGD, rule=whole, offset=K))
        else:
            add_empty(len(rows.positions) - stop)
    return join_rows(parts, dtype=rule.dtype)


def _limited(q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule, last_Q: Tensor) -> State:
    """Compute attention of rows that each see keys up to their own last one, in the window.

    Args:
        q_BQHD: queries.
        k_BKGD: keys.
        v_BKGD: values.
        rule: scale, window and softcap.
        last_Q: index of each row's last key; it may be outside of the keys at both ends.
    """
    if triton_works(q_BQHD.device):
        from star_attention.attention.kernels import triton_scattered

        if not triton_scattered.unsupported(call_of(q_BQHD, k_BKGD, v_BKGD, rule), v_BKGD.shape[3]):
            return triton_scattered.attend(q_BQHD, k_BKGD, v_BKGD, rule=rule, last_Q=last_Q)
    back_QK = last_Q[:, None] - torch.arange(k_BKGD.shape[1], device=q_BQHD.device)
    keep_QK = back_QK >= 0
    if rule.window is not None:
        keep_QK &= back_QK < rule.window
    return run(q_BQHD, k_BKGD, v_BKGD, rule=replace(rule, window=None), mask_BQK=keep_QK[None])
