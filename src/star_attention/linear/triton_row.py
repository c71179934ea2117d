"""Matrices times a single row, in Triton, and the operation for that and for a few rows.

In the shapes of an 8B model's layers, cuBLAS multiplies a single token at 0.44 to 0.83 of an H200's
memory bandwidth, this kernel at 0.71 to 0.94 (bench/results/2026-11-26-h200.md). With much larger
matrices cuBLAS is as fast. A few rows are multiplied by `triton_few`.
Matrices in fp8 (`linear.fp8`) have a scale a row, which its sum is multiplied with;
`triton_row_fp8` reads most of them, at 0.64 to 0.80 of the bandwidth
(bench/results/2026-11-30-h200.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional

from star_attention.attention.kernels import triton_pdl
from star_attention.linear import is_one_token, triton_few, triton_row_fp8
from star_attention.linear.triton_few import MAX_MATRICES, Product

_TILES = {1: (8, 512), 2: (1, 1024), 4: (1, 1024)}
"""Rows of a matrix that a program sums, and their elements that it reads at once, by the bytes of
an element. In fp8 rows share the loads of `x`, which has twice their bytes; most rows in fp8 are
read by `triton_row_fp8`."""
_TILE_OF_FEW = (8, 1024)
"""The same in fp8 where all matrices of a launch have up to `_FEW` rows: few programs need more
bytes on the way each."""
_FEW = 4096


@triton.jit
def _sums(
    at_N, x_ptr, w_ptr, K,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Return the sums of rows, each `at_N` elements after `w_ptr`."""
    k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + at_N[:, None] + k[None, :]
    # Weights do not depend on the kernel before: the first ones are read while it ends.
    w_NK = tl.load(w_ptrs) if EVEN else tl.load(w_ptrs, mask=(k < K)[None, :], other=0.0)
    triton_pdl.begin(PDL)
    x_K = tl.load(x_ptr + k) if EVEN else tl.load(x_ptr + k, mask=k < K, other=0.0)
    sum_NK = w_NK.to(tl.float32) * x_K.to(tl.float32)[None, :]
    for start in range(BLOCK_K, K, BLOCK_K):
        if EVEN:
            w_NK = tl.load(w_ptrs + start)
            x_K = tl.load(x_ptr + start + k)
        else:
            inside = start + k < K
            w_NK = tl.load(w_ptrs + start, mask=inside[None, :], other=0.0)
            x_K = tl.load(x_ptr + start + k, mask=inside, other=0.0)
        sum_NK += w_NK.to(tl.float32) * x_K.to(tl.float32)[None, :]
    return tl.sum(sum_NK, 1)


