"""Running out of memory: an error that names the setting to lower, and nothing left allocated."""

from __future__ import annotations

import json
import re
import subprocess
import sys

OUT_OF_MEMORY = """
import gc, json, resource, sys, weakref
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from star_attention import StarLLM
from star_attention.planning.segments import Segments
from star_attention.storage.kv import LayerKV
from star_attention.errors import OutOfMemoryError
from tests.families import FAMILIES

config = FAMILIES["llama_mqa"]()
config.max_position_embeddings = 1 << 20
model = AutoModelForCausalLM.from_config(config).eval()
ids = torch.randint(3, 200, (1 << 14,))
small = StarLLM(model, block_size=1024, tokens_per_forward=1024)
before = small.generate(small.encode(ids), [5, 6, 7], max_new_tokens=4).token_ids

status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
limit = int(status["VmSize"].split()[0]) * 1024 + (24 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
large = StarLLM(model, block_size=1024, tokens_per_forward="16k")
errors = []
for _ in range(2):
    try:
        large.encode(ids)
    except OutOfMemoryError as error:
        assert isinstance(error, MemoryError)
        errors.append(str(error))
# The failed attempts leave nothing allocated, even while the error is kept, and the remedy works.
gc.disable()
written = []
write = LayerKV.write
LayerKV.write = lambda kv, *parts: (written.append(weakref.ref(kv)), write(kv, *parts))[1]
try:
    large.encode(ids)
except OutOfMemoryError as error:
    kept_error = error
assert kept_error and not any(layer() for layer in written), written
LayerKV.write = write
after = small.generate(small.encode(ids), [5, 6, 7], max_new_tokens=4).token_ids
print(json.dumps([errors, before, after]))
"""


def test_out_of_memory_in_phase_1() -> None:
    """A smaller request works afterwards, in a process with limited address space."""
    run = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    errors, before, after = json.loads(run.stdout.splitlines()[-1])
    assert len(errors) == 2
    for error in errors:
        assert re.search(
            r"out of memory in phase 1 after 0 of 16,384 context tokens, with 16,384 tokens in one",
            error,
        )
        assert "lower tokens_per_forward (now 16,384; it sets the working memory)" in error
    assert before == after


GARBAGE = """
import gc, resource
import torch
from pathlib import Path
from star_attention.planning.segments import Segments
from star_attention.storage.kv import LayerKV

def filled():
    kv = LayerKV(Segments.prefix(1 << 18))
    kv.write(0, torch.zeros(8, 1, 64), torch.zeros(8, 1, 64))  # 2 x 512 MB of address space
    return kv

gc.disable()
waiting = [filled()]
waiting.append(waiting)
del waiting
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
limit = int(status["VmSize"].split()[0]) * 1024 + (768 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
kv = filled()  # there is room for one
try:
    filled()
except RuntimeError as error:
    print("full")
"""


def test_contexts_in_uncollected_garbage_make_room() -> None:
    run = subprocess.run(
        [sys.executable, "-c", GARBAGE], capture_output=True, text=True, check=False
    )
    assert run.stdout == "full\n", run.stderr[-3000:]
