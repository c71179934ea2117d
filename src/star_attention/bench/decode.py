"""`bench decode`: milliseconds per token, and the time to read weights, keys and values once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from torch import Tensor

from star_attention.bench import decode_plots
from star_attention.bench.benchmark import Benchmark, Target
from star_attention.bench.decode_rows import SLICES, DecodeRow, table
from star_attention.bench.models import random_ids, weight_bytes_per_token
from star_attention.bench.modes import (
    block_of,
    by_rule,
    ranks_of,
    weights_modes,
    weights_settings,
)
from star_attention.bench.ranks import NOT_HERE, Spent, attempt, measure
from star_attention.engine import StarLLM
from star_attention.hf.execution import slices
from star_attention.planning.plan import BlockPlan
from star_attention.planning.residency import staying
from star_attention.planning.sizes import format_size
from star_attention.planning.stored import stored_bytes
from star_attention.planning.windows import LAST
from star_attention.storage.context import EncodedContext
from star_attention.tools import machine
from star_attention.tools.machine import Ceilings


@dataclass(frozen=True, kw_only=True)
class Decode(Benchmark[DecodeRow]):
    """Settings of `bench decode`.

    Attributes:
        contexts: lengths in tokens.
        block: block size in tokens; of a shorter context each rank has one.
        queries: number of queries in a batch.
        query_tokens, answer_tokens: length of a query and of an answer.
        repeats: runs of each, of which the median counts.
        compile: True or False; None measures both on a GPU and False elsewhere.
        slice_weights: True or False; None measures both on several ranks, and slices what saves
            time, or all if nothing does.
        alone: of several ranks, also measure rank 0 by itself.
        kv_dtype, kv_device, kv_resident, kv_windows: as for `StarLLM`.
    """

    name: ClassVar[str] = "decode"
    contexts: list[int]
    block: int
    queries: int
    query_tokens: int
    answer_tokens: int
    repeats: int
    compile: bool | None = None
    slice_weights: bool | None = None
    alone: bool = True
    kv_dtype: str | None = None
    kv_device: str | None = None
    kv_resident: float | str = 0.0
    kv_windows: str = LAST

    @property
    def longest_input(self) -> int:
        return max(self.contexts) + self.query_tokens + self.answer_tokens

    def run(self, target: Target) -> Iterator[DecodeRow]:
        groups = [
            [self._empty_row(context, ranks, mode, target) for mode in self._modes(ranks, target)]
            for context in self.contexts
            for ranks in ranks_of(target, self.alone and target.tensor_parallel == 1)
        ]
        number, total = 0, sum(map(len, groups))
        for group in groups:
            context: list[EncodedContext] = []
            for row in group:
                number += 1
                target.progress(f"{number} of {total}: {row.label}, {format_size(row.context)}")
                yield self._measured(row, context, target)

    def _modes(self, ranks: int, target: Target) -> list[tuple[bool, str]]:
        """Return what is measured of each context: compiled or not, and how weights are read."""
        compiled = [True, False] if target.device.type == "cuda" else [False]
        if self.compile is not None:
            compiled = [self.compile]
        weights = weights_modes(ranks, target, self.slice_weights)
        return [(mode, kind) for mode in compiled for kind in weights]

    def _empty_row(
        self, context: int, ranks: int, mode: tuple[bool, str], target: Target
    ) -> DecodeRow:
        compiled, weights = mode
        block, tensor_parallel = block_of(self.block, context, target), target.tensor_parallel
        plan = BlockPlan.resolve(context, block, None, ranks // tensor_parallel)
        kv_bytes = max(
            stored_bytes(target.shape, plan, rank, self.kv_dtype, self.kv_windows)
            for rank in range(plan.ranks)
        )
        read_bytes = weight_bytes_per_token(target.model)
        if weights == SLICES:
            read_bytes //= ranks
        read_bytes += kv_bytes // tensor_parallel
        return DecodeRow(
            context=context,
            block=block,
            compiled=compiled,
            ranks=ranks,
            tensor_parallel=tensor_parallel,
            weights=weights,
            queries=self.queries,
            query_tokens=self.query_tokens,
            tokens=self.answer_tokens,
            kv_dtype=self.kv_dtype,
            kv_device=self.kv_device,
            kv_resident=float(self.kv_resident),
            kv_windows=self.kv_windows,
            read_bytes=read_bytes,
            floor_s=read_bytes / target.ceilings.bytes_per_s,
            **self._link(kv_bytes // tensor_parallel, target),
        )

    def _link(self, kv_bytes: int, target: Target) -> dict[str, Any]:
        """Return what a token takes over the link from host memory, and the link's rate."""
        if self.kv_device is None:
            return {}
        layers = len(target.shape.kv_elements_by_layer)
        near = kv_bytes * staying(layers, float(self.kv_resident)) // layers
        return dict(
            link_bytes=kv_bytes - near, link_bytes_per_s=machine.measure_link(target.device)
        )

    def _measured(self, row: DecodeRow, context: list[EncodedContext], target: Target) -> DecodeRow:
        """Measure a row. `context` holds the encoded context, or is empty and receives it."""
        if row.ranks < target.ranks and not target.is_first:
            return replace(row, failed=NOT_HERE)
        comm = target.comm_of(alone=row.ranks < target.ranks)
        timed, reason = attempt(comm, lambda: self._timed(row, context, target))
        if timed is None:
            # What a failed call has left of it is not to be trusted.
            context.clear()
        return timed or replace(row, failed=reason)

    def _timed(self, row: DecodeRow, context: list[EncodedContext], target: Target) -> DecodeRow:
        star = self._engine(row, target)
        if row.weights == SLICES and star.config.slice_weights is None:
            row = self._with_chosen_slices(row, star, target)
        encode_s = None
        if not context:
            target.check_memory(star, row.context)
            context.append(star.encode(random_ids(target.model, row.context)))
            encode_s = context[0].encode_s
        queries: list[Tensor] = [
            random_ids(target.model, self.query_tokens, seed) for seed in range(1, self.queries + 1)
        ]
        generate = partial(star.generate, context[0], queries, ignore_eos=True)

        def spent(tokens: int) -> Spent:
            work = partial(generate, max_new_tokens=tokens)
            return measure(work, target.device, star.runtime.comm)

        first = spent(2)
        whole = [spent(row.tokens) for _ in range(self.repeats)]
        one = [spent(1) for _ in range(self.repeats)]
        steps = max(1, row.tokens - 1)
        one_token_s = median(run.seconds for run in one)
        return replace(
            row,
            encode_s=encode_s,
            token_s=(median(run.seconds for run in whole) - one_token_s) / steps,
            ttft_s=one_token_s,
            first_s=first.seconds,
            peak_bytes=whole[-1].peak_bytes,
            wire_bytes=(whole[-1].wire_bytes - one[-1].wire_bytes) // steps,
        )

    def _engine(self, row: DecodeRow, target: Target) -> StarLLM:
        settings = weights_settings(row.ranks, row.weights) | dict(
            block_size=row.block,
            kv_dtype=self.kv_dtype,
            kv_device=self.kv_device,
            kv_resident=self.kv_resident,
            kv_windows=self.kv_windows,
        )
        alone = row.ranks < target.ranks
        star = target.engine(alone=alone, compile=row.compiled, **settings)
        return by_rule(star, row.weights, self.slice_weights)

    def _with_chosen_slices(self, row: DecodeRow, star: StarLLM, target: Target) -> DecodeRow:
        """Return the row with what is read if an engine slices only what saves time."""
        handle, comm = star.runtime.handle, star.runtime.comm
        saved = slices.saved_bytes(handle, comm, slices.choose(handle, comm, None))
        weights = weight_bytes_per_token(target.model)
        read_bytes = row.read_bytes + weights - weights // row.ranks - saved
        return replace(row, read_bytes=read_bytes, floor_s=read_bytes / target.ceilings.bytes_per_s)

    def table(self, rows: list[DecodeRow]) -> list[tuple[str, ...]]:
        return table(rows)

    def draw(self, rows: list[DecodeRow], ceilings: Ceilings, folder: Path) -> list[Path]:
        return decode_plots.draw(rows, folder)