@triton.jit
def products(
    n, second, stride, x_ptr, w_ptr, K,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr, STEPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Return the products of `x` and rows `n`, each `second` elements later."""
    if AHEAD:
        at_N = n.to(tl.int64) * (stride // 4) + second // 4
        return triton_row_fp8.sums(at_N, x_ptr, w_ptr, K, BLOCK_K, AHEAD, STEPS, PDL)
    else:
        at_N = n.to(tl.int64) * stride + second
        return _sums(at_N, x_ptr, w_ptr, K, BLOCK_K, EVEN, PDL)


@triton.jit
def _row(
    tile, x_ptr, w_ptr, bias_ptr, scale_ptr, out_ptr, N, K, stride, add_ptr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr,
    STEPS: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, ADD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # Rows beyond the last one are the last one again.
    n = tl.minimum(tile * ROWS + tl.arange(0, ROWS), N - 1)
    out_N = products(n, 0, stride, x_ptr, w_ptr, K, BLOCK_K, EVEN, AHEAD, STEPS, PDL)
    if SCALE:
        out_N *= tl.load(scale_ptr + n)
    if BIAS:
        out_N += tl.load(bias_ptr + n).to(tl.float32)
    if ADD:
        out_N += tl.load(add_ptr + n).to(tl.float32)
    tl.store(out_ptr + n, out_N)


@triton.jit
def _rows(
    x_ptr, K, add_ptr,
    w0_ptr, bias0_ptr, scale0_ptr, out0_ptr, N0, stride0,
    w1_ptr, bias1_ptr, scale1_ptr, out1_ptr, N1, stride1,
    w2_ptr, bias2_ptr, scale2_ptr, out2_ptr, N2, stride2,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr,
    STEPS: tl.constexpr,
    BIAS0: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr,
    SCALE0: tl.constexpr, SCALE1: tl.constexpr, SCALE2: tl.constexpr,
    ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    tiles0, tiles1 = tl.cdiv(N0, ROWS), tl.cdiv(N1, ROWS)
    if tile < tiles0:
        _row(
            tile, x_ptr, w0_ptr, bias0_ptr, scale0_ptr, out0_ptr, N0, K, stride0,
            add_ptr, ROWS, BLOCK_K, EVEN, AHEAD, STEPS, BIAS0, SCALE0, ADD, PDL,
        )  # fmt: skip
    elif tile < tiles0 + tiles1:
        _row(
            tile - tiles0, x_ptr, w1_ptr, bias1_ptr, scale1_ptr, out1_ptr, N1, K, stride1,
            add_ptr, ROWS, BLOCK_K, EVEN, AHEAD, STEPS, BIAS1, SCALE1, False, PDL,
        )  # fmt: skip
    else:
        _row(
            tile - tiles0 - tiles1, x_ptr, w2_ptr, bias2_ptr, scale2_ptr, out2_ptr, N2, K, stride2,
            add_ptr, ROWS, BLOCK_K, EVEN, AHEAD, STEPS, BIAS2, SCALE2, False, PDL,
        )  # fmt: skip


@torch.library.custom_op("star_attention::linears", mutates_args=())
def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    parts: Sequence[int],
    scales: Sequence[Tensor | None],
) -> list[Tensor]:
    """`torch.nn.functional.linear` of rows and up to `MAX_MATRICES` matrices in one launch.

    Sums are in fp32. One launch loads the next matrix's weights while it finishes the last one's
    sums. Many rows are multiplied by torch.

    Args:
        x: The rows, `[..., K]`.
        weights: Weights of each matrix, of which a part `[N, K]` is multiplied.
        biases: Bias of each matrix as a whole, or None.
        parts: First row, number of rows and first column of each matrix's part.
        scales: Scale of each row of each matrix as a whole, fp32, or None.

    Returns:
        A result `[..., N]` for each matrix.
    """
    K = x.shape[-1]
    outs = [
        torch.empty(*x.shape[:-1], size, dtype=x.dtype, device=x.device) for size in parts[1::3]
    ]
    multiply(x, made_products(K, weights, biases, parts, scales, outs))
    return outs


def multiply(x: Tensor, products: list[Product]) -> None:
    """Multiply one row, a few or many, `[..., K]`, with up to `MAX_MATRICES` matrices."""
    if x.numel() == x.shape[-1]:
        launch(x.contiguous(), products)
    elif triton_few.serves(x, products):
        triton_few.launch(x, products)
    else:
        for product in products:
            if triton_few.serves(x, [product]):
                triton_few.launch(x, [product])
            else:
                product.out.copy_(by_torch(x, product))


def made_products(
    K: int,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    parts: Sequence[int],
    scales: Sequence[Tensor | None],
    outs: Sequence[Tensor],
) -> list[Product]:
    """Return the products of `linears`."""
    # Views are made here: in a compiled layer they would be operations of their own.
    return [
        Product(
            weight[first : first + size, column : column + K],
            None if bias is None else bias[first : first + size],
            None if scale is None else scale[first : first + size],
            out,
        )
        for weight, bias, scale, first, size, column, out in zip(
            weights, biases, scales, parts[::3], parts[1::3], parts[2::3], outs, strict=True
        )
    ]


def launch(x: Tensor, products: list[Product], residual: Tensor | None = None) -> None:
    """Multiply a single row with up to three matrices.

    Args:
        x: the row, contiguous.
        products: what it is multiplied with.
        residual: what is added to the result of a single matrix, contiguous, or None.
    """
    sizes = [each.weight.shape[0] for each in products]
    tile = tile_of(x, [each.weight for each in products])
    rows, K = tile["ROWS"], x.shape[-1]
    # Missing matrices are the first one again, which no program reaches: their size is 0.
    missing = MAX_MATRICES - len(products)
    products, sizes = products + products[:1] * missing, sizes + [0] * missing
    (a, b, c) = (
        (w, w if bias is None else bias, w if scale is None else scale, out, size, w.stride(0))
        for (w, bias, scale, out), size in zip(products, sizes, strict=True)
    )
    flags = {
        f"{name}{at}": value is not None
        for at, each in enumerate(products)
        for name, value in (("BIAS", each.bias), ("SCALE", each.scale))
    }
    _rows[(sum(-(-size // rows) for size in sizes),)](
        x, K, x if residual is None else residual, *a, *b, *c,
        ADD=residual is not None, **tile, **flags, **triton_pdl.options(x.device),
    )  # fmt: skip


def tile_of(
    x: Tensor, weights: list[Tensor], least: int = 1, *, gated: bool = False
) -> dict[str, Any]:
    """Return the arguments that say what a program reads at once, `least` rows or more.

    `AHEAD` is 0 where `triton_row_fp8` does not read the weights. `gated` is that of its `tile`.
    """
    warps, ahead, steps = 4, 0, 0
    N, K = sum(weight.shape[0] for weight in weights), x.shape[-1]
    nbytes = max(weight.itemsize for weight in weights)
    words = triton_row_fp8.tile(N, K, gated=gated)
    if triton_row_fp8.serves(x, weights, words):
        rows, block_K, warps, ahead, steps = words
        steps = K // block_K if steps else 0
    else:
        rows, block_K = _TILE_OF_FEW if nbytes == 1 and N <= _FEW else _TILES[nbytes]
    return dict(
        ROWS=max(rows, least),
        BLOCK_K=block_K,
        EVEN=K % block_K == 0,
        AHEAD=ahead,
        STEPS=steps,
        num_warps=warps,
    )


def by_torch(x: Tensor, product: Product) -> Tensor:
    """Multiply rows for which there is no kernel."""
    weight, bias, scale, _ = product
    if scale is None:
        return functional.linear(x, weight, bias)
    # Numbers up to 448 are too large to be summed in fp16.
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    out = functional.linear(x.to(dtype), weight.to(dtype)).float() * scale
    return (out if bias is None else out + bias).to(x.dtype)


@linears.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    parts: Sequence[int],
    scales: Sequence[Tensor | None],
) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], size) for size in parts[1::3]]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    rows: tuple[int, int] | None = None,
    first_column: int = 0,
    scale: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.linear` of one row or a few, `[..., K]` to `[..., N]`.

    Args:
        x: the rows.
        weight: the matrix.
        bias: its bias, of the whole matrix, or None.
        rows: the N rows of the matrix that are multiplied, as (first, stop); None for all.
        first_column: the first of its K columns that are multiplied.
        scale: scale of each row of the whole matrix, fp32, or None.
    """
    first, stop = rows or (0, weight.shape[0])
    parts = [first, stop - first, first_column]
    outs: list[Tensor] = linears(x, [weight], [bias], parts, [scale])
    return outs[0]


class RowLinear(nn.Linear):
    """A linear layer that, where it is compiled, multiplies one token of each row by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and is_one_token(input):
            return linear(input, self.weight, self.bias)
        return super().forward(input)


def is_plain_linear(module: nn.Module) -> bool:
    """True if a module may become a `RowLinear`: a linear layer whose weights are not quantized."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.stride(1) == 1
    )


