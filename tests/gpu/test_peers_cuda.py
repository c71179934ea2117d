"""Collectives through GPU memory: equal to the plain ones, in graphs, after an abort.

With fewer GPUs than ranks, all share one. Times: `python -m tests.gpu.time_peers`.
"""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from star_attention import StarLLM
from star_attention.attention.state import State, merge
from star_attention.errors import StarAttentionError
from tests.dist.test_collectives import heads_of
from tests.gpu import peer_ranks
from tests.gpu import ranks as engine_ranks
from tests.gpu.peer_ranks import Ranks
from tests.new_oracle import new_tokens
from tests.row_norms import PARTS, check, norms_of
from tests.runs_oracle import even_runs, runs_by_table

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["add", "row", "gather", "heads", "merge", "runs", "new", "broadcast"]
SIZES = [1, 7, 512, 513, 4096, 33_000]
HEADS = 6
QUESTION: Any = dict(B=1, Q=64, H=32, D=128, count=2, device="cuda")


def tensor_of(seed: int, dtype: torch.dtype, elements: int) -> Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def state_of(seed: int, queries: int, head_size: int, dtype: torch.dtype) -> State:
    random = torch.Generator().manual_seed(seed)
    out_BQHD = torch.randn(2, queries, HEADS, head_size, generator=random)
    lse_BQH = 8 * torch.randn(2, queries, HEADS, generator=random)
    lse_BQH[0, 0, seed % HEADS] = float("-inf")
    lse_BQH[1, 0] = float("-inf")
    out_BQHD[lse_BQH.isinf()] = 0.0
    return State(out_BQHD.to("cuda", dtype), lse_BQH.cuda())


def added(parts: list[Tensor]) -> Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def random_operations(ranks: Ranks, operations: int) -> float:
    """Run operations of random kinds and sizes, without waiting, and compare all at the end."""
    draw, peers = random.Random(0), ranks.peers
    checks: list[tuple[Any, Any, str]] = []
    rows: list[tuple[list[Tensor], Tensor, Any]] = []
    started = time.monotonic()
    for number in range(operations):
        kind, dtype = draw.choice(KINDS), draw.choice(DTYPES)
        seeds = [(number % 50) * ranks.size + rank for rank in range(ranks.size)]
        elements, head_size = draw.choice(SIZES), draw.choice([16, 64, 80, 128, 256])
        queries, first = draw.choice([1, 3, 20]), draw.randrange(HEADS)
        # A check costs more than an operation, and would keep the ranks together.
        checked = number % 10 == 0
        where = f"operation {number}: {kind} {dtype} {elements} {queries} {head_size}"
        if kind == "merge":
            own = state_of(seeds[ranks.rank], queries, head_size, dtype)
            merged = peers.merge(own, slice(first, first + 2))
            if checked:
                states = [state_of(seed, queries, head_size, dtype) for seed in seeds]
                wide = [State(state.out_BQHD.float(), state.lse_BQH) for state in states]
                expected = merge(wide)
                for part, whole in zip(merged, expected, strict=True):
                    checks.append((part, whole[:, :, first : first + 2], where))
            continue
        if kind == "runs":
            make = even_runs if queries == 20 else runs_by_table
            parts = [make(seed, B=3, D=head_size, device="cuda") for seed in seeds]
            merged = peers.merge(parts[ranks.rank][0], slice(first, first + 2))
            if checked:
                expected = merge([state for _, state in parts])
                for part, whole in zip(merged, expected, strict=True):
                    checks.append((part, whole[:, :, first : first + 2], f"{where} merge"))
            continue
        if kind == "new":
            new = new_tokens(number, ranks.size, dtype, draw, device="cuda")
            before = new.copies() if checked else []
            rotated = peers.gather_new(new.own[ranks.rank], new.tails, new.rotation)
            if checked:
                new.check(rotated, before)
            continue
        if kind == "heads":
            heads = [[t.cuda() for t in heads_of(seed, dtype, queries)] for seed in seeds]
            gathered = peers.gather_heads(heads[ranks.rank])
            if checked:
                for all_heads, of_ranks in zip(gathered, zip(*heads, strict=True), strict=True):
                    checks.append((all_heads, torch.cat(of_ranks, 2), where))
            continue
        part = tensor_of(seeds[ranks.rank], dtype, elements)
        row = part.view(1, -1)
        if kind == "row" and peers.fits_row(row):
            # Some ranks only add up, as those do that do not compile their layers.
            norms = norms_of(row, PARTS[number % len(PARTS)], number)
            alone = number % 3 == 0 and ranks.rank == 0
            results = [peers.add(row)] if alone else peers.add_row(row, norms)
            if checked:
                total = added([tensor_of(seed, dtype, elements) for seed in seeds])
                rows.append((results, total.view(1, -1), None if alone else norms))
            continue
        if kind in ("add", "row"):
            result = peers.add(part)
        elif kind == "gather":
            result = peers.gather(part)
        else:
            result = part
            peers.broadcast(result)
        if checked:
            parts = [tensor_of(seed, dtype, elements) for seed in seeds]
            plain = {
                "add": added,
                "row": added,
                "gather": torch.stack,
                "broadcast": lambda parts: parts[0],
            }
            checks.append((result, plain[kind](parts), where))
    torch.cuda.synchronize()
    seconds = time.monotonic() - started
    for results, total, norms in rows:
        if norms is None:
            assert torch.equal(results[0], total)
        else:
            check(results, total, norms)
    for result, expected, where in checks:
        if "merge" in where:
            torch.testing.assert_close(result, expected, msg=lambda m, where=where: f"{where}: {m}")
        else:
            assert torch.equal(result, expected), where
            ranks.same_bits(result)
    assert len(checks) > operations // 20
    return seconds


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_operations_in_any_order_equal_the_plain_ones(size: int) -> None:
    operations = 3000 if torch.cuda.device_count() >= size else 600
    seconds = peer_ranks.run(random_operations, size, operations=operations)
    print(f"{size} ranks, {operations} operations: {seconds[0]:.1f} s")


