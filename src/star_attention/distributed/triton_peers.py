"""Collectives of a few hundred kilobytes in Triton: each rank writes into the others' memory.

Every 32-bit word travels with the number of its exchange, in 64 bits, which arrive at once. So a
reader needs no flag next to the data and no fence: it reads until all its words carry the number of
the exchange under way (the protocol that NCCL calls LL).

A rank's buffer has two slots (even and odd exchanges) for each rank that writes, and in each slot a
region for each program. A program counts its own exchanges on the device, so that CUDA graphs can
replay them. Two slots are enough: a rank that writes exchange n has read words of exchange n - 1
from every rank, and a rank sends those after it has read exchange n - 2. That needs one thing: the
region of a program must be the same in every operation.

A rank that dies would keep the others reading for ever: while they wait, they look at a flag in
host memory (`peers.PeerGroup.abort`), and then continue with zeros.

Axes: H query heads, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from star_attention.attention.kernels import triton_pdl
from star_attention.attention.kernels.triton_new import rotated, tail_place
from star_attention.attention.kernels.triton_run import merged_tile
from star_attention.linear import triton_words

BLOCK = 512
"""Words of a program: two for each thread, 16 bytes with their numbers."""
WARPS = 8
REGION = BLOCK + 32
"""Words of a program's region: a merge has an lse more for each row."""
SPINS = 1 << 18
"""Reads of a waiting program between looks at the abort flag: 0.2 s.

A look is a read over PCIe, and hundreds of programs look at once: that takes 2 ms in all. Looks
after a shorter wait make this rank late for the next exchange, where the other one looks: two H200s
with 1,024 spent 2 ms in every exchange of some hundred kilobytes."""