def fuse_linears(graph: torch.fx.Graph) -> None:
    """Compute products with the same rows in one launch: query, key and value, or both halves of a
    gated layer."""
    by_row: dict[Any, list[Any]] = {}
    op = torch.ops.star_attention.linears.default
    for node in graph.find_nodes(op="call_function", target=op):
        by_row.setdefault(node.args[0], []).append(node)
    for row, nodes in by_row.items():
        for at in range(0, len(nodes), MAX_MATRICES):
            launch = nodes[at : at + MAX_MATRICES]
            if len(launch) > 1:
                _fuse(graph, row, launch)


def _fuse(graph: torch.fx.Graph, row: Any, nodes: list[Any]) -> None:
    """Replace several products with one row by a single call, if all their weights are inputs."""
    # Inputs of the layer's graph are there before the first of the nodes.
    inputs = [
        item for node in nodes for at in (1, 2, 4) for item in node.args[at] if item is not None
    ]
    if any(item.op != "placeholder" for item in inputs) or any(
        len(node.args[1]) != 1 for node in nodes
    ):
        return
    with graph.inserting_before(nodes[0]):
        joined = [[item for node in nodes for item in node.args[at]] for at in (1, 2, 3, 4)]
        fused = graph.call_function(nodes[0].target, (row, *joined))
    fused.meta["val"] = [node.meta["val"][0] for node in nodes]
    for index, node in enumerate(nodes):
        # Each user takes the only result of its node.
        for user in list(node.users):
            with graph.inserting_before(user):
                result = graph.call_function(user.target, (fused, index))
            result.meta = dict(user.meta)
            user.replace_all_uses_with(result)
            graph.erase_node(user)
        graph.erase_node(node)
