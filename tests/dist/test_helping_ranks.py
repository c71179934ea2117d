"""Rank 0 computes first layers of other ranks' last blocks: nothing in the answers shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import EncodedContext, StarLLM, phase1
from star_attention.distributed import SoloComm, TorchComm
from star_attention.hf.shape import model_shape
from star_attention.planning import helping, traffic
from star_attention.planning.helping import Help, helps_of_shape
from star_attention.planning.plan import BlockPlan
from tests.dist.checks import answer, answer_with, check_model, check_tiny
from tests.dist.pool import Pool
from tests.dist.test_batch_ranks import led
from tests.dist.tp_models import model as tp_model
from tests.dist.tp_models import on_disk, star_of
from tests.engines import CONTEXT, ids, tiny
from tests.families import FAMILIES
from tests.tiers import in_turn


@contextmanager
def attention_counts() -> Iterator[None]:
    """Let attention take nearly all of the time, as it does where blocks are long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helping, "LINEAR_PAIRS", 1)
        yield


def planned(name: str, ranks: int, forward: int, block: int, anchor: int) -> list[Help]:
    shape = model_shape(tiny(name).config, "float32")
    plan = BlockPlan(context_tokens=CONTEXT, block_size=block, anchor_size=anchor, ranks=ranks)
    with attention_counts():
        return helps_of_shape(shape, plan, tokens_per_forward=forward)


def answer_helped(comm: TorchComm, name: str, **settings: Any) -> dict[str, Any]:
    with attention_counts():
        return answer(comm, name, **settings)


SIZES = [
    # A block is a forward, or takes several, or a forward takes two; a short last block.
    dict(block_size=16, anchor_size=16, tokens_per_forward=16),
    dict(block_size=16, anchor_size=10, tokens_per_forward=5),
    dict(block_size=8, anchor_size=8, tokens_per_forward=16),
    dict(block_size=24, anchor_size=24, tokens_per_forward=24),
]


@pytest.mark.parametrize(
    ("name", "ranks", "sizes"),
    in_turn(3, ["llama", "gemma", "qwen3_moe"], [2, 3, 4], SIZES),
)
def test_answers_are_those_of_the_law(
    pool: Pool, name: str, ranks: int, sizes: dict[str, int]
) -> None:
    forward = sizes["tokens_per_forward"]
    given = planned(name, ranks, forward, sizes["block_size"], sizes["anchor_size"])
    assert given or (ranks, forward) == (3, 24)
    results = pool.run(answer_helped, ranks, name=name, **sizes)
    check_tiny(results, name, sizes["block_size"], sizes["anchor_size"])


HELPED = [name for name in FAMILIES if name != "longcat_flash" and planned(name, 2, 16, 16, 16)]


@pytest.mark.parametrize("name", in_turn(12, HELPED))
def test_families_are_split_between_layers(pool: Pool, name: str) -> None:
    results = pool.run(answer_helped, 2, name=name, **SIZES[0])
    check_tiny(results, name, 16, 16)


# ------------------------------------------------------------------ work and bytes


def count_work(comm: TorchComm, **settings: Any) -> tuple[list[int], Any]:
    """Return the tokens through each layer's MLP on this rank, and the bytes of phase 1."""
    model = tiny("llama")
    star = StarLLM(model, comm=comm, **settings)
    star.encode(ids(4))  # the probe of what layers store is not counted
    tokens = [0] * model.config.num_hidden_layers

    def count(index: int, arguments: Any) -> None:
        tokens[index] += arguments[0].shape[1]

    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, index=index: count(index, args))
        for index, layer in enumerate(model.get_decoder().layers)
    ]
    try:
        with attention_counts():
            return tokens, star.encode(ids(CONTEXT)).wire
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("ranks", "sizes", "balance_ranks"),
    [*in_turn(2, [2, 3, 4], SIZES, [True]), (2, SIZES[0], False)],
)
def test_work_and_bytes_are_the_plans(
    pool: Pool, ranks: int, sizes: dict[str, int], balance_ranks: bool
) -> None:
    forward, block, anchor = (
        sizes[name] for name in ("tokens_per_forward", "block_size", "anchor_size")
    )
    given = planned("llama", ranks, forward, block, anchor) if balance_ranks else []
    plan = BlockPlan(context_tokens=CONTEXT, block_size=block, anchor_size=anchor, ranks=ranks)
    results = pool.run(count_work, ranks, balance_ranks=balance_ranks, **sizes)
    for rank, (tokens, _) in enumerate(results):
        # Of the last layer nothing but keys is computed.
        expected = [plan.rank_tokens(rank)] * 2 + [0]
        for each in given:
            for layer in range(each.layers):
                expected[layer] += {0: each.tokens, each.rank: -each.tokens}.get(rank, 0)
        assert tokens == expected
    shape = model_shape(tiny("llama").config, "float32")
    with attention_counts():
        predicted = traffic.phase1_cp(
            shape, plan, tokens_per_forward=forward, balance_ranks=balance_ranks
        )
    assert [wire for _, wire in results] == [predicted] * ranks


