"""Small models whose heads and MLPs divide by 2 and 4, saved for `tensor_parallel`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from star_attention import StarLLM
from tests.families import build

SIZES = dict(block_size=24, anchor_size=10)
_HEADS = dict(num_attention_heads=8, num_key_value_heads=4, intermediate_size=120)


@functools.cache
def model(name: str) -> Any:
    return build(name, **_HEADS)


def on_disk(models: Path, name: str) -> Path:
    path = models / name
    if not path.exists():
        model(name).save_pretrained(path)
    return path


def star_of(comm: Any, path: Path, tensor_parallel: int, **settings: Any) -> StarLLM:
    return StarLLM.from_pretrained(
        path,
        comm=comm,
        device="cpu",
        tensor_parallel=tensor_parallel,
        reserve_tokens=64,
        **(SIZES | settings),
    )
