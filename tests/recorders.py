"""Stand-ins for the capture of CUDA graphs, which needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.hf.execution.capture import Recorder
from star_attention.hf.execution.graphs import Graphs


def few_runs(patch: pytest.MonkeyPatch) -> None:
    """Cut attention by graphs into few runs: the interpreter takes a millisecond for each program.

    The kernels are imported here, after the caller has looked for Triton.
    """
    from star_attention.attention.kernels import triton_answer, triton_latent

    for kernel in (triton_answer, triton_latent):
        patch.setattr(kernel, "SPLITS", 2)
        patch.setattr(kernel, "TAIL_SPLITS", 1)


class CountingRecorder(Recorder):
    """Runs the captured work at each replay, and counts captures, replays and interludes."""

    def __init__(self, handle: Any) -> None:
        super().__init__(handle)
        self.captures = self.replays = self.interludes = 0
        self.always_warms_up = False

    def record(
        self, work: Callable[[], None], *, warm_up: Callable[[], Any], comm: Any
    ) -> Callable[[], None]:
        self.captures += 1
        # Each capture warms up on a GPU. One is enough where nobody reads what it shows.
        if self.captures == 1 or self.always_warms_up:
            warm_up()

        def replay() -> None:
            self.replays += 1
            work()

        return replay

    def interlude(self, act: Callable[[], None]) -> None:
        self.interludes += 1
        act()


class CountingGraphs(Graphs):
    """Graphs of a `CountingRecorder`."""

    recorder: CountingRecorder

    def __init__(self, handle: Any) -> None:
        super().__init__(handle, CountingRecorder(handle))
        # Tests of answers count those alone.
        self.of_encoding.is_on = False


class Buckets(Graphs):
    """Graphs that know their lengths, but record nothing: forwards run eagerly."""

    def __init__(self, handle: Any) -> None:
        super().__init__(handle)
        self.of_encoding.is_on = False
        self.lengths: list[int] = []

    def run(self, cache: Any, ids_RQ: torch.Tensor, *rest: Any, **options: Any) -> None:
        self.lengths.append(ids_RQ.shape[1])


def with_graphs(star: StarLLM) -> CountingGraphs:
    """Let an engine answer by graphs."""
    counting = CountingGraphs(star.runtime.handle)
    # `graphs` is a cached property.
    star.runtime.handle.__dict__["graphs"] = counting
    return counting


def refuse(*_: Any, **__: Any) -> Any:
    """Capture nothing, as where a model does what a graph cannot."""
    raise RuntimeError("operation not permitted when stream is capturing")
