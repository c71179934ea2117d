"""Attention over a run of keys: one entry point, masks by position, any kernel.

Axes: B batch, Q queries, K keys, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from star_attention.attention import kernels
from star_attention.attention.kernels import Call
from star_attention.attention.rotation import Rotation
from star_attention.attention.state import State, empty_state, merge

_MASK_ROWS = 512
"""Query rows of one call with an explicit mask: more waste scores, fewer need more calls."""
_PACKED_ROWS = 256
"""Query rows of one KV head, at most, that are packed into one call on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One layer's rule of attention.

    Attributes:
        scale: factor of the scores.
        window: sliding window in tokens, None for full attention.
        softcap: softcap of the scores, None for none.
        dtype: precision to which results may be rounded in their last merge; None for fp32, where
            they are merged further.
        sink_H: the learned sink of each query head as a score, which the caller adds to the result
            (`state.add_sink`); None for none.
        rotation: rotary embeddings of queries and keys, with the norms before them, that the
            layer is still to compute, and to store the keys; None if the model did. Only for layers
            that say so (`StarCache.rotates`, `StarCache.finishes_latents`).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype | None = None
    sink_H: Tensor | None = None
    rotation: Rotation | None = None


def attend(
    q_BQHD: Tensor,
    k_BKGD: Tensor,
    v_BKGD: Tensor,
    *,
    rule: Rule,
    offset: int,
    key_mask_BK: Tensor | None = None,
    kernel: str | None = None,
) -> State:
    """Compute attention of Q consecutive queries over K consecutive keys.

    Query i is `offset + i` tokens after key 0. It sees the keys j <= `offset + i` in the window.

    Args:
        q_BQHD: queries.
        k_BKGD: keys; H is a multiple of G.
        v_BKGD: values; their head size may differ from that of the keys.
        rule: scale, window and softcap.
        offset: position of query 0 relative to key 0, in tokens.
        key_mask_BK: bool, False for keys that nobody sees (padding).
        kernel: name of the kernel to use, None for the first that can run the call.

    Returns:
        The state over these keys; the empty state in rows that see none of them.

    Raises:
        UnsupportedCallError: no kernel, or not the requested one, can run the call.
    """
    Q, K = q_BQHD.shape[1], k_BKGD.shape[1]
    window = rule.window
    # Keys that no row sees are cut off at both ends.
    last = min(K, offset + Q)
    first = 0 if window is None else max(0, offset - window + 1)
    if first >= last:
        return empty_state(q_BQHD.shape[0], Q, q_BQHD.shape[2], v_BKGD.shape[3], q_BQHD.device)
    if first > 0 or last < K:
        k_BKGD, v_BKGD = k_BKGD[:, first:last], v_BKGD[:, first:last]
        key_mask_BK = None if key_mask_BK is None else key_mask_BK[:, first:last]
        offset, K = offset - first, last - first
    if window is not None and offset + Q <= window:
        # Even the last row reaches the first key.
        window = None
    # With a negative offset some rows have no keys, which takes a mask.
    if key_mask_BK is None and offset >= 0:
        if window is None:
            if offset >= K - 1:
                return run(q_BQHD, k_BKGD, v_BKGD, rule=rule, causal=False, kernel=kernel)
            if offset + Q == K:
                if offset == 0:
                    return run(q_BQHD, k_BKGD, v_BKGD, rule=rule, causal=True, kernel=kernel)
                before = run(
                    q_BQHD,
                    k_BKGD[:, :offset],
                    v_BKGD[:, :offset],
                    rule=rule,
                    causal=False,
                    kernel=kernel,
                )
                within = run(
                    q_BQHD,
                    k_BKGD[:, offset:],
                    v_BKGD[:, offset:],
                    rule=rule,
                    causal=True,
                    kernel=kernel,
                )
                return merge([before, within])
        elif offset + Q == K and kernels.find(
            call_of(q_BQHD, k_BKGD, v_BKGD, rule, causal=True, window=window), kernel
        ):
            return run(q_BQHD, k_BKGD, v_BKGD, rule=rule, causal=True, window=window, kernel=kernel)
    return _attend_masked(q_BQHD, k_BKGD, v_BKGD, rule, offset, window, key_mask_BK, kernel)


def call_of(q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule, **mask: Any) -> Call:
    """Return the shape of a call with these tensors."""
    return Call(
        device=q_BQHD.device.type,
        dtype=q_BQHD.dtype,
        queries=q_BQHD.shape[1],
        keys=k_BKGD.shape[1],
        heads=q_BQHD.shape[2],
        kv_heads=k_BKGD.shape[2],
        head_size=q_BQHD.shape[3],
        softcap=rule.softcap,
        **mask,
    )


def _widen(x: Tensor, size: int) -> Tensor:
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


