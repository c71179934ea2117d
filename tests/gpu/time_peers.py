"""Times of small collectives, through GPU memory and over NCCL: `python -m tests.gpu.time_peers`.

Prints microseconds for each of the ranks (argument, all GPUs by default), eager and in a CUDA
graph. With fewer GPUs than ranks there is no NCCL, and times are those of taking turns.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from star_attention.attention.kernels import triton_answer
from star_attention.attention.runs import Runs
from star_attention.attention.state import State
from star_attention.linear import triton_row
from star_attention.linear.triton_few import Product
from tests.gpu import peer_ranks
from tests.gpu.peer_ranks import Ranks
from tests.row_norms import norms_of

REPEATS = 50
ROUNDS = 5


def time_all(ranks: Ranks) -> list[str]:
    group = None
    if ranks.own_gpu and ranks.size > 1:
        group = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", ranks.store), ranks.rank, ranks.size)
        group.allreduce(torch.zeros(1, device="cuda")).wait()
    lines = [f"{ranks.size} ranks, own GPUs: {ranks.own_gpu}, us of one: eager / in a graph"]
    for rows in (1, 4, 16, 32, 64, 128):
        lines += _sums(ranks, group, rows)
    for rows in (1, 4, 16, 32, 64, 128):
        lines += _merges(ranks, group, rows)
    for rows in (1, 16, 32, 64):
        lines += _runs(ranks, rows)
    packet = torch.zeros(3, dtype=torch.int64, device="cuda")
    lines.append(_line(ranks, "24 B broadcast, peers", lambda: ranks.peers.broadcast(packet)))
    if group is not None:
        lines.append(
            _line(ranks, "24 B broadcast, NCCL", lambda: group.broadcast(packet, 0).wait())
        )
    return lines


def _sums(ranks: Ranks, group: Any, rows: int) -> list[str]:
    part = torch.ones(rows, 4096, dtype=torch.bfloat16, device="cuda")
    name = f"{part.numel() * 2 / 1024:.4g} KB sum (bf16)"
    lines = []
    if ranks.peers.fits(part):
        lines.append(_line(ranks, f"{name}, peers", lambda: ranks.peers.add(part)))
    if group is not None:
        lines.append(_line(ranks, f"{name}, NCCL", lambda: group.allreduce(part).wait()))
    row = part[:1].view(1, 1, -1)
    if rows == 1:
        for name, parts in (
            ("and norm", (False, True, True)),
            ("and two norms", (True, True, True)),
        ):
            norms = norms_of(row, parts)
            work = functools.partial(ranks.peers.add_row, row, norms)
            lines.append(_line(ranks, f"8 KB sum, residual {name}", work))
            separate = functools.partial(_separate, ranks, row, norms)
            lines.append(_line(ranks, f"8 KB sum; residual {name}", separate))
        lines += _products(ranks)
    return lines


def _products(ranks: Ranks) -> list[str]:
    """Products of Llama-3.1-8B's shapes in slices of two ranks, with what follows."""
    lines = []
    for name, K in (("output", 2048), ("down", 7168)):
        x = torch.ones(1, 1, K, dtype=torch.bfloat16, device="cuda")
        weight = torch.ones(4096, K, dtype=torch.bfloat16, device="cuda")
        product = Product(weight, None, None, x.new_empty(1, 1, 4096))
        norms = norms_of(product.out, (False, True, True))
        sent = functools.partial(ranks.peers.add_product, x, product, norms)
        lines.append(_line(ranks, f"{name} product, sum and norm: sent", sent))

        def separate(x: Any = x, product: Any = product, norms: Any = norms) -> Any:
            triton_row.launch(x, [product])
            return ranks.peers.add_row(product.out, norms)

        lines.append(_line(ranks, f"{name} product; sum and norm", separate))

        def alone(x: Any = x, product: Any = product) -> None:
            triton_row.launch(x, [product])

        lines.append(_line(ranks, f"{name} product alone", alone))
    return lines


def _separate(ranks: Ranks, row: torch.Tensor, norms: Any) -> Any:
    return norms.after(ranks.peers.add(row))


def _merges(ranks: Ranks, group: Any, rows: int) -> list[str]:
    heads, size = 32, 128
    state = State(
        torch.ones(1, rows, heads, size, device="cuda"), torch.zeros(1, rows, heads, device="cuda")
    )
    packed = torch.cat([state.out_BQHD, state.lse_BQH[..., None]], -1)
    parts = packed.new_empty(ranks.size, *packed.shape)
    name = f"{packed.numel() * 4 / 1024:.4g} KB states (fp32)"
    lines = []
    if ranks.peers.fits_states(rows * heads, size):
        lines.append(_line(ranks, f"{name}, merge by peers", lambda: ranks.peers.merge(state)))
    if group is not None:
        gather = lambda: group._allgather_base(parts.view(-1), packed.view(-1)).wait()  # noqa: E731
        lines.append(_line(ranks, f"{name}, gather alone by NCCL", gather))
    return lines


def _runs(ranks: Ranks, rows: int) -> list[str]:
    """Time merges of one token's runs, or of rows with a few runs each."""
    heads, size, count = 32, 128, 36 if rows == 1 else 12
    shape = rows, 1, heads, count, size
    out, lse = torch.ones(shape, device="cuda"), torch.zeros(shape[:-1], device="cuda")

    def state() -> State:
        return triton_answer.merge_runs(out, lse, torch.float32)

    runs = Runs(shape=(rows, 1, heads, size), out_PD=out, lse_P=lse, count=count, merged=state)
    name = f"{count} runs of {rows} x {heads} heads"
    return [
        _line(ranks, f"{name}, merge", lambda: ranks.peers.merge(runs)),
        _line(ranks, f"{name}, in two launches", lambda: ranks.peers.merge(runs.merged())),
    ]


def _line(ranks: Ranks, name: str, operation: Callable[[], Any]) -> str:
    operation()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(REPEATS):
            operation()

    def many() -> None:
        for _ in range(REPEATS):
            operation()

    times = []
    for run in (many, graph.replay):
        seconds = []
        for _ in range(ROUNDS):
            ranks.meet()
            torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        times.append(f"{statistics.median(seconds) / REPEATS * 1e6:7.1f}")
    return f"{name:42} {' / '.join(times)}"


if __name__ == "__main__":
    size = int(sys.argv[1]) if len(sys.argv) > 1 else torch.cuda.device_count()
    print("\n".join(peer_ranks.run(time_all, size)[0]), flush=True)