def merged_bits(ranks: Ranks) -> None:
    for number in range(20):
        state = state_of(ranks.rank + 10 * number, 5, 128, torch.bfloat16)
        whole = ranks.peers.merge(state)
        ranks.same_bits(*whole)
        # Of one token, as a rank with a graph and one without have it.
        runs, merged = even_runs(number, B=1, Q=1, H=32, D=128, count=36, device="cuda")
        ranks.same_bits(*ranks.peers.merge(merged if ranks.rank else runs))
        narrow = ranks.peers.merge(state, dtype=torch.bfloat16)
        assert torch.equal(narrow.out_BQHD, whole.out_BQHD.bfloat16())
        own = ranks.peers.merge(state, slice(ranks.rank, ranks.rank + 3))
        for part, everything in zip(own, whole, strict=True):
            assert torch.equal(part, everything[:, :, ranks.rank : ranks.rank + 3])


def question_bits(ranks: Ranks) -> None:
    """Merge the runs of a question, in programs of several rows and warps, many times."""
    members = [even_runs(rank, **QUESTION) for rank in range(ranks.size)]
    runs, state = members[ranks.rank]
    whole = merge([merged for _, merged in members])
    for number in range(300):
        merged = ranks.peers.merge(runs if (number + ranks.rank) % 3 else state)
        if number % 100 == 0:
            for part, expected in zip(merged, whole, strict=True):
                torch.testing.assert_close(part, expected)
            ranks.same_bits(*merged)
    ranks.same_bits(*merged)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_merges_have_the_same_bits_on_all_ranks(size: int) -> None:
    peer_ranks.run(merged_bits, size)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_merges_of_a_question(size: int) -> None:
    peer_ranks.run(question_bits, size)


def replay(ranks: Ranks, layers: int, replays: int) -> None:
    """Capture a forward's collectives, with eager ones between replays."""
    peers = ranks.peers
    part = torch.zeros(2, 2048, device="cuda", dtype=torch.bfloat16)
    state = state_of(ranks.rank, 1, 128, torch.float32)
    packet = torch.zeros(9, dtype=torch.int64, device="cuda")
    # Compiled without the other ranks.
    peers.add(part, rehearsal=True)
    peers.merge(state, rehearsal=True)
    peers.gather(part, rehearsal=True)
    graph = torch.cuda.CUDAGraph()
    totals, merged, gathered = [], [], []
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for layer in range(layers):
            totals.append(peers.add(part + layer))
            merged.append(peers.merge(State(state.out_BQHD * (layer + 1), state.lse_BQH)))
        gathered.append(peers.gather(part))
    for number in range(replays):
        value = number % 7 + ranks.rank
        part.fill_(value)
        packet.fill_(value)
        peers.broadcast(packet)
        graph.replay()
        others = [number % 7 + rank for rank in range(ranks.size)]
        assert packet.tolist() == [others[0]] * 9
        for layer, total in enumerate(totals):
            assert (total == sum(other + layer for other in others)).all(), (number, layer)
        for rank, other in enumerate(others):
            assert (gathered[0][rank] == other).all()
    expected = merge([state_of(rank, 1, 128, torch.float32) for rank in range(ranks.size)])
    for layer, whole in enumerate(merged):
        torch.testing.assert_close(whole.out_BQHD, expected.out_BQHD * (layer + 1))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_graphs_replay_operations(size: int) -> None:
    peer_ranks.run(replay, size, layers=16, replays=30)


