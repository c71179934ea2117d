"""Several ranks on one GPU, where gloo carries tensors through host memory; NCCL with one rank."""

from __future__ import annotations

import multiprocessing
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from star_attention import StarLLM
from star_attention.attention.state import State
from star_attention.distributed import SoloComm, TorchComm

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parents[2] / "models" / "needle-17m"
SPREAD = {"": 0, "model.layers.3": "cpu", "model.layers.7": "cpu"}


def listen() -> Any:
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def answer(comm: Any, method: str, dtype: str, **settings: Any) -> dict[str, Any]:
    if method == "star":
        settings |= dict(block_size=1024)
    star = StarLLM.from_pretrained(
        MODEL, dtype=dtype, device="cuda", comm=comm, method=method, **settings
    )
    torch.manual_seed(1)
    ids = torch.randint(5, 4096, (8000 + 9,)).tolist()
    context, query = star.encode(ids[:8000]), ids[8000:]
    reply = star.generate(context, query, max_new_tokens=8, ignore_eos=True, return_logits=True)
    beams = star.generate(context, query, max_new_tokens=5, num_beams=2).token_ids
    return dict(
        tokens=reply.token_ids,
        # As an array, because a tensor's memory would go with its process.
        logits=reply.logits.numpy() if star.rank == 0 else None,
        beams=beams,
        backend=getattr(comm, "backend", None),
    )


def serve(rank: int, size: int, ports: Any, results: Any, settings: dict[str, Any]) -> None:
    try:
        master = listen() if rank == 0 else None
        if master is not None:
            for _ in range(size - 1):
                ports.put(master.port)
        port = ports.get() if master is None else master.port
        comm = TorchComm(rank, size, "127.0.0.1", port, master=master)
        results.put((rank, answer(comm, **settings)))
        comm.gather("nobody leaves before all are done")
    except BaseException:
        results.put((rank, traceback.format_exc()))


@pytest.mark.parametrize(
    ("method", "dtype", "ranks", "settings"),
    [
        ("star", "float32", 3, {}),
        ("ring", "float32", 2, {}),
        ("star", "bfloat16", 2, {}),
        ("star", "float32", 2, dict(tensor_parallel=2)),
        ("ring", "float32", 4, dict(tensor_parallel=2)),
        ("star", "bfloat16", 4, dict(tensor_parallel=2)),
        ("star", "float32", 2, dict(model_kwargs=dict(device_map="auto"))),
        ("star", "float32", 2, dict(model_kwargs=dict(device_map=SPREAD))),
    ],
)
def test_ranks_that_share_a_gpu(
    method: str, dtype: str, ranks: int, settings: dict[str, Any]
) -> None:
    if "model_kwargs" in settings:
        pytest.importorskip("accelerate")
    context = multiprocessing.get_context("spawn")
    ports, queue = context.Queue(), context.Queue()
    arguments: dict[str, Any] = dict(method=method, dtype=dtype, **settings)
    processes = [
        context.Process(target=serve, args=(rank, ranks, ports, queue, arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=240) for _ in range(ranks))
    for process in processes:
        process.join()
    assert all(isinstance(result, dict) for result in results.values()), results
    expected = answer(SoloComm(), "dense" if method == "ring" else method, dtype)
    assert {result["backend"] for result in results.values()} == {"gloo"}
    assert [results[rank]["tokens"] for rank in range(ranks)] == [results[0]["tokens"]] * ranks
    logits, expected_logits = results[0]["logits"][0], expected["logits"][0]
    error = np.linalg.norm(logits - expected_logits) / np.linalg.norm(expected_logits)
    print(
        f"{method} {dtype} on {ranks} ranks {settings}:"
        f" relative difference of the first logits {error:.1e}"
    )
    if dtype == "float32":
        assert results[0]["tokens"] == expected["tokens"]
        assert results[0]["beams"] == expected["beams"]
        assert error < 1e-4
    else:
        assert error < 2e-2


def test_nccl_with_one_rank() -> None:
    master = listen()
    ranks = TorchComm(0, 1, "127.0.0.1", master.port, master=master)
    comm = ranks.on(torch.device("cuda", 0))
    assert comm.backend == "nccl"
    state = State(torch.randn(2, 3, 5, 7, device="cuda"), torch.randn(2, 3, 5, device="cuda"))
    with comm.collective("a test"):
        for collective in ("gather", "reduce"):
            comm.merge_collective = collective
            merged = comm.merge(state)
            torch.testing.assert_close(merged.out_BQHD, state.out_BQHD)
            torch.testing.assert_close(merged.lse_BQH, state.lse_BQH)
        sent = torch.arange(6.0, device="cuda")
        comm.broadcast(sent, 1).wait()
        received = torch.zeros(6, device="cuda")
        comm.exchange(sent, received, sent={0: 6}, arriving={0: 6}, total=6).wait()
        torch.cuda.synchronize()
        assert received.tolist() == sent.tolist() == [0, 1, 2, 3, 4, 5]
    ranks.close()


def test_nccl_collectives_are_ended_when_a_rank_is_lost() -> None:
    """The watchdog does this when it finds a fault: nothing else looks while the device waits."""
    master = listen()
    ranks = TorchComm(0, 1, "127.0.0.1", master.port, master=master)
    comm = ranks.on(torch.device("cuda", 0))
    # A gather of so little goes through GPU memory, not through NCCL.
    comm.merge_collective = "reduce"
    state = State(torch.randn(2, 3, 5, 7, device="cuda"), torch.randn(2, 3, 5, device="cuda"))
    comm.merge(state)
    torch.cuda.synchronize()
    comm.world.groups.abort()
    with pytest.raises(RuntimeError):
        comm.merge(state)
    ranks.close()
