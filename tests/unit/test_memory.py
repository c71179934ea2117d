"""Peak memory of phase 1: weights, keys and values, and a part bounded by the tokens per forward.

A separate process measures the high-water mark of its resident memory (`VmHWM`, reset right before)
and subtracts the memory that was resident before (weights, libraries, caches of a first short
encode) and the stored keys and values. glibc is set to return freed blocks above 64 KiB to the
system, since the mark would otherwise include freed memory. The result counts whole pages that were
touched, the allocator's overhead included: hence the noise that the tests allow.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest

# In one of pytest's processes, which measures each size once.
pytestmark = [
    pytest.mark.xdist_group("memory"),
    pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc"),
]

K = 1024
TOKENS_PER_FORWARD = 512
# A forward holds, for each of its tokens, several copies of the hidden states (384), of queries,
# keys and values (640), of the gated MLP's intermediate activations (2 x 1024), and of attention's
# fp32 results (at most 2 states of 384 at a time, and their merge).
ELEMENTS_PER_TOKEN = 8 * 384 + 2 * 640 + 3 * 1024
BOUND = TOKENS_PER_FORWARD * ELEMENTS_PER_TOKEN * 4
NOISE = 4 << 20

SCRIPT = """
import ctypes, gc, json, sys
import torch
from pathlib import Path
from star_attention import StarLLM
from tests.engines import BUNDLED, ids

def resident(name):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024

tokens, forward, block = map(int, sys.argv[1:])
sizes = dict(block_size=block, anchor_size=256, tokens_per_forward=forward)
star = StarLLM.from_pretrained(BUNDLED, dtype="float32", **sizes)
star.encode(ids(2 * forward + 1))
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
before = resident("VmRSS")
context = star.encode(ids(tokens))
print(json.dumps([resident("VmHWM") - before - context.nbytes, context.nbytes]))
"""


@functools.cache
def working_bytes(tokens: int, forward: int = TOKENS_PER_FORWARD, block: int = 1024) -> int:
    """Measure the peak bytes of encoding, without the model and the stored keys and values."""
    environment = dict(
        MALLOC_MMAP_THRESHOLD_=str(64 * K),
        MALLOC_TRIM_THRESHOLD_="0",
        MALLOC_ARENA_MAX="1",
        OMP_NUM_THREADS="1",
    )
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tokens), str(forward), str(block)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    peak, stored = json.loads(process.stdout.splitlines()[-1])
    assert stored == tokens * 10 * 2 * 2 * 64 * 4, (
        "10 layers, keys and values, 2 heads of 64, float32"
    )
    return int(peak)


@pytest.mark.parametrize(
    "tokens", [4 * K, *(pytest.param(n * K, marks=pytest.mark.slow) for n in (8, 32))]
)
def test_working_memory_does_not_depend_on_the_context(tokens: int) -> None:
    """Forbids memory that grows with the context, keys and values aside: masks, logits, states."""
    peak = working_bytes(tokens)
    print(
        f"{tokens:,} tokens: {peak / 2**20:.1f} MiB,"
        f" bound {BOUND / 2**20:.1f} + {NOISE / 2**20:.0f} MiB"
    )
    assert 0 < peak < BOUND + NOISE
    assert abs(peak - working_bytes(4 * K)) < NOISE


@pytest.mark.slow
def test_working_memory_follows_the_tokens_per_forward() -> None:
    """The measurement works: four times the tokens per forward raise the peak."""
    assert working_bytes(4 * K, forward=2 * K) > 2 * working_bytes(4 * K)
