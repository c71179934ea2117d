"""Linear layers in fp8 on ranks: slices, shards and rings answer as plain weights of their values.

Forwards of few tokens multiply activations as they are, so that the mask oracle of those weights is
theirs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.distributed import SoloComm, TorchComm
from star_attention.linear.fp8 import Fp8Linear
from tests.dist.checks import answer_with, check_model
from tests.dist.pool import Pool
from tests.engines import ids
from tests.families import build
from tests.fp8_models import SIZES as SHAPE
from tests.fp8_models import plain, quantized

SIZES: dict[str, Any] = dict(block_size=24, anchor_size=10)


def answer(comm: Any, name: str, **settings: Any) -> dict[str, Any]:
    star = StarLLM(quantized(name), comm=comm, tokens_per_forward=48, **SIZES, **settings)
    return answer_with(star)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
@pytest.mark.parametrize("settings", [dict(slice_weights=True), dict(slice_weights=False)])
def test_context_parallel_ranks(pool: Pool, name: str, settings: dict[str, Any]) -> None:
    results = pool.run(answer, 2, name=name, **settings)
    check_model(results, plain(name), **SIZES)


def test_compiled_slices(pool: Pool) -> None:
    results = pool.run(answer, 2, name="llama", slice_weights=True, compile=True)
    check_model(results, plain("llama"), **SIZES)


def loaded(comm: Any, path: Path, tensor_parallel: int, weights: str | None = "fp8") -> StarLLM:
    return StarLLM.from_pretrained(
        path,
        comm=comm,
        device="cpu",
        weights=weights,
        tensor_parallel=tensor_parallel,
        tokens_per_forward=48,
        **SIZES,
    )


def answer_of_shards(comm: TorchComm, path: Path, tensor_parallel: int) -> dict[str, Any]:
    star = loaded(comm, path, tensor_parallel)
    layer = star.model.model.layers[1].mlp.down_proj
    assert type(layer) is Fp8Linear
    assert layer.in_features * tensor_parallel == SHAPE["intermediate_size"]
    assert star.runtime.identity["linear_weights"] == "fp8"
    return answer_with(star)


@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_ranks(pool: Pool, tmp_path: Path, ranks: int) -> None:
    build("qwen2", **SHAPE).save_pretrained(tmp_path)
    results = pool.run(answer_of_shards, ranks, path=tmp_path, tensor_parallel=2)
    check_model(results, plain("qwen2"), tensor_parallel=2, **SIZES)


def load_saved(comm: TorchComm, path: Path, file: Path) -> Any:
    star = loaded(comm, path, 2)
    reply = star.generate(star.load_context(file), ids(7), max_new_tokens=5, ignore_eos=True)
    return reply.token_ids


def test_a_context_of_one_rank_on_shards(pool: Pool, tmp_path: Path) -> None:
    """The identity is that of the whole model, whoever quantized it."""
    build("llama", **SHAPE).save_pretrained(tmp_path / "model")
    star = loaded(SoloComm(), tmp_path / "model", 1)
    context = star.encode(ids(101))
    context.save(tmp_path / "text.star")
    expected = star.generate(context, ids(7), max_new_tokens=5, ignore_eos=True).token_ids
    files = dict(path=tmp_path / "model", file=tmp_path / "text.star")
    assert pool.run(load_saved, 2, **files) == [expected] * 2


def many_tokens(comm: Any, path: Path, tensor_parallel: int, weights: str | None = "fp8") -> Any:
    star = loaded(comm, path, tensor_parallel, weights).with_config(
        block_size=128, tokens_per_forward=128, anchor_size=32
    )
    return star.logits(star.encode(ids(300)), ids(100))


def test_shards_quantize_their_own_activations(pool: Pool, tmp_path: Path) -> None:
    """Each rank scales its part of a token by itself, which is as close to plain weights."""
    build("llama", **SHAPE).save_pretrained(tmp_path)
    exact = many_tokens(SoloComm(), tmp_path, 1, None)
    one = many_tokens(SoloComm(), tmp_path, 1)
    two, _ = pool.run(many_tokens, 2, path=tmp_path, tensor_parallel=2)
    assert 0 < (one - two).norm() < (one - exact).norm()
    assert (two - exact).norm() < 1.2 * (one - exact).norm()
