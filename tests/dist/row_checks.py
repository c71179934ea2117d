"""Checks of rows that ranks sum together with what is around them, for `test_peers`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from star_attention.distributed import TorchComm
from star_attention.planning import traffic
from tests.dist.test_collectives import tensor_of
from tests.row_norms import PARTS, check, norms_of


def check_row(peers: Any, comm: TorchComm, parts: list[Tensor], number: int) -> None:
    """Some ranks only add up, as those do that do not compile their layers."""
    own = parts[comm.rank]
    norms = norms_of(own, PARTS[number % len(PARTS)], number)
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    total = total.to(own.dtype)
    for alone in (False, True):
        if alone and (number + comm.rank) % 2:
            torch.testing.assert_close(peers.add(own), total, rtol=2**-7, atol=0.0)
            continue
        results = peers.add_row(own, norms)
        if own.dtype != torch.bfloat16:
            check(results, total, norms)
        if not alone:
            for others in comm.gather(results):
                assert all(torch.equal(*pair) for pair in zip(others, results, strict=True))


def check_product(peers: Any, comm: TorchComm, outputs: int, number: int) -> None:
    """Some ranks multiply and add up separately."""
    from star_attention.linear import triton_row
    from star_attention.linear.triton_few import Product

    def of(rank: int) -> tuple[Tensor, Product]:
        random = torch.Generator().manual_seed(number * comm.size + rank)
        x = torch.randn(1, 1, 40, generator=random).half()
        weight = torch.randn(outputs, 40, generator=random).half() * 40**-0.5
        bias = torch.randn(outputs, generator=random).half() if rank == 0 else None
        return x, Product(weight, bias, None, x.new_empty(1, 1, outputs))

    x, product = of(comm.rank)
    assert peers.fits_product(x, product)
    norms = norms_of(product.out, PARTS[number % len(PARTS)], number)
    total = torch.zeros(1, 1, outputs)
    for rank in range(comm.size):
        row, (weight, bias, _, _) = of(rank)
        total += linear(row.float(), weight.float(), None if bias is None else bias.float()).half()
    for alone in (False, True):
        if alone and (number + comm.rank) % 2:
            triton_row.launch(x, [product])
            results = peers.add_row(product.out, norms)
        else:
            results = peers.add_product(x, product, norms)
        check(results, total.half(), norms, eps=4 * torch.finfo(torch.half).eps)
        for others in comm.gather(results):
            assert all(torch.equal(*pair) for pair in zip(others, results, strict=True))


def sum_rows(comm: TorchComm) -> list[Any]:
    """Sum a row over ranks and do what follows, with the traffic; also of the row's products."""
    from star_attention.linear.triton_few import Product

    results: list[Any] = []
    with comm.collective("a test"):
        for dtype in (torch.float32, torch.float16):
            own = tensor_of(comm.rank, dtype, 20).view(1, 1, -1)
            before = copy.copy(comm.cp_traffic)
            outs = comm.sum_row(own, "cp", norms_of(own, PARTS[-1]))
            results.append((outs, comm.cp_traffic.since(before)))
            before = copy.copy(comm.cp_traffic)
            product = Product(torch.eye(40).to(dtype), None, None, torch.empty_like(own))
            outs = comm.sum_product(own, product, "cp", norms_of(own, PARTS[-1]))
            results.append((outs, comm.cp_traffic.since(before)))
    return results


def check_sums(results: list[Any], ranks: int) -> None:
    dtypes = [torch.float32] * 2 + [torch.float16] * 2
    for dtype, (outs, wire) in zip(dtypes, results, strict=True):
        parts = [tensor_of(rank, dtype, 20).view(1, 1, -1).float() for rank in range(ranks)]
        total = torch.stack(parts).sum(0).to(dtype)
        # torch's own sum may add in another order.
        check(outs, total, norms_of(total, PARTS[-1]), eps=2 * torch.finfo(torch.float16).eps)
        assert wire == traffic.sum_traffic(ranks, 40, dtype.itemsize)
