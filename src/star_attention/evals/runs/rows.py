"""Answers to several samples at once, in shared decode steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from star_attention.engine import StarLLM
from star_attention.errors import InvalidInputError, quote
from star_attention.generation.batching.batch import Row
from star_attention.generation.result import Generation
from star_attention.storage.context import EncodedContext


class Rows:
    """The rows of a run's samples, on whatever contexts.

    Args:
        star: The engine; contexts may be of other engines of its model.
        most: Rows at once, each with its context, which stays in memory until its answer has ended.

    Raises:
        InvalidInputError: For a number below 1, or several rows on several ranks.
    """

    def __init__(self, star: StarLLM, most: int) -> None:
        if most < 1:
            raise InvalidInputError(f"rows: expected 1 or more, got {quote(most)}")
        if star.num_ranks > 1:
            raise InvalidInputError(
                f"{most} rows at once work on one rank, got {star.num_ranks} ranks; leave out"
                " --rows, or run one process for each GPU and merge the runs"
            )
        self._most = most
        self._batch = star.batch(max_rows=most)
        self._open: dict[Row, Callable[[Generation], None]] = {}

    def add(
        self,
        context: EncodedContext,
        arguments: Mapping[str, Any],
        done: Callable[[Generation], None],
    ) -> None:
        """Begin an answer, after waiting for one of the others where there are too many.

        Args:
            context: What is asked.
            arguments: Those of `StarLLM.generate`.
            done: Called with the answer.
        """
        while len(self._open) >= self._most:
            self._step()
        self._open[self._batch.add(context, **arguments)] = done

    def finish(self) -> None:
        """Wait for all answers."""
        while self._open:
            self._step()

    def _step(self) -> None:
        self._batch.step()
        for row in [row for row in self._open if row.done]:
            self._open.pop(row)(row.result())

    def close(self) -> None:
        """End what is left."""
        self._open.clear()
        self._batch.close()