def test_tensor_parallel_ranks_are_helped_by_those_with_the_same_heads(
    pool: Pool, models: Path
) -> None:
    path = on_disk(models, "llama")
    settings: dict[str, Any] = dict(block_size=16, anchor_size=16, tokens_per_forward=16)
    results = pool.run(answer_sharded, 4, path=path, **settings)
    check_model(results, tp_model("llama"), 16, 16, tensor_parallel=2)
    shape = model_shape(tp_model("llama").config, "float32")
    plan = BlockPlan(context_tokens=CONTEXT, block_size=16, anchor_size=16, ranks=2)
    with attention_counts():
        assert helps_of_shape(shape, plan, tokens_per_forward=16)
        predicted = traffic.phase1_cp(shape, plan, tokens_per_forward=16, tensor_parallel=2)
    assert [result["wire"] for result in results] == [predicted] * 4


def answer_sharded(comm: TorchComm, path: Path, **settings: Any) -> dict[str, Any]:
    with attention_counts():
        star = star_of(comm, path, 2, **settings)
        return answer_with(star) | dict(wire=star.encode(ids(CONTEXT)).wire)


def encode_in_a_batch(star: StarLLM) -> list[Any]:
    """Return what two contexts sent, of which a batch has encoded the first, and both shards."""
    with star.batch() as batch:
        # Rows would send something, too.
        context = batch.encode(ids(CONTEXT)).result()
        row = batch.add(context, ids(5), max_new_tokens=8, ignore_eos=True)
        canceled = batch.encode(ids(CONTEXT, seed=2))
        while not canceled.progress:
            batch.step()
        canceled.cancel()
        row.result()
    contexts = [context, star.encode(ids(CONTEXT))]
    return [[context.wire for context in contexts], shards(contexts)]


def led_helped(comm: TorchComm, session: Callable[..., Any], **arguments: Any) -> Any:
    with attention_counts():
        return led(comm, session, **arguments)


def test_rank_0_computes_nothing_for_others_in_a_batch(pool: Pool) -> None:
    """Ranks pause together there, and would all wait for it; calls after a canceled one may."""
    settings = dict(block_size=16, tokens_per_forward=16)
    (wires, (beside, alone)), _ = pool.run(
        led_helped, 2, session=encode_in_a_batch, settings=settings
    )
    shape = model_shape(tiny("llama").config, "float32")
    plan = BlockPlan(context_tokens=CONTEXT, block_size=16, anchor_size=16, ranks=2)
    with attention_counts():
        expected = [
            traffic.phase1_cp(shape, plan, tokens_per_forward=16, balance_ranks=balance_ranks)
            for balance_ranks in (False, True)
        ]
    assert wires == expected
    assert expected[0].bytes < expected[1].bytes
    torch.testing.assert_close(beside, alone, rtol=0, atol=0)


# ------------------------------------------------------------------ settings and later calls


def shards(contexts: list[EncodedContext]) -> list[Any]:
    return [
        [[layer.slice(*run) for run in layer.segments] for layer in context.kv.layers]
        for context in contexts
    ]


def encode_helped(
    comm: Any, settings: dict[str, Any], book: Path | None = None, compiled: bool = False
) -> list[Any]:
    """Return this rank's keys and values of two contexts of one batch, and of an extended one."""
    settings = dict(block_size=16, tokens_per_forward=32) | settings
    star = StarLLM(tiny("llama"), comm=comm, **settings)
    with attention_counts(), pytest.MonkeyPatch.context() as patch:
        if compiled:
            patch.setattr(phase1, "_WORTH_COMPILING", 1)
        contexts = star.encode([ids(CONTEXT), ids(CONTEXT, seed=2)])
        if book is not None:
            contexts[1].save(book)
        return shards([*contexts, star.extend(contexts[0], ids(20, seed=3))])


KINDS = [
    {},
    dict(kv_dtype="fp8"),
    # A block takes four forwards of each context: later ones read what is stored of the earlier.
    dict(kv_dtype="fp8", tokens_per_forward=8),
    dict(kv_device="cpu"),
    dict(anchor_size=7),
    dict(anchor_source="local"),
    dict(balance_ranks=False),
]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_shards_have_the_bits_of_one_rank(pool: Pool, settings: dict[str, Any]) -> None:
    parts = pool.run(encode_helped, 2, settings=settings)
    alone = encode_helped(SoloComm(), settings)
    # Rank 0 has the first blocks, and rank 1 those after them.
    for first, second, whole in zip(*parts, alone, strict=True):
        for layers in zip(first, second, whole, strict=True):
            for name in (0, 1):
                left, right, expected = (
                    torch.cat([run[name] for run in runs], 2) for runs in layers
                )
                assert torch.equal(torch.cat([left, right], 2), expected)


def test_a_saved_context_has_them_too(pool: Pool, tmp_path: Path) -> None:
    book = tmp_path / "book.star"
    parts = pool.run(encode_helped, 2, settings={}, book=book)
    loaded = StarLLM(tiny("llama"), block_size=16).load_context(book)
    (whole,) = shards([loaded])
    for first, second, ((keys, values),) in zip(parts[0][1], parts[1][1], whole, strict=True):
        assert torch.equal(torch.cat([first[0][0], second[0][0]], 2), keys)
        assert torch.equal(torch.cat([first[0][1], second[0][1]], 2), values)


@pytest.mark.slow
def test_compiled_layers_are_split_too(pool: Pool) -> None:
    parts = pool.run(encode_helped, 2, settings=dict(compile=True), compiled=True)
    alone = pool.run(encode_helped, 2, settings=dict(compile=False))
    for actual, expected in zip(parts, alone, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
