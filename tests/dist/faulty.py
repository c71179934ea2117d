"""The command line, or a session that rank 0 leads, with a fault in one rank.

Usage: python faulty.py FAULT PHASE VICTIM <arguments of star-attention>
       python faulty.py FAULT PHASE VICTIM session STALL_S PAUSE_S TENSOR_PARALLEL
PHASE is 1, 2, "help" or in a session "follow": while the other ranks wait for rank 0's next call.
The fault comes in the third forward of its phase, in phase 2 in number FAULT_FORWARD, if that is
set; replays of CUDA graphs count. In "help" rank 0 is in the middle of what it computes for others.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from star_attention.cli import main
from star_attention.distributed.messages import WorldControl
from star_attention.hf.cache.decode import AnswerCache
from star_attention.hf.cache.encode import EncodeCache
from star_attention.hf.cache.helping import HelpReceiver, HelpSender
from star_attention.hf.execution.graphs import Graphs
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


def begin_forward(current: str) -> None:
    forwards[current] += 1
    fails_at = int(os.environ.get("FAULT_FORWARD", "3")) if current == "2" else 3
    if os.environ["RANK"] == victim and current == phase and forwards[current] == fails_at:
        fail()


def plant(real: Any) -> Any:
    def forward(self: Any, ids: Any, positions: Any, cache: Any, *args: Any, **kwargs: Any) -> Any:
        current = phase_of(cache)
        begin_forward(current)
        if fault == "slow" and current == "1":
            time.sleep(1.5)
        if fault == "late" and current == "startup" and os.environ["RANK"] != "0":
            time.sleep(3)
        if fault == "crawling" and current == "2":
            with open(os.environ["FAULT_TIME"], "w") as file:
                file.write("answering")
            time.sleep(0.2)
        return real(self, ids, positions, cache, *args, **kwargs)

    return forward


def plant_in_graphs(real: Any) -> Any:
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        begin_forward("2")
        logits = real(self, *args, **kwargs)
        if logits is None:
            # It runs eagerly, and is counted there.
            forwards["2"] -= 1
        return logits

    return run


ModelHandle.encode = plant(ModelHandle.encode)  # type: ignore[method-assign]
ModelHandle.logits = plant(ModelHandle.logits)  # type: ignore[method-assign]
Graphs.run = plant_in_graphs(Graphs.run)  # type: ignore[method-assign]


def fail_while_rank_0_helps() -> None:
    """Let a rank fail while rank 0 computes the second layer for another one.

    Rank 0 takes a second for it. It fails itself, or another rank in the forward after its first.
    """
    sent: list[None] = []
    send, request = HelpSender.send, HelpReceiver.request

    def slow_send(self: Any, *args: Any) -> None:
        sent.append(None)
        if len(sent) == 2:
            time.sleep(1)
            if os.environ["RANK"] == victim:
                fail()
        send(self, *args)

    def request_and_fail(self: Any, *args: Any) -> None:
        request(self, *args)
        encode = ModelHandle.encode

        def fail_in_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            time.sleep(0.5)
            ModelHandle.encode = encode  # type: ignore[method-assign]
            fail()
            return encode(self, *args, **kwargs)

        ModelHandle.encode = fail_in_forward  # type: ignore[method-assign]

    HelpSender.send = slow_send  # type: ignore[method-assign]
    if os.environ["RANK"] == victim:
        HelpReceiver.request = request_and_fail  # type: ignore[method-assign]


if phase == "help":
    fail_while_rank_0_helps()


def fail_while_following() -> None:
    """Let a rank that follows fail a second after it has begun to wait for the second call."""
    calls: list[None] = []
    real = WorldControl.next_call

    def next_call(self: Any) -> Any:
        calls.append(None)
        if len(calls) == 2 and fault == "hanging":
            fail()
        elif len(calls) == 2:
            threading.Timer(1, fail).start()
        return real(self)

    WorldControl.next_call = next_call  # type: ignore[method-assign]


def session(stall_s: str, pause_s: str, tensor_parallel: str) -> None:
    """Encode and answer from rank 0 alone, with a pause as in a notebook."""
    from star_attention import StarLLM
    from star_attention.distributed import from_environment
    from star_attention.hf.logs import hide_progress_bars

    hide_progress_bars()
    star = StarLLM.from_pretrained(
        Path(__file__).parents[2] / "models" / "needle-17m",
        block_size=64,
        tokens_per_forward=64,
        comm=from_environment(None, stall_s=float(stall_s)),
        tensor_parallel=int(tensor_parallel),
    )
    fails = phase == "follow" and os.environ["RANK"] == victim
    if star.rank > 0:
        if fails:
            fail_while_following()
        star.follow()
        return
    if phase == "startup":
        raise ZeroDivisionError("planted")
    context = star.encode("The tea is hot and the cup is blue.\n" * 150)
    if fails:
        fail()
    print("encoded", flush=True)
    time.sleep(float(pause_s))
    print(star.generate(context, "What is hot?", max_new_tokens=30, ignore_eos=True).token_ids)


if sys.argv[1] == "session":
    try:
        session(*sys.argv[2:])
    except Exception:
        Path(os.environ["FAULT_TIME"] + f"-noticed-by-{os.environ['RANK']}").write_text(
            str(time.time())
        )
        raise
else:
    main()