@triton.jit
def _send(
    table, words, at, mask, rank, epoch, live,
    MASKED: tl.constexpr, SIZE: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """Write words into the other ranks' buffers."""
    numbered = (epoch.to(tl.int64) << 32) | (words.to(tl.int64) & 0xFFFFFFFF)
    slot = (rank * 2 + (epoch & 1)) * SLOT
    for r in tl.static_range(SIZE):
        if live & (r != rank):
            peer = tl.multiple_of(tl.load(table + r).to(tl.pointer_type(tl.int64)), 16)
            if MASKED:
                tl.store(peer + slot + at, numbered, mask=mask)
            else:
                tl.store(peer + slot + at, numbered)


@triton.jit
def _late(numbered, mask, epoch, MASKED: tl.constexpr):
    late = (numbered >> 32).to(tl.int32) != epoch
    if MASKED:
        late = late & mask
    return tl.max(late.to(tl.int32))


@triton.jit
def _is_aborted(table, at, SIZE: tl.constexpr):
    """Return what all threads of a program agree on, as each of them may read another flag.

    A wait has barriers in its loop, and so all threads have to leave it together.
    """
    flag = tl.load(table + SIZE).to(tl.pointer_type(tl.int32))
    return tl.max(tl.where(at >= 0, tl.load(flag, volatile=True), 0)) != 0


@triton.jit
def _arrived(
    table, at, mask, rank, r, epoch,
    MASKED: tl.constexpr, SIZE: tl.constexpr, SLOT: tl.constexpr, SPINS: tl.constexpr,
):  # fmt: skip
    """Return the words that arrive in this rank's buffer from rank r."""
    buffer = tl.multiple_of(tl.load(table + rank).to(tl.pointer_type(tl.int64)), 16)
    arriving = buffer + (r * 2 + (epoch & 1)) * SLOT + at
    numbered = tl.load(arriving, volatile=True)
    late = _late(numbered, mask, epoch, MASKED)
    spins = 0
    while late != 0:
        numbered = tl.load(arriving, volatile=True)
        late = _late(numbered, mask, epoch, MASKED)
        spins += 1
        if spins % SPINS == 0:
            aborted = _is_aborted(table, at, SIZE)
            if aborted:
                late = 0
                numbered = numbered * 0
    return numbered.to(tl.int32)


@triton.jit
def _receive(
    table, words, at, mask, rank, r, epoch, live,
    MASKED: tl.constexpr, SIZE: tl.constexpr, SLOT: tl.constexpr, SPINS: tl.constexpr,
):  # fmt: skip
    """Return the words of rank r, which arrive in this rank's buffer; `words` are its own."""
    if live & (r != rank):
        words = _arrived(table, at, mask, rank, r, epoch, MASKED, SIZE, SLOT, SPINS)
    return words


@triton.jit
def _late_state(numbered, numbered_lse, epoch):
    late = (numbered >> 32).to(tl.int32) != epoch
    late = late | ((numbered_lse >> 32).to(tl.int32) != epoch)
    return tl.max(late.to(tl.int32))


@triton.jit
def _receive_state(
    table, words, lse, at, lse_at, rank, r, epoch, live,
    SIZE: tl.constexpr, SLOT: tl.constexpr, SPINS: tl.constexpr,
):  # fmt: skip
    """Return the words of rank r and the lse of each, in one wait; see `_receive`.

    Each thread reads an lse next to each of its words, and whether one is late is found out of all
    of these. Were a row's lse one number, of which several threads read copies at different times,
    they could not agree when to go on.
    """
    if live & (r != rank):
        buffer = tl.multiple_of(tl.load(table + rank).to(tl.pointer_type(tl.int64)), 16)
        buffer += (r * 2 + (epoch & 1)) * SLOT
        numbered = tl.load(buffer + at, volatile=True)
        numbered_lse = tl.load(buffer + lse_at, volatile=True)
        late = _late_state(numbered, numbered_lse, epoch)
        spins = 0
        while late != 0:
            numbered = tl.load(buffer + at, volatile=True)
            numbered_lse = tl.load(buffer + lse_at, volatile=True)
            late = _late_state(numbered, numbered_lse, epoch)
            spins += 1
            if spins % SPINS == 0:
                aborted = _is_aborted(table, at, SIZE)
                if aborted:
                    late = 0
                    numbered = numbered * 0
                    numbered_lse = numbered_lse * 0
        words, lse = numbered.to(tl.int32), numbered_lse.to(tl.int32)
    return words.to(tl.float32, bitcast=True), lse.to(tl.float32, bitcast=True)


@triton.jit
def added_up(
    table, own, at, room, mask, rank, epoch, live,
    DTYPE: tl.constexpr, SENT: tl.constexpr, MASKED: tl.constexpr, SIZE: tl.constexpr,
    SLOT: tl.constexpr, SPINS: tl.constexpr,
):  # fmt: skip
    """Exchange words, and return the sums of their numbers in fp32, in the order of ranks.

    Words outside `mask` may be sent, if there is room for them, but are not waited for. `SENT` if
    this rank's words are on their way, to itself, too.
    """
    if not SENT:
        _send(table, own, at, room, rank, epoch, live, MASKED, SIZE, SLOT)
    # Of itself it then receives, too.
    sender = -1 if SENT else rank
    first, second = triton_words.numbers(own * 0, DTYPE)
    for r in tl.static_range(SIZE):
        words = own
        if live & (r != sender):
            words = _arrived(table, at, mask, rank, r, epoch, True, SIZE, SLOT, SPINS)
        more_first, more_second = triton_words.numbers(words, DTYPE)
        # Not beginning with 0, which makes 0 of -0.
        first = more_first if r == 0 else first + more_first
        second = more_second if r == 0 else second + more_second
    return first, second


@triton.jit(do_not_specialize=["rank", "n"])
def add_kernel(
    part_ptr, sum_ptr, table, epochs, rank, n,
    DTYPE: tl.constexpr, SIZE: tl.constexpr, SLOT: tl.constexpr, BLOCK: tl.constexpr,
    REGION: tl.constexpr, SPINS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add up the ranks' parts, as words of numbers (`triton_words`)."""
    triton_pdl.begin(PDL)
    pid = tl.program_id(0)
    epoch = tl.load(epochs + pid) + 1
    live = n > 0
    index = tl.arange(0, BLOCK)
    at = pid * BLOCK + index
    mask = at < n
    own = tl.load(part_ptr + at, mask=mask, other=0)
    first, second = added_up(
        table, own, pid * REGION + index, mask, mask, rank, epoch, live,
        DTYPE, False, False, SIZE, SLOT, SPINS,
    )  # fmt: skip
    tl.store(sum_ptr + at, triton_words.words_of(first, second, DTYPE), mask=mask)
    tl.store(epochs + pid, epoch, mask=live)


@triton.jit(do_not_specialize=["rank", "n"])
def copy_kernel(
    part_ptr, parts_ptr, table, epochs, rank, n,
    ROOT: tl.constexpr, SIZE: tl.constexpr, SLOT: tl.constexpr, BLOCK: tl.constexpr,
    REGION: tl.constexpr, SPINS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Copy the parts of all ranks next to each other, or that of rank `ROOT` alone."""
    triton_pdl.begin(PDL)
    pid = tl.program_id(0)
    epoch = tl.load(epochs + pid) + 1
    live = n > 0
    index = tl.arange(0, BLOCK)
    at = pid * BLOCK + index
    mask = at < n
    here = pid * REGION + index
    own = tl.load(part_ptr + at, mask=mask, other=0).to(tl.int32)
    _send(table, own, here, mask, rank, epoch, live, False, SIZE, SLOT)
    for r in tl.static_range(SIZE):
        words = _receive(table, own, here, mask, rank, r, epoch, live, False, SIZE, SLOT, SPINS)
        words = words.to(parts_ptr.dtype.element_ty)
        if ROOT < 0:
            tl.store(parts_ptr + r * n + at, words, mask=mask)
        elif ROOT == r:
            tl.store(parts_ptr + at, words, mask=mask)
    tl.store(epochs + pid, epoch, mask=live)


@triton.jit
def _as_words(x):
    """Return the bits of floating-point numbers, 32 of them at most."""
    if x.dtype.primitive_bitwidth == 16:
        return x.to(tl.int16, bitcast=True).to(tl.int32)
    else:
        return x.to(tl.int32, bitcast=True)


@triton.jit
def _from_words(words, DTYPE: tl.constexpr):
    if DTYPE.primitive_bitwidth == 16:
        return words.to(tl.int16).to(DTYPE, bitcast=True)
    else:
        return words.to(DTYPE, bitcast=True)


@triton.jit
def _own_head(
    x_ptr, cos_ptr, sin_ptr, at, token, queries, angles_r, angles_q, mask,
    D: tl.constexpr, ROTATED: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Load elements of this rank's queries or keys, rotated if they are to be."""
    if ROTATED:
        angles = token // queries * angles_r + token % queries * angles_q
        x = rotated(
            x_ptr, cos_ptr, sin_ptr, x_ptr, 0.0, at, angles, at % D, mask,
            ROTATED, E, D, False, 0.0,
        )  # fmt: skip
        x = x.to(x_ptr.dtype.element_ty)
    else:
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
    # Words of other parts are added: outside of the mask not even a sign may be left.
    return tl.where(mask, _as_words(x), 0)


@triton.jit(do_not_specialize=["rank", "rows", "first"])
def heads_kernel(
    q_ptr, k_ptr, v_ptr, all_q_ptr, all_k_ptr, all_v_ptr, table, epochs, rank, rows, queries,
    cos_ptr, sin_ptr, angles_r, angles_q, addresses_ptr, numbers_ptr, first,
    WIDTH_Q: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, D: tl.constexpr,
    ROTATED: tl.constexpr, E: tl.constexpr, STORED: tl.constexpr, BY_ROW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr, SLOT: tl.constexpr, BLOCK: tl.constexpr, REGION: tl.constexpr,
    SPINS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Copy the heads of all ranks next to each other, in the order of ranks.

    A row is one token; a rank's heads of it are `WIDTH_Q`, `WIDTH_K` and `WIDTH_V` elements. If
    they are `STORED`, keys and values go to the tails instead (`triton_new.tail_place`).
    """
    triton_pdl.begin(PDL)
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    pid = tl.program_id(0)
    epoch = tl.load(epochs + pid) + 1
    live = rows > 0
    index = tl.arange(0, BLOCK)
    at = pid * BLOCK + index
    mask = at < rows * (WIDTH_Q + WIDTH_K + WIDTH_V)
    # Queries come first, then keys, then values.
    at_k = at - rows * WIDTH_Q
    at_v = at_k - rows * WIDTH_K
    is_q, is_v = mask & (at_k < 0), mask & (at_v >= 0)
    is_k = mask & (at_k >= 0) & (at_v < 0)
    token_k, token_v = at_k // WIDTH_K, at_v // WIDTH_V
    own = _own_head(
        q_ptr, cos_ptr, sin_ptr, at, at // WIDTH_Q, queries, angles_r, angles_q, is_q,
        D, ROTATED, E,
    )  # fmt: skip
    own += _own_head(
        k_ptr, cos_ptr, sin_ptr, at_k, token_k, queries, angles_r, angles_q, is_k, D, ROTATED, E
    )
    own += _as_words(tl.load(v_ptr + at_v, mask=is_v, other=0.0))
    here = pid * REGION + index
    _send(table, own, here, mask, rank, epoch, live, False, SIZE, SLOT)
    # Where the first rank's word goes.
    to_q = at // WIDTH_Q * (WIDTH_Q * SIZE) + at % WIDTH_Q
    if STORED:
        stored = is_k | is_v
        token = tl.where(stored, tl.where(is_k, token_k, token_v), 0)
        inside = tl.where(is_k, at_k % WIDTH_K, at_v % WIDTH_V)
        pair_ptr, place, capacity, fits = tail_place(
            addresses_ptr, numbers_ptr, first, token // queries, token % queries, KV_HEADS, BY_ROW
        )
        tail = tl.load(pair_ptr + tl.where(is_v, 1, 0), mask=stored, other=0)
        tail_ptr = tail.to(tl.pointer_type(DTYPE)) + inside % D
        stored = stored & fits
    else:
        to_k = token_k * (WIDTH_K * SIZE) + at_k % WIDTH_K
        to_v = token_v * (WIDTH_V * SIZE) + at_v % WIDTH_V
    for r in tl.static_range(SIZE):
        words = _receive(table, own, here, mask, rank, r, epoch, live, False, SIZE, SLOT, SPINS)
        x = _from_words(words, DTYPE)
        tl.store(all_q_ptr + to_q + r * WIDTH_Q, x, mask=is_q)
        if STORED:
            g = inside // D + r * (WIDTH_K // D)
            tl.store(tail_ptr + (place + g * capacity) * D, x, mask=stored)
        else:
            tl.store(all_k_ptr + to_k + r * WIDTH_K, x, mask=is_k)
            tl.store(all_v_ptr + to_v + r * WIDTH_V, x, mask=is_v)
    tl.store(epochs + pid, epoch, mask=live)


@triton.jit(do_not_specialize=["rank", "total", "first", "wanted", "runs", "tails_at"])
def merge_kernel(
    out_ptr, lse_ptr, rows_ptr, merged_ptr, merged_lse_ptr, table, epochs,
    rank, total, first, wanted, runs, tails_at,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    ROW_COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr, SLOT: tl.constexpr, REGION: tl.constexpr, SPINS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Merge the ranks' states in the order of ranks, and keep the wanted heads.

    A row is one head of one query; a program has `BLOCK_D` elements of `ROWS` of them, and in its
    region these, row by row, before each row's lse. With a `BLOCK_S`, this rank's part are runs,
    which are merged first (`triton_run.merged_tile`).
    """
    triton_pdl.begin(PDL)
    pid = tl.program_id(0)
    epoch = tl.load(epochs + pid) + 1
    live = total > 0
    PARTS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    index = tl.arange(0, ROWS)
    row = pid // PARTS * ROWS + index
    inside = row < total
    d = pid % PARTS * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :]
    if BLOCK_S:
        own, own_lse = merged_tile(
            out_ptr, lse_ptr, rows_ptr, row, inside, d, runs, tails_at,
            HEADS, KV_HEADS, D, TILE, ROW_COLUMNS, BLOCK_D, BLOCK_S,
        )  # fmt: skip
    else:
        place = row.to(tl.int64)[:, None] * D + d[None, :]
        own = tl.load(out_ptr + place, mask=mask, other=0.0).to(tl.float32)
        own_lse = tl.load(lse_ptr + row, mask=inside, other=float("-inf"))
    own = own.to(tl.int32, bitcast=True)
    own_lse = own_lse.to(tl.int32, bitcast=True)
    column = tl.arange(0, BLOCK_D)[None, :]
    here = pid * REGION + index[:, None] * BLOCK_D + column
    lse_here = pid * REGION + ROWS * BLOCK_D + index
    _send(table, own, here, mask, rank, epoch, live, False, SIZE, SLOT)
    _send(table, own_lse, lse_here, inside, rank, epoch, live, False, SIZE, SLOT)
    # From here on each element has a copy of its row's lse.
    own_lse, lse_here = own_lse[:, None] + column * 0, lse_here[:, None] + column * 0
    top = tl.full([ROWS, BLOCK_D], float("-inf"), tl.float32)
    weights = tl.zeros([ROWS, BLOCK_D], tl.float32)
    out = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for r in tl.static_range(SIZE):
        part, lse = _receive_state(
            table, own, own_lse, here, lse_here, rank, r, epoch, live, SIZE, SLOT, SPINS
        )
        higher = tl.maximum(top, lse)
        # Rows without keys: -inf - -inf is NaN.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        before, now = tl.exp(top - safe), tl.exp(lse - safe)
        out = out * before + part * now
        weights = weights * before + now
        top = higher
    weights = tl.where(weights > 0.0, weights, 1.0)
    head = row % HEADS - first
    keep = (inside & (head >= 0) & (head < wanted))[:, None]
    target = (row // HEADS * wanted + head)[:, None]
    tl.store(merged_ptr + target.to(tl.int64) * D + d[None, :], out / weights, mask=mask & keep)
    # The first element of a row writes its lse.
    tl.store(
        merged_lse_ptr + target + column * 0, top + tl.log(weights), mask=keep & (d == 0)[None, :]
    )
    tl.store(epochs + pid, epoch, mask=live)
