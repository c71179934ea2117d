"""The command line with a fault in one rank.

Usage: python faulty.py FAULT PHASE VICTIM <arguments of star-attention>
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from star_attention.cli import main
from star_attention.hf.cache.decode import AnswerCache
from star_attention.hf.cache.encode import EncodeCache
from star_attention.hf.execution.handle import ModelHandle

fault, phase, victim = sys.argv[1:4]
sys.argv[1:] = sys.argv[4:]
forwards = {"startup": 0, "1": 0, "2": 0}


def fail() -> None:
    with open(os.environ["FAULT_TIME"], "w") as file:
        file.write(str(time.time()))
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "hanging":
        time.sleep(1000)
    elif fault == "failing":
        raise ZeroDivisionError("planted")
    elif fault == "full":
        raise MemoryError("planted")


def phase_of(cache: Any) -> str:
    """Return "1" or "2", or "startup" for the forward that probes the layers."""
    if isinstance(cache, EncodeCache):
        return "1"
    return "2" if isinstance(cache, AnswerCache) else "startup"


def plant(real: Any) -> Any:
    def forward(self: Any, ids: Any, positions: Any, cache: Any, *args: Any, **kwargs: Any) -> Any:
        current = phase_of(cache)
        forwards[current] += 1
        if os.environ["RANK"] == victim and current == phase and forwards[current] == 3:
            fail()
        if fault == "slow" and current == "1":
            time.sleep(1.5)
        if fault == "crawling" and current == "2":
            with open(os.environ["FAULT_TIME"], "w") as file:
                file.write("answering")
            time.sleep(0.2)
        return real(self, ids, positions, cache, *args, **kwargs)

    return forward


ModelHandle.encode = plant(ModelHandle.encode)  # type: ignore[method-assign]
ModelHandle.logits = plant(ModelHandle.logits)  # type: ignore[method-assign]
main()
