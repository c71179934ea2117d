"""Runs of a batch, as `bench rows` times them."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor

from star_attention.bench.models import random_ids
from star_attention.engine import StarLLM
from star_attention.storage.context import EncodedContext
from star_attention.tools import machine

LONGEST = 4
"""Tokens of an answer of random length at most, as a multiple of their mean."""
_ROUNDS = 2
"""Rows that begin after the first ones in a run of turnover, for each of these."""


@dataclass(frozen=True, kw_only=True)
class RowRuns:
    """Rows on encoded contexts, and how they are asked.

    Attributes:
        star: the engine.
        contexts: the contexts, which rows take in turn.
        rows: rows at once.
        query_tokens, answer_tokens: length of a query and, on average, of an answer.
    """

    star: StarLLM
    contexts: list[EncodedContext]
    rows: int
    query_tokens: int
    answer_tokens: int

    def lockstep(self) -> float:
        """Return the tokens per second of rows that begin together and are of one length."""
        with self.star.batch(max_rows=self.rows) as batch:
            rows = self._begun(batch, [self.answer_tokens] * self.rows)
            before, started = _tokens(rows), time.perf_counter()
            while not any(row.done for row in rows):
                batch.step()
            return (_tokens(rows) - before) / (time.perf_counter() - started)

    def turnover(self) -> float:
        """Return the tokens per second of rows that end at random, each followed by another.

        The lengths of answers are exponential, so that ends are a Poisson process.
        """
        generator = random.Random(0)
        lengths = [
            max(
                2, min(4 * self.answer_tokens, round(generator.expovariate(1 / self.answer_tokens)))
            )
            for _ in range((1 + _ROUNDS) * self.rows)
        ]
        with self.star.batch(max_rows=self.rows) as batch:
            rows = self._added(batch, lengths)
            # The first ones begin.
            batch.step()
            while batch.running < self.rows:
                batch.step()
            before, started = _tokens(rows), time.perf_counter()
            while batch.waiting:
                batch.step()
            return (_tokens(rows) - before) / (time.perf_counter() - started)

    def beside_encoding(self, ids_L: Tensor) -> dict[str, float]:
        """Encode a context while rows are answered, each of which is followed by another.

        Returns:
            Seconds to encode it, the longest time between two tokens of a row, and tokens per
            second.
        """
        with self.star.batch(max_rows=self.rows) as batch:
            rows = self._begun(batch, [self.answer_tokens] * self.rows)
            gaps, before = [], _tokens(rows)
            started = last = time.perf_counter()
            encoding = batch.encode(ids_L)
            while not encoding.done:
                missing = self.rows - batch.running - batch.waiting
                rows += self._added(batch, [self.answer_tokens] * missing, first=len(rows))
                batch.step()
                gaps.append(time.perf_counter() - last)
                last += gaps[-1]
            return dict(
                encode_s=last - started,
                longest_gap_s=max(gaps),
                tokens_per_s=(_tokens(rows) - before) / (last - started),
            )

    def next_turn(self, repeats: int) -> float:
        """Return the median time to the first token of a conversation's second answer."""
        query, following = self._query(0), self._query(1)
        settings: dict[str, Any] = dict(ignore_eos=True)
        reply = self.star.generate(
            self.contexts[0], query, keep=True, max_new_tokens=self.answer_tokens, **settings
        )
        seconds = machine.time_repeatedly(
            # Keeping the answer takes a forward more, after its first token.
            lambda: reply.continue_with(following, max_new_tokens=1, keep=False, **settings),
            repeats=repeats,
            device=self.star.runtime.device,
        )
        return median(seconds)

    def _begun(self, batch: Any, lengths: list[int]) -> list[Any]:
        """Add rows, and step until all have begun."""
        rows = self._added(batch, lengths)
        while batch.waiting:
            batch.step()
        return rows

    def _added(self, batch: Any, lengths: list[int], first: int = 0) -> list[Any]:
        numbers = range(first, first + len(lengths))
        return [
            batch.add(
                self.contexts[number % len(self.contexts)],
                self._query(number),
                max_new_tokens=length,
                ignore_eos=True,
            )
            for number, length in zip(numbers, lengths, strict=True)
        ]

    def _query(self, number: int) -> Tensor:
        return random_ids(self.star.runtime.handle.model, self.query_tokens, seed=1000 + number)


def _tokens(rows: list[Any]) -> int:
    return sum(len(row.token_ids) for row in rows)
