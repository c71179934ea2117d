"""`bench startup`: extra time of first uses, for compiling, capturing and loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from star_attention.bench.benchmark import Benchmark, Target
from star_attention.bench.models import random_ids
from star_attention.bench.ranks import measure
from star_attention.errors import StarAttentionError
from star_attention.tools.machine import Progress

CACHES = ("empty", "filled")
"""States of torch's and Triton's caches on disk: on a new machine, and after the first process."""
_LAUNCHER = ("-m", "torch.distributed.run", "--standalone")
_TORCHRUN = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Variables by which torchrun places a process; those that it starts need others."""
_CACHE_FOLDERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@dataclass(frozen=True, kw_only=True)
class StartupRow:
    """One kind of work.

    Attributes:
        what: description of the work.
        first_s: time of the first run in a process.
        again_s: time of the second run.
        caches: one of `CACHES`.
        ranks: ranks that work together.
    """

    what: str
    first_s: float
    again_s: float
    ranks: int = 1
    caches: str = CACHES[0]

    @property
    def cost_s(self) -> float:
        return self.first_s - self.again_s


@dataclass(frozen=True, kw_only=True)
class Startup(Benchmark[StartupRow]):
    """Settings of `bench startup`, which measures this process; it must not have run a model yet.

    Attributes:
        context: length in tokens.
        block: block size in tokens.
        query_tokens: length of a query.
        compile: as for `StarLLM`.
    """

    name: ClassVar[str] = "startup"
    context: int
    block: int
    query_tokens: int
    compile: bool | None = None

    @property
    def longest_input(self) -> int:
        return self.context + self.query_tokens + 2

    def run(self, target: Target) -> Iterator[StartupRow]:
        star = target.engine(compile=self.compile, block_size=self.block)
        ids_L = random_ids(target.model, self.context)
        query = random_ids(target.model, self.query_tokens, seed=1)

        def time_twice(name: str, work: Callable[[], Any]) -> StartupRow:
            target.progress(name)
            comm = star.runtime.comm
            first, again = (measure(work, target.device, comm) for _ in range(2))
            return StartupRow(
                what=name, first_s=first.seconds, again_s=again.seconds, ranks=target.ranks
            )

        yield time_twice("a context", partial(star.encode, ids_L))
        context = star.encode(ids_L)
        generate = partial(star.generate, context, query, ignore_eos=True)
        yield time_twice("a query", partial(generate, max_new_tokens=1))
        yield time_twice("a further token", partial(generate, max_new_tokens=2))

    def table(self, rows: list[StartupRow]) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = [("caches", "work", "first s", "again s", "cost s")]
        lines += [
            (row.caches, row.what, *(f"{s:.2f}" for s in (row.first_s, row.again_s, row.cost_s)))
            for row in rows
        ]
        for caches in dict.fromkeys(row.caches for row in rows):
            cost_s = sum(row.cost_s for row in rows if row.caches == caches)
            lines.append((caches, "all", "", "", f"{cost_s:.2f}"))
        return lines


def run_in_new_processes(
    arguments: list[str], progress: Progress, ranks: int = 1
) -> tuple[dict[str, Any], list[StartupRow]]:
    """Measure a process with empty caches on disk, and a second one with the caches of the first.

    Args:
        arguments: of `star-attention`, for a command that prints the JSON of this benchmark.
        progress: called with a line before each process.
        ranks: processes that work together, under a torchrun of their own; on one, none.

    Returns:
        The JSON of the last process, and the rows of both.

    Raises:
        StarAttentionError: a process failed; the message ends with the end of its stderr.
    """
    rows: list[StartupRow] = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in _TORCHRUN and not name.startswith("TORCHELASTIC_")
        }
        environment |= {name: str(Path(folder, name.lower())) for name in _CACHE_FOLDERS}
        launcher = [] if ranks == 1 else [*_LAUNCHER, f"--nproc-per-node={ranks}"]
        for caches in CACHES:
            processes = "a process of its own" if ranks == 1 else f"{ranks} processes"
            progress(f"{processes}, caches {caches}")
            process = subprocess.run(
                [sys.executable, *launcher, "-m", "star_attention", *arguments],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if process.returncode:
                raise StarAttentionError(
                    f"the measured process failed: {process.stderr.strip()[-1000:]}"
                )
            record = json.loads(process.stdout.splitlines()[-1])
            rows += [replace(StartupRow(**row), caches=caches) for row in record["rows"]]
    return record, rows
