"""The same work in Python, without a server: what HTTP is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from star_attention.engine import StarLLM
from star_attention.generation.batching.batch import Batch, Row
from star_attention.storage.context import EncodedContext
from star_attention.tools import machine

OPTIONS: dict[str, Any] = dict(ignore_eos=True, temperature=0.0)
"""Settings of all answers, here and over HTTP."""


@dataclass(frozen=True, kw_only=True)
class PythonRuns:
    """Questions on encoded contexts.

    Attributes:
        star: the engine.
        contexts: the contexts, which clients take in turn.
    """

    star: StarLLM
    contexts: list[EncodedContext]

    def tokens_per_s(self, questions: list[list[list[int]]], answer_tokens: int) -> float:
        """Return the tokens per second of clients that ask again as soon as they have an answer.

        Args:
            questions: token ids of the questions of each client.
            answer_tokens: tokens of an answer.
        """
        with self.star.batch(max_rows=len(questions)) as batch:
            ask = self._asking(batch, answer_tokens)
            under_way = {ask(client, each[0]): (client, 1) for client, each in enumerate(questions)}
            started, tokens = time.perf_counter(), 0
            while under_way:
                for row, _ in batch.step():
                    if not row.done:
                        continue
                    client, number = under_way.pop(row)
                    tokens += len(row.result().token_ids)
                    if number < len(questions[client]):
                        under_way[ask(client, questions[client][number])] = client, number + 1
            return tokens / (time.perf_counter() - started)

    def _asking(self, batch: Batch, answer_tokens: int) -> Callable[[int, list[int]], Row]:
        def ask(client: int, ids: list[int]) -> Row:
            context = self.contexts[client % len(self.contexts)]
            return batch.add(context, torch.tensor(ids), max_new_tokens=answer_tokens, **OPTIONS)

        return ask

    def first_s(self, questions: list[list[int]]) -> float:
        """Return the median time of `generate` to the first token of a question."""
        context, device = self.contexts[0], self.star.runtime.device
        seconds = []
        for ids in [questions[0], *questions]:
            answer = partial(
                self.star.generate, context, torch.tensor(ids), max_new_tokens=1, **OPTIONS
            )
            seconds.append(machine.time_once(answer, device))
        # The first one may compile, and capture graphs.
        return median(seconds[1:])
