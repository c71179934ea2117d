"""tp ranks share heads and weights: nothing in the answers shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import SoloComm, TorchComm
from star_attention.hf.loading import tensor_parallel as tp
from star_attention.hf.shape import model_shape
from star_attention.planning import traffic
from star_attention.planning.plan import BlockPlan
from tests.dist.checks import answer_with, check_model
from tests.dist.pool import Pool
from tests.dist.tp_models import SIZES, model, on_disk, star_of
from tests.engines import BUNDLED, CONTEXT, ids
from tests.tiers import in_turn

NO_SIZES: dict[str, Any] = dict(block_size=None, anchor_size=None)
FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_vlm",
    "starcoder2",
]
OTHERS = [
    "olmo",
    "granite",
    "smollm3",
    "nemotron",
    "glm",
    "glm4",
    "ernie4_5",
    "apertus",
    "seed_oss",
    "arcee",
    "cohere2",
    "exaone4",
    "ministral",
    "ministral3",
    "qwen2_sliding",
    "gemma3_dynamic_ntk",
    "llama_yarn",
    "llama_llama3scaling",
    "gemma4",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "glm4_moe",
    "ernie4_5_moe",
    "dots1",
    "exaone_moe",
]
QUICK = ["gemma4", "mixtral", "qwen3_moe", "exaone4"]


def answer(comm: TorchComm, path: Path, tensor_parallel: int, **settings: Any) -> dict[str, Any]:
    star = star_of(comm, path, tensor_parallel, tokens_per_forward=48, **settings)
    weights = sum(parameter.numel() for parameter in star.model.parameters())
    return answer_with(star) | dict(weights=weights)


@pytest.mark.parametrize(
    ("name", "ranks", "tensor_parallel"), in_turn(4, FAMILIES, [(4, 2), (2, 2), (4, 4), (6, 2)])
)
def test_every_family_against_the_oracle(
    pool: Pool, models: Path, name: str, ranks: int, tensor_parallel: int
) -> None:
    path = on_disk(models, name)
    results = pool.run(answer, ranks, path=path, tensor_parallel=tensor_parallel)
    check_model(results, model(name), **SIZES, tensor_parallel=tensor_parallel)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OTHERS],
)
def test_other_families_against_the_oracle(pool: Pool, models: Path, name: str) -> None:
    reasons = tp.reasons(model(name).config, 2)
    if reasons:
        pytest.skip(f"in this release of transformers, {reasons[0]}")
    results = pool.run(answer, 4, path=on_disk(models, name), tensor_parallel=2)
    check_model(results, model(name), **SIZES, tensor_parallel=2)


@pytest.mark.parametrize(
    ("merge_collective", "source"), in_turn(2, ["gather", "reduce"], ["broadcast", "local"])
)
def test_collectives_and_anchor_sources(
    pool: Pool, models: Path, merge_collective: str, source: str
) -> None:
    sizes = dict(block_size=40, anchor_size=40)  # 3 blocks
    results = pool.run(
        answer,
        6,
        path=on_disk(models, "qwen3"),
        tensor_parallel=2,
        merge_collective=merge_collective,
        anchor_source=source,
        **sizes,
    )
    check_model(results, model("qwen3"), **sizes, tensor_parallel=2)
    all_weights = sum(parameter.numel() for parameter in model("qwen3").parameters())
    sharded = model_shape(model("qwen3").config, "float32").sharded_parameters
    assert [result["weights"] for result in results] == [all_weights - sharded // 2] * 6
    embeddings = model("qwen3").get_input_embeddings().weight.numel()
    assert sharded > 0.8 * (all_weights - 2 * embeddings)


def test_idle_cp_ranks_take_part(pool: Pool, models: Path) -> None:
    sizes = dict(block_size=128, anchor_size=128)
    results = pool.run(answer, 6, path=on_disk(models, "llama"), tensor_parallel=2, **sizes)
    check_model(results, model("llama"), **sizes, tensor_parallel=2)


def compute_logits(comm: Any, path: Path, tensor_parallel: int, dtype: str) -> Any:
    star = star_of(comm, path, tensor_parallel, dtype=dtype)
    return star.logits(star.encode(ids(CONTEXT)), [5, 6, 7])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(pool: Pool, models: Path, dtype: str) -> None:
    path = on_disk(models, "qwen3")
    exact = compute_logits(SoloComm(), path, 1, "float32")
    plain = compute_logits(SoloComm(), path, 1, dtype)
    sharded = pool.run(compute_logits, 4, path=path, tensor_parallel=2, dtype=dtype)[0]
    assert (sharded - exact).norm() <= 2 * (plain - exact).norm()


# ------------------------------------------------------------------ saved contexts


def save(comm: Any, path: Path, tensor_parallel: int, book: Path) -> Any:
    star = star_of(comm, path, tensor_parallel)
    context = star.encode(ids(CONTEXT))
    context.save(book)
    return star.logits(context, [5, 6, 7])


def load(comm: Any, path: Path, tensor_parallel: int, book: Path) -> Any:
    star = star_of(comm, path, tensor_parallel)
    context = star.load_context(book)
    longer = star.extend(context, [9, 10, 11])
    logits = star.logits(context, [5, 6, 7])
    return logits, star.generate(longer, [5, 6], max_new_tokens=3).token_ids


MESHES = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]


@pytest.mark.parametrize(
    ("writers", "readers"),
    in_turn(3, [(writers,) for writers in MESHES], [(readers,) for readers in MESHES]),
)
def test_any_mesh_reads_what_any_other_wrote(
    pool: Pool, models: Path, tmp_path: Path, writers: tuple[int, int], readers: tuple[int, int]
) -> None:
    arguments: dict[str, Any] = dict(path=on_disk(models, "qwen3"), book=tmp_path / "book.star")

    def run(task: Any, ranks: int, tensor_parallel: int) -> Any:
        if ranks == 1:
            return task(SoloComm(), tensor_parallel=1, **arguments)
        return pool.run(task, ranks, tensor_parallel=tensor_parallel, **arguments)[0]

    expected = run(save, *writers)
    logits, tokens = run(load, *readers)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    assert tokens == run(load, 1, 1)[1]


# ------------------------------------------------------------------ answers


def answer_in_all_modes(comm: Any, path: Path, tensor_parallel: int, method: str) -> Any:
    sizes = {} if method == "star" else NO_SIZES
    star = star_of(comm, path, tensor_parallel, method=method, **sizes)
    torch.manual_seed(star.rank)  # rank 0 alone samples
    queries = [[5, 6, 7], [8, 9]]
    contexts = star.encode([ids(40), ids(40, seed=2), ids(25)])
    context = contexts[0]
    length: dict[str, Any] = dict(max_new_tokens=5, ignore_eos=True)
    sampling: dict[str, Any] = dict(do_sample=True, seed=3, num_return_sequences=2)
    answers = [
        star.generate(context, queries, **length),
        star.generate(context, queries[0], **sampling, **length),
        star.generate(context, queries, num_beams=3, **length),
        star.generate(context, queries[0], prompt_lookup_num_tokens=3, **length),
        star.generate(contexts[1], queries[0], **length),
        star.generate(contexts[2], queries[0], **length),
    ]
    return [
        [reply.token_ids for reply in (replies if isinstance(replies, list) else [replies])]
        for replies in answers
    ]


@pytest.mark.parametrize("method", ["star", "dense", "ring"])
def test_every_mode_is_as_on_one_rank(pool: Pool, models: Path, method: str) -> None:
    path = on_disk(models, "gemma3")
    results = pool.run(answer_in_all_modes, 4, path=path, tensor_parallel=2, method=method)
    solo_method = "dense" if method == "ring" else method
    assert results == [answer_in_all_modes(SoloComm(), path, 1, solo_method)] * 4


def stream(comm: TorchComm) -> Any:
    star = StarLLM.from_pretrained(
        BUNDLED,
        dtype="float32",
        device="cpu",
        comm=comm,
        block_size=64,
        tensor_parallel=min(2, comm.size),
    )
    book = "The tea is hot and the cup is blue.\n" * 30
    context = star.encode([{"role": "user", "content": book}])
    length: dict[str, Any] = dict(max_new_tokens=8, ignore_eos=True)
    pieces = list(star.stream(context, [{"role": "user", "content": "What is hot?"}], **length))
    with star.stream(context, [{"role": "user", "content": "What is blue?"}], **length) as second:
        first_two = [piece for piece, _ in zip(second, range(2), strict=False)]
    return pieces, first_two, second.result.finish_reason


def test_streams(pool: Pool) -> None:
    assert pool.run(stream, 4) == [stream(SoloComm())] * 4


# ------------------------------------------------------------------ traffic


def count_bytes(
    comm: TorchComm, path: Path, tensor_parallel: int, anchor_source: str, tokens_per_forward: int
) -> Any:
    settings = dict(anchor_source=anchor_source, tokens_per_forward=tokens_per_forward)
    star = star_of(comm, path, tensor_parallel, **settings)
    context = star.encode(ids(CONTEXT))
    reply = star.generate(context, ids(9), max_new_tokens=5, ignore_eos=True)
    return context.wire, context.wire_within, reply.wire, reply.wire_within


WAYS = [
    (2, 2, None, "broadcast"),
    (4, 2, "reduce", "local"),
    (6, 2, "gather", "broadcast"),
    (4, 1, None, "broadcast"),
]


@pytest.mark.parametrize(
    ("name", "tokens_per_forward", "ranks", "tensor_parallel", "merge_collective", "source"),
    in_turn(2, ["llama", "mixtral"], [4, 48], WAYS),
)
def test_bytes_are_the_plans(
    pool: Pool,
    models: Path,
    name: str,
    ranks: int,
    tensor_parallel: int,
    merge_collective: str | None,
    source: str,
    tokens_per_forward: int,
) -> None:
    settings: dict[str, Any] = dict(
        tokens_per_forward=tokens_per_forward, tensor_parallel=tensor_parallel
    )
    results = pool.run(
        count_bytes,
        ranks,
        merge_collective=merge_collective,
        path=on_disk(models, name),
        anchor_source=source,
        **settings,
    )
    shape = model_shape(model(name).config, "float32")
    cp_size = ranks // tensor_parallel
    plan = BlockPlan(context_tokens=CONTEXT, **SIZES, ranks=cp_size)
    lengths = dict(query_tokens=9, answer_tokens=5)
    predicted = (
        traffic.phase1_cp(shape, plan, anchor_source=source, **settings),
        traffic.phase1_tp(shape, plan, anchor_source=source, **settings),
        traffic.phase2_cp(shape, cp_size, merge_collective=merge_collective, **lengths, **settings),
        traffic.phase2_tp(shape, cp_size, **lengths, **settings),
    )
    assert results == [predicted] * ranks
    assert (predicted[1].bytes > 0) == (tensor_parallel > 1)
