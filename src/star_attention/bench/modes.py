"""The ways in which benchmarks of answers use ranks and weights."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from star_attention.bench.benchmark import Target
from star_attention.bench.decode_rows import SHARD, SLICES, WHOLE
from star_attention.config import StarConfig
from star_attention.engine import StarLLM
from star_attention.hf.execution import slices


def ranks_of(target: Target, alone: bool) -> list[int]:
    """Return the numbers of ranks to measure: rank 0 by itself if `alone`, and all together."""
    return [1, target.ranks] if alone and target.ranks > 1 else [target.ranks]


def block_of(block: int, context: int, target: Target) -> int:
    """Return a block size in tokens that leaves no context-parallel rank without a block."""
    return min(block, max(1, context // (target.ranks // target.tensor_parallel)))


def weights_modes(ranks: int, target: Target, slice_weights: bool | None) -> list[str]:
    """Return what the ranks read of the weights; `slice_weights` None stands for both ways."""
    if target.tensor_parallel > 1:
        return [SHARD]
    if ranks == 1:
        return [WHOLE]
    if slice_weights is None:
        return [WHOLE, SLICES]
    return [SLICES if slice_weights else WHOLE]


def weights_settings(ranks: int, weights: str) -> dict[str, Any]:
    """Return the settings of an engine that reads weights in this way."""
    if ranks == 1 or weights == SHARD:
        return {}
    settings = {"slice_weights": weights == SLICES}
    known = {field.name for field in fields(StarConfig)}
    return settings if weights == SLICES or "slice_weights" in known else {}


def by_rule(star: StarLLM, weights: str, slice_weights: bool | None) -> StarLLM:
    """Return an engine that slices what saves time, if anything does and not all is asked for.

    Collective.
    """
    if weights != SLICES or slice_weights:
        return star
    comm, handle = star.runtime.comm, star.runtime.handle
    with star.runtime.collective("a benchmark"):
        parts = comm.run_on_rank_0(lambda: slices.choose(handle, comm, None))
    return star.with_config(slice_weights=None) if parts else star
