"""Contexts saved by several ranks, each its own shard, and loaded by any number of ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import SoloComm, TorchComm
from star_attention.errors import ContextSaveError, CorruptContextError
from star_attention.storage import writing
from tests.dist.pool import Pool
from tests.engines import CONTEXT, ids, tiny
from tests.tiers import in_turn

SIZES = dict(block_size=16, anchor_size=10)


def star_of(comm: Any, name: str, method: str) -> StarLLM:
    sizes: dict[str, Any] = SIZES if method == "star" else {}
    return StarLLM(tiny(name), comm=comm, method=method, reserve_tokens=64, **sizes)


def save(comm: Any, path: Path, name: str = "llama", method: str = "star") -> Any:
    star = star_of(comm, name, method)
    context = star.encode(ids(CONTEXT))
    context.save(path if comm.rank == 0 else "elsewhere")
    return star.logits(context, [5, 6, 7])


def load(comm: Any, path: Path, name: str = "llama", method: str = "star") -> Any:
    star = star_of(comm, name, method)
    context = star.load_context(path if comm.rank == 0 else "elsewhere")
    tokens = star.generate(context, [5, 6], max_new_tokens=3).token_ids
    if method == "star":
        star.extend(context, [9, 10, 11])
    return star.logits(context, [5, 6, 7]), tokens, context.kv.tokens


KINDS = [("llama", "star"), ("llama", "ring"), ("deepseek_v3", "star"), ("gemma3n", "star")]
# Each turn has more readers than writers, and fewer.
RANKS = [(3, 1), (1, 3), (2, 4), (3, 2), (4, 4), (3, 7)]


@pytest.mark.parametrize(("name", "method", "writers", "readers"), in_turn(2, KINDS, RANKS))
def test_any_number_of_ranks_reads_what_any_other_wrote(
    pool: Pool, tmp_path: Path, name: str, method: str, writers: int, readers: int
) -> None:
    path = tmp_path / "book.star"
    arguments: dict[str, Any] = dict(path=path, name=name, method=method)

    def run(task: Any, ranks: int) -> list[Any]:
        if ranks == 1:
            return [task(SoloComm(), **arguments)]
        return pool.run(task, ranks, **arguments)

    expected = run(save, writers)[0]
    assert path.is_dir() == (writers > 1)
    assert [file.name for file in tmp_path.iterdir()] == ["book.star"]
    results = run(load, readers)
    torch.testing.assert_close(results[0][0], expected, atol=2e-4, rtol=1e-4)
    assert sum(shard_tokens for _, _, shard_tokens in results) == CONTEXT
    assert [tokens for _, tokens, _ in results] == [results[0][1]] * readers


def test_saving_again_replaces_the_folder(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "book.star"
    for ranks in (3, 2):
        pool.run(save, ranks, path=path)
    names = ["index.json", "rank-0.safetensors", "rank-1.safetensors"]
    assert sorted(file.name for file in path.iterdir()) == names
    assert [file.name for file in tmp_path.iterdir()] == ["book.star"]
    assert oct(path.stat().st_mode & 0o777) == "0o700", "the text may be private"


def fail_to_save(comm: TorchComm, path: Path) -> str:
    star = star_of(comm, "llama", "star")
    context = star.encode(ids(CONTEXT, seed=3))
    real = writing.save_file

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if comm.rank == 1:
        writing.save_file = fail
    try:
        with pytest.raises(ContextSaveError) as raised:
            context.save(path)
    finally:
        writing.save_file = real
    return str(raised.value)


def test_a_full_disk_on_one_rank_leaves_the_old_context(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "book.star"
    pool.run(save, 3, path=path)
    before = (path / "index.json").read_bytes()
    messages = pool.run(fail_to_save, 3, path=path)
    assert all("No space left" in message for message in messages)
    assert [file.name for file in tmp_path.iterdir()] == ["book.star"]
    assert (path / "index.json").read_bytes() == before
    pool.run(load, 3, path=path)


@pytest.mark.parametrize("damage", ["lost", "bits", "cut", "foreign", "index", "no index"])
def test_damage_is_detected(pool: Pool, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "book.star"
    pool.run(save, 3, path=path)
    shard = path / "rank-1.safetensors"
    if damage == "lost":
        shard.unlink()
    elif damage == "bits":
        data = bytearray(shard.read_bytes())
        data[-100] ^= 1
        shard.write_bytes(data)
    elif damage == "cut":
        os.truncate(shard, shard.stat().st_size // 2)
    elif damage == "foreign":
        other = tmp_path / "other.star"
        pool.run(save, 2, path=other)
        shard.write_bytes((other / "rank-1.safetensors").read_bytes())
    elif damage == "index":
        index = json.loads((path / "index.json").read_text())
        index["header"] = index["header"].replace('"context_tokens": 101', '"context_tokens": 100')
        (path / "index.json").write_text(json.dumps(index))
    else:
        (path / "index.json").unlink()
    star = star_of(SoloComm(), "llama", "star")
    with pytest.raises(CorruptContextError):
        star.logits(star.load_context(path), [5, 6])
