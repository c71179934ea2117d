"""What surrounds the attention of a single token to MLA's compressed keys, in Triton.

`attention.latent.Expansion` has the same products. A launch absorbs the query and stores the new
key, after their rotary embeddings and its norm if they come without (`hf.execution.latent_token`);
another one expands the result. Both read their weights while the kernel before ends.

Axes: H query heads, N elements of a query without rotation, V values of a head, X rows of a head's
weight (N + V), C compressed size, P rotary size, E elements of an absorbed query (C + P).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_attention.attention.attend import Rule
from star_attention.attention.kernels import triton_latent, triton_pdl
from star_attention.attention.kernels.triton_answer import COLUMNS, KVTables
from star_attention.attention.latent import Expansion
from star_attention.attention.rotation import Rotation
from star_attention.attention.state import State

_ABSORBED = 64
"""Elements of an absorbed query that a program computes."""
_STEP: tl.constexpr = tl.constexpr(64)
"""Keys of a step of that kernel."""
FETCHED = 128
"""Keys of each run of the context that are on the way to the L2 cache meanwhile, at most."""
_EXPANDED = 8
"""Elements of a result that a program computes."""


@triton.jit
def _fetch_run(
    address_ptr, tokens, runs, fetched,
    C_BYTES: tl.constexpr, P_BYTES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fetch the first keys of a run of the context, which the next kernel attends to."""
    length = tl.cdiv(tl.cdiv(tokens, runs), _STEP) * _STEP
    start = tl.program_id(0) * length
    keys = tl.minimum(tl.minimum(length, fetched), tokens - start)
    if keys > 0:
        c, r = tl.load(address_ptr), tl.load(address_ptr + 1)
        # Only memory at a multiple of 16 bytes can be fetched.
        if (c % 16 == 0) & (r % 16 == 0):
            triton_pdl.fetch(c + start.to(tl.int64) * C_BYTES, keys * C_BYTES, PDL)
            triton_pdl.fetch(r + start.to(tl.int64) * P_BYTES, keys * P_BYTES, PDL)


