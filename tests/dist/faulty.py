"""The command line with a fault in one rank: `python faulty.py WHAT PHASE VICTIM <arguments of star-attention>`."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from star_attention.cli import main
from star_attention.hf.cache.encode import EncodeCache
from star_attention.hf.execution.handle import ModelHandle

what, phase, victim = sys.argv[1:4]
sys.argv[1:] = sys.argv[4:]
calls = {"1": 0, "2": 0}


def fault() -> None:
    with open(os.environ["FAULT_TIME"], "w") as file:
        file.write(str(time.time()))
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "hanging":
        time.sleep(1000)
    elif what == "failing":
        raise ZeroDivisionError("planted")
    elif what == "full":
        raise MemoryError("planted")


def planted(real: Any) -> Any:
    def forward(self: Any, ids: Any, positions: Any, cache: Any, *more: Any, **words: Any) -> Any:
        now = "1" if isinstance(cache, EncodeCache) else "2"
        if type(cache).__name__ != "StarCache":  # not the probe
            calls[now] += 1
            if os.environ["RANK"] == victim and now == phase and calls[now] == 3:
                fault()
        if what == "slow" and now == "1":
            time.sleep(1.5)
        if what == "crawling" and now == "2":
            with open(os.environ["FAULT_TIME"], "w") as file:
                file.write("answering")
            time.sleep(0.2)
        return real(self, ids, positions, cache, *more, **words)

    return forward


ModelHandle.encode = planted(ModelHandle.encode)  # type: ignore[method-assign]
ModelHandle.logits = planted(ModelHandle.logits)  # type: ignore[method-assign]
main()
