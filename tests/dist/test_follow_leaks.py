"""Hundreds of calls that rank 0 leads leave nothing on any rank."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import torch

from star_attention import StarLLM
from star_attention.distributed import TorchComm
from tests.dist.pool import Pool
from tests.dist.test_follow import STORY, new_engine

ANSWERS = 200


def in_use() -> dict[str, int]:
    """Return what this process holds: Python's objects, tensors, threads, files, and MiB."""
    gc.collect()
    objects = gc.get_objects()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return dict(
        objects=len(objects),
        # Not isinstance, which asks proxies for their class.
        tensors=sum(issubclass(type(item), torch.Tensor) for item in objects),
        threads=threading.active_count(),
        files=len(os.listdir("/proc/self/fd")),
        mebibytes=pages * os.sysconf("SC_PAGE_SIZE") // 2**20,
    )


def ask(star: StarLLM, answers: int) -> None:
    """Answer queries on one context, with contexts and streams that come and go."""
    context = star.encode(STORY)
    for number in range(answers):
        if number % 20 == 0:
            other = star.encode(STORY)
            star.extend(other, " The cup is blue.")
            del other
        if number % 10 == 0:
            # Left half-way.
            next(star.stream(context, "A dog", max_new_tokens=8, ignore_eos=True))
        star.generate(context, "A dog", max_new_tokens=2, ignore_eos=True)


def leak(comm: TorchComm) -> dict[str, int]:
    """Return what a rank holds more after `ANSWERS` answers than after a few."""
    star = new_engine(comm=comm)
    counts = []
    # Twenty for caches to fill.
    for answers in (20, ANSWERS):
        if star.rank > 0:
            star.follow()
        else:
            ask(star, answers)
            star.close()
        counts.append(in_use())
    before, after = counts
    return {name: after[name] - before[name] for name in after}


def test_answers_leave_nothing(pool: Pool) -> None:
    for rank, more in enumerate(pool.run(leak, 2)):
        print(f"rank {rank} after {ANSWERS} answers: {more}")
        assert more["tensors"] <= 0
        assert more["threads"] <= 0
        assert more["files"] <= 0
        assert more["objects"] < ANSWERS, "less than an object for each answer"
        assert more["mebibytes"] < 16
