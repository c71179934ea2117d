"""Peak memory of phase 1: weights, keys and values, and a bound that depends on the tokens per forward only.

Measured in a process of its own as the high-water mark of resident memory (`VmHWM`, reset right before), less what was
resident before (weights, libraries, and what a first short encode leaves behind), less the keys and values kept. glibc is
told to hand blocks above 64 KiB back to the system when they are freed (it would keep them otherwise, and the mark would say
less about the working memory). What is measured is therefore memory that was really touched, whole pages, with the
allocator's own small change in it: hence the noise that the tests allow.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest

K = 1024
TOKENS_PER_FORWARD = 1024
# A forward holds, for each of its tokens, some copies of the hidden states (384), of queries, keys and values (640), of the
# gated MLP's inside (2 x 1024), and of attention's fp32 results (2 states of 384 at most at a time, and their merge).
NUMBERS_PER_TOKEN = 8 * 384 + 2 * 640 + 3 * 1024
BOUND = TOKENS_PER_FORWARD * NUMBERS_PER_TOKEN * 4
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
star = StarLLM.from_pretrained(BUNDLED, dtype="float32", block_size=block, anchor_size=512, tokens_per_forward=forward)
star.encode(ids(2 * forward + 1))
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
before = resident("VmRSS")
context = star.encode(ids(tokens))
print(json.dumps([resident("VmHWM") - before - context.nbytes, context.nbytes]))
"""


@functools.cache
def working_bytes(tokens: int, forward: int = TOKENS_PER_FORWARD, block: int = 2048) -> int:
    """Peak bytes of encoding `tokens` tokens beyond what was there before and what is kept."""
    words = dict(
        MALLOC_MMAP_THRESHOLD_=str(64 * K),
        MALLOC_TRIM_THRESHOLD_="0",
        MALLOC_ARENA_MAX="1",
        OMP_NUM_THREADS="1",
    )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tokens), str(forward), str(block)],
        env=os.environ | words,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    peak, kept = json.loads(done.stdout.splitlines()[-1])
    assert kept == tokens * 10 * 2 * 2 * 64 * 4, (
        "10 layers, keys and values, 2 heads of 64, float32"
    )
    return int(peak)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
@pytest.mark.parametrize("tokens", [8 * K, 16 * K, pytest.param(32 * K, marks=pytest.mark.slow)])
def test_working_memory_does_not_depend_on_the_context(tokens: int) -> None:
    """Forbids anything that grows with the context beside its keys and values: masks, logits, hidden states of all tokens."""
    peak = working_bytes(tokens)
    print(
        f"{tokens:,} tokens: {peak / 2**20:.1f} MiB, bound {BOUND / 2**20:.1f} + {NOISE / 2**20:.0f} MiB"
    )
    assert 0 < peak < BOUND + NOISE
    assert abs(peak - working_bytes(8 * K)) < NOISE


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_working_memory_follows_the_tokens_per_forward() -> None:
    """And so the measurement measures something: with four times the tokens the peak is some times as high."""
    assert working_bytes(8 * K, forward=4 * K) > 2 * working_bytes(8 * K)
