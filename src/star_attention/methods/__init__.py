"""Attention methods, one short file each.

To add one: subclass `Star`, register it in `config.METHODS`, and give it a cache in `hf/cache` if
it attends differently. Benchmarks and estimates name the methods they know
(`bench/prefill/contenders.py`, `planning/estimate.py`).

A method says how a context is cut into blocks, which rank keeps which tokens, how a rank encodes
its own, and what queries see. The rest of the library asks the method and never compares its name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol

from star_attention.config import METHODS, StarConfig
from star_attention.errors import InvalidInputError, quote
from star_attention.planning.plan import BlockPlan
from star_attention.planning.segments import Segments
from star_attention.planning.windows import Windows

# Imports torch, which a command line does not need to be checked.
if TYPE_CHECKING:
    from star_attention.hf.execution.handle import ModelHandle
    from star_attention.phase1 import EncodeJob, Steps
    from star_attention.storage.kv import ContextKV, VisibleRange


class Method(Protocol):
    """An attention method.

    Attributes:
        name: its name in the registry.
        takes_sizes: True if `block_size` and `anchor_size` have a meaning for it.
        size_names: what its block size and anchor size are called in tables.
        shares_anchor: True if blocks other than the first attend to an anchor. Such methods can be
            compared by block and anchor size, their anchor can be ablated, and their blocks can
            look back.
    """

    name: str
    takes_sizes: bool
    size_names: tuple[str, str]
    shares_anchor: bool

    def plan(self, config: StarConfig, context_tokens: int, ranks: int) -> BlockPlan:
        """Cut a context into blocks, for a number of context-parallel ranks."""
        ...

    def layout(self, config: StarConfig, plan: BlockPlan) -> tuple[Segments, ...]:
        """Return the segments that each context-parallel rank keeps."""
        ...

    def visible_range(self, plan: BlockPlan) -> VisibleRange | None:
        """Return what queries see of the context; None for all of it."""
        ...

    def kept(
        self, plan: BlockPlan, segments: Segments, windows: Windows, kv_windows: str
    ) -> list[Segments]:
        """Return which of a rank's tokens each layer keeps, by the setting `kv_windows`."""
        ...

    def encode(self, job: EncodeJob) -> Steps[list[ContextKV]]:
        """Encode a batch of contexts in steps; return this rank's keys and values of each."""
        ...

    def why_not_extend(self, ranks: int) -> str | None:
        """Return why contexts on that many context-parallel ranks cannot be extended, or None."""
        ...

    def why_not_reuse(self) -> str | None:
        """Return why blocks of a context cannot be copied into a new version of it, or None."""
        ...

    def why_no_second_look(self) -> str | None:
        """Return why tokens of a context cannot be computed again for a query, or None."""
        ...

    def extended_plan(self, plan: BlockPlan, context_tokens: int) -> BlockPlan:
        """Return the plan of an extended context."""
        ...

    def describe(self, plan: BlockPlan) -> str:
        """Describe a context's sizes in a few words: `8 blocks x 16k, anchor 16k`."""
        ...


def check_lookback(name: str, lookback: int) -> None:
    """Refuse look-back over `lookback` blocks with a method whose blocks cannot look back.

    Raises:
        InvalidInputError: it cannot.
    """
    if lookback and not get(name).shares_anchor:
        raise InvalidInputError(
            f"lookback {lookback} does not work with method {quote(name)}, which has no blocks that"
            f" look back; use method {StarConfig.method!r}, or lookback=0 (quality 'paper')"
        )


def check_second_look(name: str, share: float) -> None:
    """Refuse a second look at a share of a context whose method has none.

    Raises:
        InvalidInputError: it has none.
    """
    refusal = get(name).why_no_second_look() if share else None
    if refusal is not None:
        raise InvalidInputError(f"second_look {share} does not work: {refusal}")


def rank_bytes(
    method: Method, config: StarConfig, plan: BlockPlan, handle: ModelHandle
) -> list[int]:
    """Return the bytes of a context's keys and values on each context-parallel rank."""
    windows, shapes = handle.windows, handle.layer_shapes
    by_rank = []
    for segments in method.layout(config, plan):
        kept = method.kept(plan, segments, windows, config.kv_windows)
        pairs = zip(shapes, kept, strict=True)
        by_rank.append(
            sum(shape.stored_bytes(config.kv_dtype) * own.tokens for shape, own in pairs if shape)
        )
    return by_rank


def get(name: str) -> Method:
    """Return the method of that name. Its module is imported on first use."""
    module, _, attribute = METHODS[name].partition(":")
    method: Method = getattr(importlib.import_module(module), attribute)()
    return method
