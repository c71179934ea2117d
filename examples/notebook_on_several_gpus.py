"""Drive several GPUs from a notebook: its cells run on rank 0, and all other ranks follow.

Editors that know `# %%` show this file as a notebook. It is a program, too; without GPUs its ranks
are two processes on the CPU:

    python examples/notebook_on_several_gpus.py
"""

# %% The other ranks load the same model, and then do whatever this process does.
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from star_attention import StarLLM

SETTINGS = {"path": "models/needle-17m", "block_size": "1k"}
RANKS = max(2, torch.cuda.device_count())

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
program = f"from star_attention import StarLLM; StarLLM.from_pretrained(**{SETTINGS}).follow()"
for rank in range(1, RANKS):
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    # In a session of its own, so that interrupting a cell does not end it.
    subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | place, start_new_session=True
    )
os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
star = StarLLM.from_pretrained(**SETTINGS)

# %% From here on this is plain code of one process.
book = Path("examples/book.txt").read_text(encoding="utf-8")
context = star.encode([{"role": "user", "content": book}])
print(context.plan)

# %% A cell may be interrupted, or fail, and hours may pass: the next one works.
print(star.generate(context, "What is the secret number for silver-otter?").text)

# %%
with star.stream(context, "What is the secret number for quiet-harbor?") as stream:
    for piece in stream:
        print(piece, end="", flush=True)
print()

# %% Other settings, on the same ranks. What a dropped context took is freed everywhere.
other = star.with_config(block_size="2k")
context = other.encode([{"role": "user", "content": book}])
print(other.generate(context, "What is the secret number for silver-otter?").text)

# %% The other processes end here. They would also end with this one.
star.close()