def abort(ranks: Ranks) -> tuple[float, float]:
    """Lose the last rank inside a captured graph; then begin again with it."""
    peers = ranks.peers
    part = torch.ones(4096, device="cuda")
    tokens = torch.arange(4, device="cuda")
    lost = ranks.rank == ranks.size - 1
    peers.add(part, rehearsal=True)
    peers.broadcast(tokens, rehearsal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(64):
            total = peers.add(part)
        peers.broadcast(tokens)
    graph.replay()
    torch.cuda.synchronize()
    assert (total == ranks.size).all()
    ranks.meet()
    waited = 0.0
    runs, _ = even_runs(0, **QUESTION)
    if not lost:
        # All warps of a program have to end together.
        peers.merge(runs)
        graph.replay()
        peers.merge(state_of(1, 3, 64, torch.bfloat16))
        done = torch.cuda.Event()
        done.record()
        timer = threading.Timer(1.0, peers.abort)
        timer.start()
        started = time.monotonic()
        done.synchronize()
        waited = time.monotonic() - started
        timer.join()
        assert waited > 0.5, "it waits for the lost rank"
        assert not total.isnan().any()
        assert ((tokens >= 0) & (tokens < 4)).all(), "no token that no table has"
        # The stream and the device work on.
        assert (part + 1 == 2).all()
    started = time.monotonic()
    peers.connect(ranks.exchange)
    again = time.monotonic() - started
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert (total == ranks.size).all()
    return waited, again


@pytest.mark.parametrize("size", [2, 3, 4])
def test_an_abort_ends_a_graph_that_waits(size: int) -> None:
    results = peer_ranks.run(abort, size)
    print(f"{size} ranks: the wait ended after", *(f"{seconds:.3f} s" for seconds, _ in results))
    for waited, _ in results:
        assert waited < 10


def beside_nccl(ranks: Ranks, rounds: int) -> None:
    """Alternate with NCCL's collectives, which run on streams of their own."""
    import torch.distributed as dist

    if not ranks.own_gpu:
        return
    group = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", ranks.store), ranks.rank, ranks.size)
    for number in range(rounds):
        large = torch.full((1 << 20,), float(ranks.rank + number), device="cuda")
        work = group.allreduce(large)
        small = ranks.peers.add(torch.full((4096,), float(ranks.rank), device="cuda"))
        work.wait()
        if number % 50 == 0:
            assert (small == sum(range(ranks.size))).all()
            assert (large == sum(range(ranks.size)) + number * ranks.size).all()
    torch.cuda.synchronize()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_operations_alternate_with_nccl() -> None:
    peer_ranks.run(beside_nccl, torch.cuda.device_count(), rounds=500)


# ---------------------------------------------------------------------- in an engine

MODEL = Path(__file__).parents[2] / "models" / "needle-17m"


def fail_and_go_on(comm: Any, device: str) -> tuple[list[int], list[int], str, float]:
    """Fail on rank 1 while rank 0's device waits for it in a graph; then answer again."""
    star = StarLLM.from_pretrained(
        MODEL, dtype="float32", device=device, comm=comm, compile=True, block_size=1024
    )
    context = star.encode([5 + number % 4000 for number in range(3000)])
    arguments: dict[str, Any] = dict(ignore_eos=True, max_new_tokens=12)
    before = star.generate(context, [7, 8, 9], **arguments).token_ids
    mesh = star.runtime.comm
    peers = mesh.world.groups.get("peers", range(comm.size))
    assert peers.usable
    graphs = star.runtime.handle.graphs
    replay, forwards = graphs.run, []

    def fail(*args: Any, **kwargs: Any) -> Any:
        forwards.append(1)
        if len(forwards) == 5:
            # The other rank's forward is on its way by then.
            time.sleep(1.0)
            raise ValueError("a slip on rank 1")
        return replay(*args, **kwargs)

    if comm.rank == 1:
        graphs.run = fail
    version = mesh.transport_version
    started = time.perf_counter()
    with pytest.raises((ValueError, StarAttentionError)) as caught:
        star.generate(context, [7, 8, 9], **arguments)
    seconds = time.perf_counter() - started
    graphs.run = replay
    assert mesh.transport_version == version + 1
    after = star.generate(context, [7, 8, 9], **arguments).token_ids
    assert mesh.world.groups.get("peers", range(comm.size)) is peers, "no new buffers"
    return before, after, str(caught.value), seconds


def test_an_exception_leaves_ranks_that_answer_again() -> None:
    results = engine_ranks.run(fail_and_go_on, 2)
    for before, after, message, seconds in results:
        print(f"{seconds:.1f} s: {message}")
        assert before == after == results[0][0]
        assert "a slip on rank 1" in message
        assert seconds < engine_ranks.STALL_S
