"""Benchmarks on several ranks: whom they measure, what they count, and what a failure leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.bench.benchmark import Target
from star_attention.bench.decode import Decode
from star_attention.bench.models import weight_bytes_per_token
from star_attention.bench.prefill.benchmark import Prefill
from star_attention.bench.prefill.cases import Methods, plan_cases
from star_attention.bench.prefill.contenders import EngineSettings
from star_attention.bench.questions import Questions
from star_attention.bench.ranks import NOT_HERE, OUT_OF_MEMORY, attempt
from star_attention.distributed import TorchComm
from star_attention.errors import InvalidInputError, OutOfMemoryError
from star_attention.hf.execution import slices
from star_attention.hf.shape import model_shape
from star_attention.planning import cost, traffic
from star_attention.planning.plan import BlockPlan
from star_attention.tools.baselines import official_encode
from star_attention.tools.machine import Ceilings
from tests.dist.pool import Pool
from tests.engines import BUNDLED, ids, tiny

CONTEXT, BLOCK = 101, 24
WEIGHTS = ["whole", "slices"]
"""What ranks read of the weights."""


def target_on(comm: TorchComm) -> Target:
    model = tiny("llama")
    return Target(
        model=model,
        shape=model_shape(model.config, "float32"),
        ceilings=Ceilings(flops_per_s=1e12, bytes_per_s=1e9),
        progress=lambda line: None,
        comm=comm,
    )


# ------------------------------------------------------------------------------------ official


def official_difference(comm: TorchComm) -> float:
    star = StarLLM(tiny("llama"), block_size=BLOCK, comm=comm)
    tokens = torch.tensor(ids(CONTEXT))
    expected = star.encode(tokens)
    store = official_encode(
        star.runtime.handle, tokens, expected.plan, 48, cp_rank=star.runtime.comm.cp_rank
    )
    assert store.segments == expected.kv.segments
    pairs = zip(store.layers, expected.kv.layers, strict=True)
    return max(
        float((a - b).abs().max())
        for layer, other in pairs
        if not layer.is_empty
        for a, b in zip(layer.pair(), other.pair(), strict=True)
    )


def test_each_rank_encodes_its_blocks_of_the_official_scheme(pool: Pool) -> None:
    assert max(pool.run(official_difference, 3)) < 1e-5


# ------------------------------------------------------------------------------------ failures


def attempts(comm: TorchComm, raised_in_a_call: bool) -> list[tuple[Any, str | None]]:
    def fail_on_rank_1() -> str:
        if comm.rank == 1:
            raise OutOfMemoryError("no memory is left on rank 1")
        return "done"

    def fail_in_a_call() -> str:
        with comm.collective("a call"):
            fail_on_rank_1()
            comm.gather(None)
        return "done"

    failing = fail_in_a_call if raised_in_a_call else fail_on_rank_1
    return [attempt(comm, failing), attempt(comm, lambda: comm.rank)]


@pytest.mark.parametrize("raised_in_a_call", [False, True])
def test_a_failure_on_one_rank_is_that_of_all_and_the_rest_goes_on(
    pool: Pool, raised_in_a_call: bool
) -> None:
    """Forbids ranks that wait for one whose memory ran out, or that disagree about a row."""
    results = pool.run(attempts, 3, raised_in_a_call=raised_in_a_call)
    assert [first for first, _ in results] == [(None, OUT_OF_MEMORY)] * 3
    assert [second for _, second in results] == [(rank, None) for rank in range(3)]


def test_a_failed_call_is_reported_in_full(pool: Pool) -> None:
    (row, *_), *_ = pool.run(decode_rows, 2, contexts=[10**6])
    assert row.token_s is None
    assert "positions" in row.failed


# ---------------------------------------------------------------------------------------- rows


def decode_rows(comm: TorchComm, contexts: list[int]) -> list[Any]:
    benchmark = Decode(
        contexts=contexts, block=BLOCK, queries=1, query_tokens=4, answer_tokens=4, repeats=1
    )
    return list(benchmark.run(target_on(comm)))


def test_answers_on_ranks_are_measured_beside_those_of_rank_0(pool: Pool) -> None:
    first, second = pool.run(decode_rows, 2, contexts=[CONTEXT])
    assert [(row.ranks, row.weights) for row in first] == [(1, "whole"), *((2, w) for w in WEIGHTS)]
    assert all(row.token_s is not None for row in first), first
    assert [row.failed for row in second] == [NOT_HERE, *(None for _ in WEIGHTS)]
    alone, *together = first
    wire = [row.wire_bytes for row in first]
    assert alone.wire_bytes == 0
    assert wire == sorted(set(wire)), "slices exchange more"
    assert all(row.read_bytes < alone.read_bytes for row in together)
    assert [row.encode_s is None for row in together] == [False, True]


def chosen_slices(comm: TorchComm, slice_weights: bool | None) -> tuple[Any, int, int]:
    """Return the row with slices where the MLPs alone save time; weights, and half of the MLPs."""
    target = target_on(comm)
    mlps = sum(w.nbytes for name, w in target.model.named_parameters() if ".mlp." in name)
    with pytest.MonkeyPatch.context() as patch:
        layers = target.model.config.num_hidden_layers
        patch.setattr(slices, "SAVED_BYTES_ON_CPU", mlps // 2 // layers)
        benchmark = Decode(
            contexts=[CONTEXT],
            block=BLOCK,
            queries=1,
            query_tokens=4,
            answer_tokens=4,
            repeats=1,
            slice_weights=slice_weights,
            alone=False,
        )
        *_, row = benchmark.run(target)
    assert row.weights == "slices"
    return row, weight_bytes_per_token(target.model), mlps // 2


def test_slices_are_those_that_save_time(pool: Pool) -> None:
    """Forbids a row that is slower than the default, which slices less."""
    (every, *_), _ = pool.run(chosen_slices, 2, slice_weights=True)
    (chosen, weights, saved), _ = pool.run(chosen_slices, 2, slice_weights=None)
    assert chosen.wire_bytes < every.wire_bytes
    assert chosen.read_bytes - every.read_bytes == weights - saved - weights // 2
    assert chosen.floor_s == chosen.read_bytes / 1e9


def prefill_rows(comm: TorchComm) -> list[Any]:
    cases = plan_cases(
        [CONTEXT],
        [str(BLOCK)],
        Methods.of(None, ["star"], comm.size),
        device="cpu",
    )
    benchmark = Prefill(cases=cases, repeats=0, engine=EngineSettings(tokens_per_forward="48"))
    return list(benchmark.run(target_on(comm)))


def test_the_methods_of_phase_1_on_ranks(pool: Pool) -> None:
    first, second = pool.run(prefill_rows, 2)
    names = [(row.method, row.ranks) for row in first]
    on_ranks = ("ring", "ring-contiguous", "official", "star")
    assert names == [("star", 1), *((name, 2) for name in on_ranks)]
    assert all(row.seconds is not None for row in first), first
    assert [row.failed for row in second] == [NOT_HERE, None, None, None, None]
    by_name = dict(zip(names, first, strict=True))
    shape, plan = (
        model_shape(tiny("llama").config, "float32"),
        BlockPlan.resolve(CONTEXT, BLOCK, None, 2),
    )
    star = by_name["star", 2]
    sent = traffic.phase1_cp(shape, plan, tokens_per_forward=48)
    assert star.wire_bytes == sent.bytes
    assert by_name["official", 2].wire_bytes == 0
    assert by_name["ring", 2].wire_bytes == traffic.ring_cp(shape, CONTEXT, 2).bytes
    assert star.busiest_flops == max(
        cost.phase1(shape, plan, tokens_per_forward=48, rank=rank).total for rank in range(2)
    )
    assert star.flops == by_name["star", 1].flops
    dense = cost.phase1(shape, BlockPlan.dense(CONTEXT), tokens_per_forward=CONTEXT).total
    for name in ("ring", "ring-contiguous"):
        assert by_name[name, 2].flops == dense
    assert by_name["ring", 2].busiest_flops < by_name["ring-contiguous", 2].busiest_flops


def question_rows(comm: TorchComm) -> list[Any]:
    benchmark = Questions(
        contexts=[CONTEXT],
        block=BLOCK,
        questions=6,
        batch=3,
        query_tokens=4,
        answer_tokens=4,
        repeats=1,
        slice_weights=False,
    )
    return list(benchmark.run(target_on(comm)))


def test_a_batch_of_questions_on_ranks(pool: Pool) -> None:
    first, _ = pool.run(question_rows, 2)
    assert [(row.method, row.ranks, row.batch) for row in first] == [("star", 1, 3), ("star", 2, 3)]
    assert all(row.total_s == row.encode_s + 6 * row.question_s for row in first)


def test_methods_on_ranks_that_cannot_run_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"method 'ring' needs several ranks"):
        Methods.of(["ring"], [], 1).check("cpu")
    with pytest.raises(InvalidInputError, match=r"'dense' runs on one rank, .* none has all"):
        Methods.of(["dense", "star"], [], 2, tensor_parallel=2)
    alone = Methods.of(["dense", "star"], ["star"], 2)
    assert alone.ordered() == [("dense", 1), ("star", 1), ("star", 2)]


# --------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_bench_ranks_measures_every_mesh_with_one_command(tmp_path: Path) -> None:
    sizes = ["--context", "256,512", "--block", "128", "--prefill-block", "128"]
    sizes += ["--batch-context", "256", "--batch", "3", "--answer-tokens", "4", "--repeats", "1"]
    model = ["-m", str(BUNDLED), "--dtype", "float32", "--device", "cpu"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "star_attention", "bench", "ranks", *model, *sizes, "--out", str(tmp_path)]
    process = subprocess.run(
        [sys.executable, *launch, *command],
        env=os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    assert [json.loads(line)["benchmark"] for line in lines] == ["decode", "questions", "prefill"]
    assert process.stderr.count("plain, 256\n") == 1, "rank 0 alone shows progress"
    decode = json.loads((tmp_path / "decode.json").read_text())
    assert decode == json.loads(lines[0])
    meshes = {(row["ranks"], row["tensor_parallel"], row["weights"]) for row in decode["rows"]}
    assert meshes == {(1, 1, "whole"), *((2, 1, w) for w in WEIGHTS), (2, 2, "shard")}
    assert all(row["failed"] is None for row in decode["rows"])