def run(
    q_BQHD: Tensor,
    k_BKGD: Tensor,
    v_BKGD: Tensor,
    *,
    rule: Rule,
    causal: bool = False,
    window: int | None = None,
    mask_BQK: Tensor | None = None,
    kernel: str | None = None,
) -> State:
    """Compute attention in one call of a kernel; arguments as for `attend` and `Call`.

    Raises:
        UnsupportedCallError: no kernel, or not the requested one, can run the call.
    """
    Q, D = q_BQHD.shape[1], q_BQHD.shape[3]
    G, v_size = k_BKGD.shape[2], v_BKGD.shape[3]
    packed = _is_packed(q_BQHD, G) and not causal and mask_BQK is None
    if packed:
        q_BQHD = _packed(q_BQHD, G)
    # Kernels take one head size. Where keys and values differ (MLA), zeros pad the shorter ones.
    size = max(D, v_size)
    q_BQHD, k_BKGD, v_BKGD = (_widen(t, size) for t in (q_BQHD, k_BKGD, v_BKGD))
    call = call_of(
        q_BQHD, k_BKGD, v_BKGD, rule, causal=causal, window=window, masked=mask_BQK is not None
    )
    name = kernels.choose(call, kernel)
    state = kernels.load(name).attend(
        q_BQHD, k_BKGD, v_BKGD, call=call, scale=rule.scale, mask_BQK=mask_BQK
    )
    state = State(state.out_BQHD[..., :v_size], state.lse_BQH)
    return _unpacked(state, Q) if packed else state


def _is_packed(q_BQHD: Tensor, kv_heads: int) -> bool:
    """True if heads that share a KV head become rows of one head, so that its keys are read once.

    On a CPU, attention of few rows to many keys spends its time on reading keys.
    """
    group = q_BQHD.shape[2] // kv_heads
    return group > 1 and q_BQHD.shape[1] * group <= _PACKED_ROWS and q_BQHD.device.type == "cpu"


def _packed(q_BQHD: Tensor, kv_heads: int) -> Tensor:
    B, Q, H, D = q_BQHD.shape
    q_BQGRD = q_BQHD.reshape(B, Q, kv_heads, H // kv_heads, D)
    return q_BQGRD.transpose(2, 3).reshape(B, -1, kv_heads, D)


def _unpacked(state: State, queries: int) -> State:
    B, _, G, D = state.out_BQHD.shape
    out_BQRGD = state.out_BQHD.reshape(B, queries, -1, G, D)
    lse_BQRG = state.lse_BQH.reshape(B, queries, -1, G)
    return State(
        out_BQRGD.transpose(2, 3).reshape(B, queries, -1, D),
        lse_BQRG.transpose(2, 3).reshape(B, queries, -1),
    )


def attend_padded(
    q_B1HD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, *, rule: Rule, mask_BK: Tensor | None
) -> State:
    """Compute attention of one query per row over keys of its own, of which a mask leaves some.

    Args:
        q_B1HD: queries.
        k_BKGD: keys of each row.
        v_BKGD: values of each row.
        rule: scale and softcap.
        mask_BK: bool, False for keys that the row's query does not see; None if it sees all.
    """
    G = k_BKGD.shape[2]
    if mask_BK is None or not _is_packed(q_B1HD, G):
        mask_B1K = None if mask_BK is None else mask_BK[:, None]
        return run(q_B1HD, k_BKGD, v_BKGD, rule=rule, mask_BQK=mask_B1K)
    q_BMGD = _packed(q_B1HD, G)
    mask_BMK = mask_BK[:, None].expand(-1, q_BMGD.shape[1], -1)
    return _unpacked(run(q_BMGD, k_BKGD, v_BKGD, rule=rule, mask_BQK=mask_BMK), 1)


def _attend_masked(
    q_BQHD: Tensor,
    k_BKGD: Tensor,
    v_BKGD: Tensor,
    rule: Rule,
    offset: int,
    window: int | None,
    key_mask_BK: Tensor | None,
    kernel: str | None,
) -> State:
    """Attention with an explicit mask, some rows at a time, over the keys that they can see."""
    Q, K = q_BQHD.shape[1], k_BKGD.shape[1]
    parts, device = [], q_BQHD.device
    for row in range(0, Q, _MASK_ROWS):
        stop = min(row + _MASK_ROWS, Q)
        first = 0 if window is None else max(0, offset + row - window + 1)
        last = min(K, offset + stop)
        if first >= last:
            parts.append(
                empty_state(q_BQHD.shape[0], stop - row, q_BQHD.shape[2], v_BKGD.shape[3], device)
            )
            continue
        ahead_QK = (
            torch.arange(row, stop, device=device)[:, None]
            + offset
            - torch.arange(first, last, device=device)[None]
        )
        keep_BQK = (
            (ahead_QK >= 0)[None]
            if window is None
            else ((ahead_QK >= 0) & (ahead_QK < window))[None]
        )
        if key_mask_BK is not None:
            keep_BQK = keep_BQK & key_mask_BK[:, None, first:last]
        parts.append(
            run(
                q_BQHD[:, row:stop],
                k_BKGD[:, first:last],
                v_BKGD[:, first:last],
                rule=rule,
                mask_BQK=keep_BQK,
                kernel=kernel,
            )
        )
    if len(parts) == 1:
        return parts[0]
    return State(
        torch.cat([p.out_BQHD for p in parts], 1), torch.cat([p.lse_BQH for p in parts], 1)
    )
