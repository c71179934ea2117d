"""What the first of everything costs beyond its work: compiling, capturing, and reading caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from star_attention.bench.subject import random_ids
from star_attention.engine import StarLLM
from star_attention.errors import StarAttentionError
from star_attention.tools import machine
from star_attention.tools.machine import Progress

CACHES = ("empty", "filled")
"""torch's and Triton's caches on disk: as on a new machine, and as in every process after the first."""
_CACHE_FOLDERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")

Twice = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of work. first_s: of the first time in a process; again_s: of the next. caches: one of `CACHES`."""

    what: str
    first_s: float
    again_s: float
    caches: str = CACHES[0]

    @property
    def cost_s(self) -> float:
        return self.first_s - self.again_s


def in_this_process(
    model: Any,
    *,
    context: int,
    block: int | None,
    query_tokens: int,
    compile: bool | None,
    progress: Progress,
) -> list[Row]:
    """Rows of a process that has done nothing yet."""
    device = next(model.parameters()).device
    star = StarLLM(model, block_size=block, compile=compile, comm="solo")
    ids_L, query = random_ids(model, context), random_ids(model, query_tokens, seed=1)
    rows = []

    def twice(what: str, work: Twice) -> None:
        progress(what)
        first_s, again_s = (machine.once(work, device) for _ in range(2))
        rows.append(Row(what=what, first_s=first_s, again_s=again_s))

    twice("a context", lambda: star.encode(ids_L))
    encoded = star.encode(ids_L)
    words: dict[str, Any] = dict(ignore_eos=True)
    twice("a query", lambda: star.generate(encoded, query, max_new_tokens=1, **words))
    twice("a further token", lambda: star.generate(encoded, query, max_new_tokens=2, **words))
    return rows


def in_new_processes(arguments: list[str], progress: Progress) -> tuple[dict[str, Any], list[Row]]:
    """What `arguments` print as JSON in a process with empty caches and in a second one: the record of the last, and all rows.

    Raises `StarAttentionError` with what such a process said where it failed.
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        own = {name: str(Path(folder, name.lower())) for name in _CACHE_FOLDERS}
        for caches in CACHES:
            progress(f"a process of its own, caches {caches}")
            command = [sys.executable, "-m", "star_attention", *arguments]
            done = subprocess.run(
                command, env=os.environ | own, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise StarAttentionError(
                    f"the measured process failed: {done.stderr.strip()[-1000:]}"
                )
            found = json.loads(done.stdout.splitlines()[-1])
            rows += [replace(Row(**row), caches=caches) for row in found["rows"]]
    return found, rows


def table(rows: list[Row]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("caches", "what", "first s", "again s", "cost s")]
    for row in rows:
        lines.append(
            (row.caches, row.what, f"{row.first_s:.2f}", f"{row.again_s:.2f}", f"{row.cost_s:.2f}")
        )
    for caches in dict.fromkeys(row.caches for row in rows):
        cost_s = sum(row.cost_s for row in rows if row.caches == caches)
        lines.append((caches, "all", "", "", f"{cost_s:.2f}"))
    return lines
