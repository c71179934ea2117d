"""The suites that generate samples: one module each, with `TASKS` and `generate`."""

from __future__ import annotations

import copy
import importlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from star_attention.errors import InvalidInputError, SizeError
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.samples.sources import check_part

SUITES = {
    "ruler": "star_attention.evals.suites.ruler",
    "babilong": "star_attention.evals.suites.babilong",
    "infinitebench": "star_attention.evals.suites.infinitebench",
    "niah": "star_attention.evals.suites.niah",
    "shared": "star_attention.evals.suites.shared",
}
"""By name, imported on use."""
_PATHS = ("essays", "background", "squad", "hotpot", "prompts")


class Suite(Protocol):
    """TASKS: names of its tasks. OPTIONS: words that `generate` takes in `options`, each with what it means."""

    TASKS: tuple[str, ...]
    OPTIONS: Mapping[str, str]

    def generate(
        self, task: str, *, size: Size, count: int, seed: int, options: Mapping[str, Any]
    ) -> Iterator[Sample]:
        """`count` samples, the same for the same arguments; sample n does not depend on `count`."""


def get(name: str) -> Suite:
    """Raises `InvalidInputError` for an unknown one."""
    if name not in SUITES:
        raise InvalidInputError(f"suite {name!r} is unknown; choose one of {', '.join(SUITES)}")
    suite: Any = importlib.import_module(SUITES[name])
    return suite  # type: ignore[no-any-return]


def made(
    suite: Suite,
    cells: Sequence[tuple[str, int]],
    *,
    tokenizer: Any,
    reserve: int,
    count: int,
    seed: int,
    options: Mapping[str, Any],
) -> list[list[Sample] | SizeError]:
    """The samples of each task and length, or why it has none, in their order.

    Several are made at a time, on as many threads as torch has: most of the work is counting tokens, which fast tokenizers do
    outside of Python's lock.

    Raises what `generate` does, but for `SizeError`.
    """
    threads = (
        min(len(cells), torch.get_num_threads()) if getattr(tokenizer, "is_fast", False) else 1
    )
    own = threading.local()
    left = threading.Event()

    def begin() -> None:
        own.tokenizer = (
            tokenizer if threads == 1 else copy.deepcopy(tokenizer)
        )  # (one is not for two threads at a time)

    def one(task: str, length: int) -> list[Sample] | SizeError:
        size = Size(tokenizer=own.tokenizer, length=length, reserve=reserve)
        samples: list[Sample] = []
        try:
            for sample in suite.generate(task, size=size, count=count, seed=seed, options=options):
                samples.append(sample)
                if left.is_set():
                    break
        except SizeError as error:
            return error
        return samples

    with ThreadPoolExecutor(threads, initializer=begin) as pool:
        try:
            return list(pool.map(one, *zip(*cells, strict=True)))
        finally:
            left.set()  # an error or Ctrl-C: no thread goes on to its last sample


def check(suite: Suite, name: str, task: str, options: Mapping[str, Any]) -> None:
    """Raises `InvalidInputError` for a task or an option that a suite does not have, and for values that no task could use,
    though this one may not need them.
    """
    if task not in suite.TASKS:
        raise InvalidInputError(
            f"task {task!r} of {name} is unknown; choose from {', '.join(suite.TASKS)}"
        )
    unknown = sorted(set(options) - set(suite.OPTIONS))
    if unknown:
        raise InvalidInputError(
            f"option {unknown[0]!r} of {name} is unknown; it takes {', '.join(suite.OPTIONS) or 'none'}"
        )
    for option in _PATHS:
        if options.get(option) is not None and not Path(options[option]).exists():
            raise InvalidInputError(
                f"{option} {str(options[option])!r} is not there; check the path"
            )
    check_part(options.get("words"))