@triton.jit
def _rotated(
    x_ptr, cos_ptr, sin_ptr, angle, out_ptr,
    P: tl.constexpr, BLOCK_P: tl.constexpr, ANGLES: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Copy the rotary part of a query or a key, rotated if there are `ANGLES` (`Rotation`)."""
    if ANGLES:
        i = tl.arange(0, BLOCK_P // 2)
        mask = i < P // 2
        first = 2 * i if PAIRS else i
        second = 2 * i + 1 if PAIRS else i + P // 2
        of_first = first if ANGLES == P else i
        of_second = second if ANGLES == P else i
        cos_a = tl.load(cos_ptr + of_first * angle, mask=mask, other=0.0).to(tl.float32)
        sin_a = tl.load(sin_ptr + of_first * angle, mask=mask, other=0.0).to(tl.float32)
        cos_b = tl.load(cos_ptr + of_second * angle, mask=mask, other=0.0).to(tl.float32)
        sin_b = tl.load(sin_ptr + of_second * angle, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(x_ptr + first, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + second, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + first, a * cos_a - b * sin_a, mask=mask)
        tl.store(out_ptr + second, b * cos_b + a * sin_b, mask=mask)
    else:
        p = tl.arange(0, BLOCK_P)
        tl.store(out_ptr + p, tl.load(x_ptr + p, mask=p < P), mask=p < P)


@triton.jit
def _absorb(
    q_ptr, weight_ptr, c_ptr, r_ptr, norm_ptr, cos_ptr, sin_ptr, table_ptr, lengths_ptr, out_ptr,
    layer, q_head, weight_head, angle, runs, fetched, eps,
    HEADS: tl.constexpr, N: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    STORED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr, ANGLES: tl.constexpr,
    PAIRS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (C + BLOCK_E - 1) // BLOCK_E
    head, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    table_ptr += layer * COLUMNS
    if head < HEADS:
        n, c = tl.arange(0, BLOCK_N), part * BLOCK_E + tl.arange(0, BLOCK_E)
        inside = (n < N)[:, None] & (c < C)[None, :]
        weight_ptr += head * weight_head
        # On their way first: addresses come one after the other, and would be waited for.
        weight_NC = tl.load(weight_ptr + n[:, None] * C + c[None, :], mask=inside, other=0.0)
        if PDL:
            _fetch_run(
                table_ptr, tl.load(lengths_ptr).to(tl.int32), runs, fetched,
                C * STORED, P * STORED, PDL,
            )  # fmt: skip
        triton_pdl.begin(PDL)
        q_ptr += head * q_head
        out_ptr += head * (C + P)
        q_N = tl.load(q_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        if part == 0:
            _rotated(q_ptr + N, cos_ptr, sin_ptr, angle, out_ptr + C, P, BLOCK_P, ANGLES, PAIRS)
        tl.store(out_ptr + c, tl.sum(weight_NC.to(tl.float32) * q_N[:, None], 0), mask=c < C)
    else:
        DTYPE: tl.constexpr = c_ptr.dtype.element_ty
        every = tl.arange(0, BLOCK_C)
        slot = tl.load(lengths_ptr + 1)
        c_out_ptr = tl.load(table_ptr + 2).to(tl.pointer_type(DTYPE)) + slot * C
        r_out_ptr = tl.load(table_ptr + 3).to(tl.pointer_type(DTYPE)) + slot * P
        if NORM:
            norm_C = tl.load(norm_ptr + every, mask=every < C, other=0.0).to(tl.float32)
        triton_pdl.begin(PDL)
        c_C = tl.load(c_ptr + every, mask=every < C, other=0.0)
        if NORM:
            wide_C = c_C.to(tl.float32)
            factor = tl.math.rsqrt(tl.sum(wide_C * wide_C) / C + eps)
            c_C = (wide_C * factor * norm_C).to(DTYPE)
        tl.store(c_out_ptr + every, c_C, mask=every < C)
        _rotated(r_ptr, cos_ptr, sin_ptr, angle, r_out_ptr, P, BLOCK_P, ANGLES, PAIRS)


@triton.jit
def _expand(
    mean_ptr, weight_ptr, out_ptr, weight_head,
    N: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    v = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    inside = (v < V)[:, None] & (c < C)[None, :]
    weight_ptr += head * weight_head + N * C
    weight_VC = tl.load(weight_ptr + v[:, None] * C + c[None, :], mask=inside, other=0.0)
    triton_pdl.begin(PDL)
    mean_C = tl.load(mean_ptr + head * C + c, mask=c < C, other=0.0)
    tl.store(out_ptr + head * V + v, tl.sum(weight_VC.to(tl.float32) * mean_C, 1), mask=v < V)


def attend(
    q_11HD: Tensor,
    new: tuple[Tensor, Tensor],
    expansion: Expansion,
    *,
    tables: KVTables,
    layer: int,
    rule: Rule,
    fp8: bool = False,
    norm: tuple[Tensor, float] | None = None,
) -> State:
    """Store a token's key, and compute its attention, as `triton_latent` does for several tokens.

    Args:
        q_11HD: its queries, for expanded keys.
        new: what is compressed and the rotary part of its key, `c_111C` and `r_111P`.
        expansion: the weights.
        tables: where context and tail are, which has room for the key.
        layer: row of the addresses.
        rule: the scale, the result's precision, fp32 by default, and the rotation of the rotary
            parts, which are rotated already without one; no window and no softcap.
        fp8: True if the context is in e4m3 with scales.
        norm: weight and epsilon of the RMS norm of what is compressed, which has it already
            without them.

    Returns:
        The state over expanded values.
    """
    q_11HE = absorb(
        q_11HD, new, expansion, tables=tables, layer=layer, fp8=fp8, norm=norm,
        rotation=rule.rotation,
    )  # fmt: skip
    C = expansion.weight_HXC.shape[2]
    mean_11HC, lse_11H = triton_latent.attend(
        q_11HE, C, tables=tables, layer=layer, rule=rule, fp8=fp8
    )
    return State(expand(mean_11HC, expansion, rule.dtype or torch.float32), lse_11H)


def absorb(
    q_11HD: Tensor,
    new: tuple[Tensor, Tensor],
    expansion: Expansion,
    *,
    tables: KVTables,
    layer: int,
    fp8: bool = False,
    norm: tuple[Tensor, float] | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Return a token's queries for compressed keys, `[1, 1, H, E]`, and store its own key.

    Arguments as of `attend`.
    """
    c_111C, r_111P = (t if t.stride(3) == 1 else t.contiguous() for t in new)
    q_11HD = q_11HD if q_11HD.stride(3) == 1 else q_11HD.contiguous()
    (H, D), C, P = q_11HD.shape[2:], c_111C.shape[3], r_111P.shape[3]
    weight_HXC, N = expansion.weight_HXC, expansion.plain_size
    assert D == N + P, f"expected queries of {N + P} elements, got {D}"
    out_11HE = q_11HD.new_empty(1, 1, H, C + P)
    stored = 1 if fp8 else q_11HD.element_size()
    # Of other sizes, keys do not begin where memory can be fetched.
    fetched = 0 if C * stored % 16 or P * stored % 16 else FETCHED
    weight_C, eps = norm or (c_111C, 0.0)
    cos = sin = c_111C
    if rotation is not None:
        cos, sin = rotation.cos_RQE, rotation.sin_RQE
        sin = sin if sin.stride(2) == cos.stride(2) else sin.contiguous()
        cos = cos if sin.stride(2) == cos.stride(2) else cos.contiguous()
    _absorb[(H * triton.cdiv(C, _ABSORBED) + 1,)](
        q_11HD, weight_HXC, c_111C, r_111P, weight_C, cos, sin,
        tables.addresses, tables.lengths[0], out_11HE, layer,
        q_11HD.stride(2), weight_HXC.stride(0), cos.stride(2), triton_latent.SPLITS, fetched, eps,
        HEADS=H, N=N, C=C, P=P, STORED=stored,
        BLOCK_N=triton.next_power_of_2(N), BLOCK_E=_ABSORBED,
        BLOCK_C=triton.next_power_of_2(C), BLOCK_P=triton.next_power_of_2(P),
        COLUMNS=COLUMNS, NORM=norm is not None,
        ANGLES=0 if rotation is None else cos.shape[2],
        PAIRS=rotation is not None and rotation.pairs,
        num_warps=4, **triton_pdl.options(q_11HD.device),
    )  # fmt: skip
    return out_11HE


def expand(mean_11HC: Tensor, expansion: Expansion, dtype: torch.dtype) -> Tensor:
    """Return a token's results in a precision, `[1, 1, H, V]`, of those over compressed values."""
    weight_HXC, N = expansion.weight_HXC, expansion.plain_size
    H, X, C = weight_HXC.shape
    out_11HV = mean_11HC.new_empty(1, 1, H, X - N, dtype=dtype)
    _expand[(triton.cdiv(X - N, _EXPANDED), H)](
        mean_11HC.contiguous(), weight_HXC, out_11HV, weight_HXC.stride(0),
        N=N, V=X - N, C=C, ROWS=_EXPANDED, BLOCK_C=triton.next_power_of_2(C),
        num_warps=4, **triton_pdl.options(mean_11HC.device),
    )  # fmt: skip
    return out_11HV
