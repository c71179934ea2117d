"""`bench prefill`: the time to encode a context, for each method at each length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import ClassVar

from star_attention.bench.benchmark import Benchmark, Target
from star_attention.bench.models import random_ids
from star_attention.bench.prefill import plots
from star_attention.bench.prefill.cases import Case
from star_attention.bench.prefill.contenders import (
    CONTENDERS,
    EngineSettings,
    Workload,
    dense_flops,
)
from star_attention.bench.prefill.rows import PrefillRow, extrapolate, table
from star_attention.errors import first_line
from star_attention.tools import machine
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

    def run(self, target: Target) -> list[PrefillRow]:
        rows: list[PrefillRow] = []
        for number, case in enumerate(self.cases, 1):
            if case.extrapolated:
                flops = dense_flops(target.shape, case.context)
                rows.append(extrapolate(case.method, case.context, flops, rows))
            else:
                target.progress(f"{number} of {len(self.cases)}: {case}")
                rows.append(self._measure(case, target))
        return rows

    def _measure(self, case: Case, target: Target) -> PrefillRow:
        ids_L = random_ids(target.model, case.context)
        workload = CONTENDERS[case.method].prepare(target, ids_L, case.block, self.engine)
        if workload.warm_up is not None and not self.repeats:
            workload.warm_up()
        row = PrefillRow(
            method=case.method,
            context=case.context,
            block=case.block,
            asked=case.block_option,
            flops=workload.flops.total,
            linear_flops=workload.flops.linear,
            attention_flops=workload.flops.attention,
            kv_dtype=workload.kv_dtype,
        )
        return _timed(row, workload, target, self.repeats)

    def table(self, rows: list[PrefillRow]) -> list[tuple[str, ...]]:
        return table(rows)

    def draw(self, rows: list[PrefillRow], ceilings: Ceilings, folder: Path) -> list[Path]:
        return plots.draw(rows, ceilings.flops_per_s, folder)


def _timed(row: PrefillRow, workload: Workload, target: Target, repeats: int) -> PrefillRow:
    """Time a workload, and complete its row."""
    try:
        first_s, peak = machine.time_with_peak(workload.encode, target.device)
        seconds = [] if repeats else [first_s]
        for _ in range(repeats):
            run_s, peak = machine.time_with_peak(workload.encode, target.device)
            seconds.append(run_s)
    except machine.OUT_OF_MEMORY:
        return replace(row, failed="out of memory")
    except RuntimeError as error:  # a pinned kernel that does not take these shapes
        return replace(row, failed=first_line(error)[:120])
    flops_per_s = row.flops / median(seconds)
    return replace(
        row,
        seconds=median(seconds),
        all_seconds=tuple(seconds),
        first_s=first_s,
        flops_per_s=flops_per_s,
        of_ceiling=flops_per_s / target.ceilings.flops_per_s,
        working_bytes=None if peak is None else peak - workload.fixed_bytes,
    )
