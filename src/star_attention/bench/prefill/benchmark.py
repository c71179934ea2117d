"""`bench prefill`: the time to encode a context, for each method at each length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import ClassVar

from star_attention.bench.benchmark import Benchmark, Target
from star_attention.bench.models import random_ids
from star_attention.bench.prefill import paper, plots
from star_attention.bench.prefill.cases import Case
from star_attention.bench.prefill.contenders import (
    CONTENDERS,
    EngineSettings,
    Job,
    dense_flops,
)
from star_attention.bench.prefill.rows import PrefillRow, extrapolate, table
from star_attention.bench.ranks import NOT_HERE, attempt, measure
from star_attention.planning.sizes import parse_size
from star_attention.tools.machine import Ceilings


@dataclass(frozen=True, kw_only=True)
class Prefill(Benchmark[PrefillRow]):
    """Settings of `bench prefill`.

    Attributes:
        cases: what to measure, from `plan_cases`.
        repeats: runs after the first. With 0 the first counts, after a run on a short context.
        engine: settings of this library's engine.
    """

    name: ClassVar[str] = "prefill"
    cases: list[Case]
    repeats: int
    engine: EngineSettings

    @property
    def longest_input(self) -> int:
        return max((case.context for case in self.cases if not case.extrapolated), default=0)

    def run(self, target: Target) -> Iterator[PrefillRow]:
        rows: list[PrefillRow] = []
        for number, case in enumerate(self.cases, 1):
            row = self._empty_row(case, target)
            if case.extrapolated:
                rows.append(extrapolate(row, dense_flops(target.shape, case.context), rows))
            else:
                target.progress(f"{number} of {len(self.cases)}: {case}")
                rows.append(self._measure(row, target))
            yield rows[-1]

    def _empty_row(self, case: Case, target: Target) -> PrefillRow:
        return PrefillRow(
            method=case.method,
            context=case.context,
            block=case.block,
            asked=case.block_option,
            ranks=case.ranks,
            tensor_parallel=1 if case.ranks == 1 else target.tensor_parallel,
            kv_dtype=self.engine.kv_dtype,
            anchor=None
            if self.engine.anchor_size is None or not CONTENDERS[case.method].takes_block
            else parse_size(self.engine.anchor_size, "anchor_size"),
        )

    def _measure(self, row: PrefillRow, target: Target) -> PrefillRow:
        alone = row.ranks == 1
        if alone and not target.is_first:
            return replace(row, failed=NOT_HERE)
        job = Job(
            target=target,
            ids_L=random_ids(target.model, row.context),
            block=row.block,
            settings=self.engine,
            alone=alone,
        )
        timed, reason = attempt(job.comm, lambda: self._timed(row, job))
        return timed or replace(row, failed=reason)

    def _timed(self, row: PrefillRow, job: Job) -> PrefillRow:
        """Time an encoding, and complete its row."""
        workload, device = CONTENDERS[row.method].prepare(job), job.target.device
        if workload.warm_up is not None and not self.repeats:
            workload.warm_up()
        runs = [measure(workload.encode, device, workload.comm) for _ in range(1 + self.repeats)]
        first, counted = runs[0], runs[1:] or runs
        seconds = median(run.seconds for run in counted)
        rate = workload.busiest_flops / seconds
        peaks = counted[-1].peak_bytes
        return replace(
            row,
            seconds=seconds,
            all_seconds=tuple(run.seconds for run in counted),
            first_s=first.seconds,
            flops=workload.flops.total,
            linear_flops=workload.flops.linear,
            attention_flops=workload.flops.attention,
            busiest_flops=workload.busiest_flops,
            helped_layers=workload.helped_layers,
            flops_per_s=rate,
            of_ceiling=rate / job.target.ceilings.flops_per_s,
            working_bytes=None if peaks is None else _working_bytes(peaks, workload.fixed_bytes),
            peak_bytes=peaks,
            wire_bytes=counted[-1].wire_bytes,
            kv_dtype=workload.kv_dtype,
        )

    def table(self, rows: list[PrefillRow]) -> list[tuple[str, ...]]:
        return table(rows)

    def comparison(self, rows: list[PrefillRow]) -> list[tuple[str, ...]]:
        return paper.table(rows)

    def draw(self, rows: list[PrefillRow], ceilings: Ceilings, folder: Path) -> list[Path]:
        return plots.draw(rows, ceilings.flops_per_s, folder)


def _working_bytes(peaks: tuple[int, ...], fixed_bytes: list[int]) -> int:
    """Return the most memory of a rank beyond weights, keys and values."""
    tensor_parallel = len(peaks) // len(fixed_bytes)
    return max(peak - fixed_bytes[rank // tensor_parallel] for rank, peak in enumerate(peaks))
