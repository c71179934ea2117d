"""Edited contexts on several ranks: each copies what it holds, and nothing in the answers shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import SoloComm
from star_attention.errors import InvalidInputError
from star_attention.planning.segments import Segments
from tests.dist.pool import Pool
from tests.dist.tp_models import on_disk, star_of
from tests.engines import CONTEXT, QUERY, engine, ids

OLD = ids(CONTEXT)
NEW = [7, 8]
# Seven blocks, the last one ragged.
SIZES: dict[str, Any] = dict(block_size=16, tokens_per_forward=16)
PAPER: dict[str, Any] = dict(anchor_size=10)
LOOKBACK: dict[str, Any] = dict(anchor_size=5, lookback=2, lookback_layers="lower")


def session(star: StarLLM, folder: Path) -> list[Any]:
    """Make new versions of a context, and return what each answers, holds and has reused.

    Rank 0's arguments count.
    """
    leads = star.rank == 0
    old = star.encode(OLD if leads else [5])
    before = summary(star, old)
    versions = [
        star.edit(old, 40, 42, NEW if leads else []),
        star.edit(old, 60 if leads else 0, 61, [9, 10, 11]),
        star.edit(old, 3, 4, [9]),
        # One more block, whose neighbors move to another rank, and a few less.
        *star.encode([OLD + ids(14, seed=3), OLD[:50]], reuse=old),
    ]
    extended = star.extend(old, ids(40, seed=4))
    versions.append(star.edit(extended, 130, 132, NEW))
    versions.append(star.edit(star.edit(extended, 20, 20, NEW), 100, 101, [6]))
    old.save(folder / f"old-{star.num_ranks}.star")
    loaded = star.load_context(folder / f"old-{star.num_ranks}.star")
    versions.append(star.edit(loaded, 90, 92, NEW))
    # The rest of the first block is computed while other ranks already have the anchor.
    versions.append(star.edit(old, 12, 90, ids(78, seed=6)))
    assert str(summary(star, old)[0]) == str(before[0]), "the old context changed"
    return [summary(star, context) for context in versions]


def summary(star: StarLLM, context: Any) -> Any:
    """Return an answer, and keys and values by token."""
    reply = star.generate(context, ids(QUERY), max_new_tokens=4, return_logits=True)
    # Layers with a sliding window keep fewer tokens than the others, which may be none of a rank's.
    layers = [
        None if layer.is_empty else (tokens_of(layer.segments), torch.cat(layer.pair(), -1)[0])
        for layer in context.kv.layers
    ]
    return reply.token_ids, reply.logits, layers, context.reused_tokens


def tokens_of(segments: Segments) -> torch.Tensor:
    return torch.cat([torch.arange(*run) for run in segments] or [torch.tensor([])])


def on_ranks(comm: Any, name: str, folder: Path, **settings: Any) -> list[Any]:
    return session(engine(name, comm=comm, **SIZES, **settings), folder)


def in_mesh(comm: Any, path: Path, folder: Path, **settings: Any) -> list[Any]:
    return session(star_of(comm, path, 2, **SIZES, **settings), folder)


def following(comm: Any, folder: Path, **settings: Any) -> list[Any]:
    star = engine("llama", comm=comm, **SIZES, **settings)
    if star.rank > 0:
        star.follow()
        return []
    seen = session(star, folder)
    star.close()
    return seen


def joined(results: list[Any], number: int) -> tuple[Any, Any, list[torch.Tensor]]:
    """Join the ranks' parts of a context's keys and values."""
    parts = [result[number] for result in results]
    layers = []
    for of_ranks in zip(*(layers for _, _, layers, _ in parts), strict=True):
        held = [part for part in of_ranks if part is not None]
        if held:
            tokens, pairs = zip(*held, strict=True)
            layers.append(torch.cat(pairs, 1)[:, torch.cat(tokens).argsort()])
    return parts[0][0], parts[0][1], layers


def assert_same(results: list[Any], alone: list[Any], *, tolerance: float = 1e-4) -> None:
    for number in range(len(alone)):
        tokens, logits, layers = joined(results, number)
        right_tokens, right_logits, right_layers = joined([alone], number)
        assert tokens == right_tokens
        torch.testing.assert_close(logits, right_logits, atol=tolerance, rtol=tolerance)
        for layer, right in zip(layers, right_layers, strict=True):
            torch.testing.assert_close(layer, right, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("settings", [PAPER, LOOKBACK], ids=["paper", "look-back"])
@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("llama", 2),
        ("llama", 3),
        *(
            pytest.param(name, ranks, marks=pytest.mark.slow)
            for name in ("gemma3", "deepseek_v3", "gemma3n")
            for ranks in (2, 3, 5)
        ),
    ],
)
def test_versions_on_ranks_are_those_of_one_process(
    pool: Pool, tmp_path: Path, name: str, ranks: int, settings: dict[str, Any]
) -> None:
    alone = on_ranks(SoloComm(), name, tmp_path, **settings)
    results = pool.run(on_ranks, ranks, name=name, folder=tmp_path, **settings)
    assert_same(results, alone)
    reused, reused_alone = ([version[-1] for version in each] for each in (results[0], alone))
    # Only blocks that moved to another rank make a difference.
    assert reused[:3] == reused_alone[:3]
    # Layers that keep their window alone may have nothing of earlier blocks.
    if name not in ("gemma3", "gemma3n"):
        assert all(0 < tokens for tokens in [reused[0], *reused[3:6]])
    assert all(tokens <= most for tokens, most in zip(reused, reused_alone, strict=True))


def test_fp8_on_ranks(pool: Pool, tmp_path: Path) -> None:
    settings = LOOKBACK | dict(kv_dtype="fp8")
    alone = on_ranks(SoloComm(), "llama", tmp_path, **settings)
    results = pool.run(on_ranks, 2, name="llama", folder=tmp_path, **settings)
    for number in (0, 1):
        _, logits, _ = joined(results, number)
        _, right, _ = joined([alone], number)
        assert (logits - right).norm() / right.norm() < 0.1


def test_ranks_follow_edits(pool: Pool, tmp_path: Path) -> None:
    alone = on_ranks(SoloComm(), "llama", tmp_path, **LOOKBACK)
    first, *others = pool.run(following, 3, folder=tmp_path, **LOOKBACK)
    assert [version[0] for version in first] == [version[0] for version in alone]
    assert others == [[], []]


@pytest.mark.slow
def test_edits_in_a_mesh(pool: Pool, tmp_path: Path) -> None:
    path = on_disk(tmp_path, "llama")
    alone = session(star_of(SoloComm(), path, 1, **SIZES, **LOOKBACK), tmp_path)
    results = pool.run(in_mesh, 4, path=path, folder=tmp_path, **LOOKBACK)
    assert [version[0] for version in results[0]] == [version[0] for version in alone]


def refused(comm: Any) -> str:
    star = engine("llama", comm=comm, method="ring")
    context = star.encode(OLD)
    with pytest.raises(InvalidInputError) as caught:
        star.edit(context, 40, 42, NEW)
    # The ranks go on together.
    assert len(star.encode(OLD)) == CONTEXT
    return str(caught.value)


def test_ring_contexts_are_refused_on_all_ranks(pool: Pool) -> None:
    assert all("a ring context cannot be reused" in text for text in pool.run(refused, 2))
