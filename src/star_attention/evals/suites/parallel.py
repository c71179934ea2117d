"""Samples of several tasks and lengths, generated on several threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from star_attention.errors import SizeError
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.suites.suite import Suite


def generate_cells(
    suite: Suite,
    cells: Sequence[tuple[str, int]],
    *,
    tokenizer: Any,
    reserve: int,
    count: int,
    seed: int,
    options: Mapping[str, Any],
) -> list[list[Sample] | SizeError]:
    """Generate the samples of each cell, a task and a length in tokens, in the order of the cells.

    Several cells are generated at a time, on as many threads as torch has: most of the work is
    counting tokens, for which fast tokenizers release the GIL.

    Args:
        suite: Suite of the tasks.
        cells: Pairs of a task and a length.
        tokenizer: Tokenizer that lengths are counted with.
        reserve: Tokens to leave free in each sample.
        count, seed, options: As for `Suite.generate`.

    Returns:
        For each cell its samples, or the error that says why they do not fit.

    Raises:
        InvalidInputError: As for `Suite.generate`.
    """
    is_fast = getattr(tokenizer, "is_fast", False)
    threads = min(len(cells), torch.get_num_threads()) if is_fast else 1
    local = threading.local()
    stop = threading.Event()

    def set_tokenizer() -> None:
        # A tokenizer must not be used by two threads at a time.
        local.tokenizer = tokenizer if threads == 1 else copy.deepcopy(tokenizer)

    def generate(task: str, length: int) -> list[Sample] | SizeError:
        size = Size(tokenizer=local.tokenizer, length=length, reserve=reserve)
        samples: list[Sample] = []
        try:
            for sample in suite.generate(task, size=size, count=count, seed=seed, options=options):
                samples.append(sample)
                if stop.is_set():
                    break
        except SizeError as error:
            return error
        return samples

    with ThreadPoolExecutor(threads, initializer=set_tokenizer) as pool:
        try:
            return list(pool.map(generate, *zip(*cells, strict=True)))
        finally:
            # After an error or Ctrl-C, the other threads stop after their current sample.
            stop.set()
