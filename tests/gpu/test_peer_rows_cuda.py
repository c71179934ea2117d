"""Rows that ranks sum through GPU memory together with what is around them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from star_attention.linear import fp8
from tests.gpu import peer_ranks
from tests.gpu.peer_ranks import Ranks
from tests.gpu.test_peers_cuda import DTYPES, tensor_of
from tests.row_norms import PARTS, check, norms_of

triton_row = pytest.importorskip("star_attention.linear.triton_row")
Product: Any = pytest.importorskip("star_attention.linear.triton_few").Product

pytestmark = pytest.mark.gpu


def row_bits(ranks: Ranks) -> None:
    """Rows of a model's sizes, eager and in a graph, and their sums alone."""
    for number, (dtype, size) in enumerate(
        itertools.product(DTYPES, (48, 1000, 2560, 4096, 8192, 16384))
    ):
        row = tensor_of(ranks.rank + 10 * number, dtype, size).view(1, 1, -1)
        if not ranks.peers.fits_row(row):
            continue
        norms = norms_of(row, PARTS[-1 - number % 2], number)
        total = ranks.peers.add(row)
        _repeated(ranks, lambda row=row, norms=norms: ranks.peers.add_row(row, norms), total, norms)


def product_bits(ranks: Ranks, weights: str) -> None:
    """Products of a model's sizes, each of which is sent by the program that makes it."""
    for number, (size, K) in enumerate([(48, 64), (1000, 300), (2560, 1024), (4096, 7168)]):
        weight = tensor_of(ranks.rank + 10 * number, torch.float32, size * K).view(size, K)
        scale = None
        if weights == "fp8":
            weight, scales = fp8.quantize(weight)
            scale = scales[:, 0].contiguous()
        else:
            weight = weight.bfloat16()
        x = tensor_of(ranks.rank + number, torch.bfloat16, K).view(1, 1, K) * K**-0.5
        product = Product(weight, None, scale, x.new_empty(1, 1, size))
        norms = norms_of(product.out, PARTS[-1 - number % 2], number)
        assert ranks.peers.fits_product(x, product)
        triton_row.launch(x, [product])
        total = ranks.peers.add(product.out)
        add = ranks.peers.add_product
        _repeated(
            ranks,
            lambda x=x, product=product, norms=norms, add=add: add(x, product, norms),
            total,
            norms,
            # Sums of products in another order.
            eps=2 * torch.finfo(torch.bfloat16).eps,
        )


def _repeated(ranks: Ranks, work: Any, total: Tensor, norms: Any, **margin: float) -> None:
    """Check work by itself and in a graph, and its bits on all ranks."""
    results = work()
    check(results, total, norms, **margin)
    ranks.same_bits(*results)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(5):
            again = work()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(results, again, strict=True))


@pytest.mark.parametrize("size", [2, 3])
def test_rows_have_the_same_bits_on_all_ranks(size: int) -> None:
    peer_ranks.run(row_bits, size)


@pytest.mark.parametrize("weights", ["plain", "fp8"])
@pytest.mark.parametrize("size", [2, 3])
def test_rows_of_products_have_the_same_bits_on_all_ranks(size: int, weights: str) -> None:
    peer_ranks.run(product_bits, size, weights=weights)
