"""The sum of a single row over ranks together with what follows it, in one program.

It sends and reads the words of `triton_peers.add_kernel` in the same regions, so that other ranks
may run that one instead. A norm needs the whole row: with several programs each would need the
words of all. So one program reads them and counts the exchanges of all regions that they lie in.
That keeps the order on which two slots rest (`triton_peers`): nothing of an exchange is sent before
the kernel before has ended (`triton_pdl.begin`), which has read the exchange before in every region
that it counts, and the program ends when it has read all words of its own. No program reads a
count that another one changes: launches follow one another.

`product_kernel` makes the words itself and sends each as soon as it is there, to its own rank, too.
Then the row's program need not wait for the end of that kernel: it begins when all of its programs
have (`triton_pdl`), after everything before them has ended, and all that they do is done when their
words have arrived: they have read what they read, the counts included, and written nothing else.
"""

from __future__ import annotations

import triton
import triton.language as tl

from star_attention.attention.kernels import triton_pdl
from star_attention.distributed.triton_peers import added_up
from star_attention.linear import triton_row, triton_words
from star_attention.linear.triton_norm import finish


@triton.jit(do_not_specialize=["rank", "live"])
def row_kernel(
    part_ptr, add_ptr, post_ptr, pre_ptr, sum_ptr, out_ptr, K, times, post_eps, pre_eps,
    table, epochs, rank, words, live,
    SENT: tl.constexpr, REGIONS: tl.constexpr, GAPS: tl.constexpr,
    POST: tl.constexpr, ADD: tl.constexpr, PRE: tl.constexpr,
    POST_OFFSET: tl.constexpr, PRE_OFFSET: tl.constexpr, DTYPE: tl.constexpr,
    SIZE: tl.constexpr, SLOT: tl.constexpr, BLOCK: tl.constexpr, REGION: tl.constexpr,
    SPINS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add up the ranks' rows and round the sum; then see `triton_norm.RowNorms`.

    `SENT` if `product_kernel` was launched before.
    """
    region = tl.arange(0, REGIONS)
    index = tl.arange(0, BLOCK)
    regions = tl.cdiv(words, BLOCK)
    used = region < regions
    at = region[:, None] * BLOCK + index[None, :]
    mask = at < words
    # Neither weights nor the table depend on the kernel before.
    post = tl.load(post_ptr + at, mask=mask, other=0) if POST else at
    pre = tl.load(pre_ptr + at, mask=mask, other=0) if PRE else at
    # Addresses are never 0: this brings the table near before it is needed.
    live = (live != 0) & (tl.load(table + rank) != 0)
    if SENT:
        triton_pdl.go_on(PDL)
    else:
        triton_pdl.begin(PDL)
    # Without a wait nothing drops what the L1 cache holds of earlier kernels: volatile loads do not
    # look there.
    epoch = tl.load(epochs + region, mask=used, other=0, volatile=SENT) + 1
    own = at * 0 if SENT else tl.load(part_ptr + at, mask=mask, other=0)
    added = tl.load(add_ptr + at, mask=mask, other=0, volatile=SENT) if ADD else at
    first, second = added_up(
        table, own, region[:, None] * REGION + index[None, :], used[:, None], mask, rank,
        epoch[:, None], live, DTYPE, SENT, GAPS, SIZE, SLOT, SPINS,
    )  # fmt: skip
    # Words after the row are those of exchanges before, where nobody sends others.
    total = tl.where(mask, triton_words.words_of(first, second, DTYPE), 0)
    first, second = triton_words.numbers(total, DTYPE)
    finish(
        first, second, added, post, pre, sum_ptr, out_ptr, at, mask, K, times, post_eps, pre_eps,
        POST, ADD, PRE, POST_OFFSET, PRE_OFFSET, DTYPE,
    )  # fmt: skip
    tl.store(epochs + region, epoch, mask=region < tl.where(live, regions, 0))


@triton.jit(do_not_specialize=["rank", "live"])
def product_kernel(
    x_ptr, K, w_ptr, bias_ptr, scale_ptr, N, stride, table, epochs, rank, live,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr,
    STEPS: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, DTYPE: tl.constexpr,
    SIZE: tl.constexpr, SLOT: tl.constexpr, BLOCK: tl.constexpr, REGION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Multiply a row in half precision as `triton_row` does, and send the words of the result."""
    HALF: tl.constexpr = ROWS // 2
    pid = tl.program_id(0)
    # As in `row_kernel`.
    live = (live != 0) & (tl.load(table + rank) != 0)
    # Rows beyond the last one are the last one again.
    n = tl.minimum(pid * ROWS + tl.arange(0, ROWS), N - 1)
    out_N = triton_row.products(n, 0, stride, x_ptr, w_ptr, K, BLOCK_K, EVEN, AHEAD, STEPS, PDL)
    if SCALE:
        out_N *= tl.load(scale_ptr + n)
    if BIAS:
        out_N += tl.load(bias_ptr + n).to(tl.float32)
    first, second = tl.split(tl.reshape(out_N, (HALF, 2)))
    words = triton_words.words_of(first, second, DTYPE).to(tl.int64) & 0xFFFFFFFF
    word = pid * HALF + tl.arange(0, HALF)
    mask = word < N // 2
    epoch = tl.load(epochs + word // BLOCK, mask=mask, other=0) + 1
    at = (rank * 2 + (epoch & 1)) * SLOT + word // BLOCK * REGION + word % BLOCK
    for r in tl.static_range(SIZE):
        if live:
            peer = tl.load(table + r).to(tl.pointer_type(tl.int64))
            tl.store(peer + at, (epoch.to(tl.int64) << 32) | words, mask=mask)
