"""Rows that share decode forwards: a step draws a token of each, and runs their next forward.

On a GPU that forward is issued before Python looks at the step's tokens: the device computes while
rows end and others join. A row that has ended runs one forward for nothing. Where CUDA graphs
serve, the forward reads the queries of rows that join, too (`mixed`).

Axes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from star_attention.errors import NonFiniteError, OutOfMemoryError
from star_attention.generation.batching.leading import Forward, Lead, numbers
from star_attention.generation.batching.mixed import (
    MOST_ROWS,
    MOST_TOKENS,
    MixedStep,
    may_join,
    tokens_of,
)
from star_attention.generation.batching.task import RowTask
from star_attention.generation.result import Delta
from star_attention.hf.cache.rows import RowKV, RowSet, by_shard
from star_attention.hf.execution import drawing, finite
from star_attention.hf.execution.handle import ModelHandle
from star_attention.hf.execution.rows import RowForwards
from star_attention.hf.execution.sampling import AsyncCopy
from star_attention.storage.oom import is_out_of_memory
from star_attention.storage.transfers import send

Event = tuple[RowTask, Delta]
"""What a step added to a row; a row that has ended has one, which may be empty."""


class Cohort:
    """Rows of one kind, those of one context next to each other.

    Args:
        handle: the model.
        forwards: runs the forwards that rows share.
        lead: tells the other ranks.
        is_ahead: True to issue a forward before Python looks at its tokens.

    Attributes:
        tasks: the rows whose queries have been read.
    """

    def __init__(
        self, handle: ModelHandle, forwards: RowForwards, lead: Lead, *, is_ahead: bool
    ) -> None:
        self.tasks: list[RowTask] = []
        self._handle, self._forwards, self._is_ahead = handle, forwards, is_ahead
        self._lead, self._number = lead, next(numbers)
        self._rows = RowSet([])
        # The rows that the other ranks know, unless there were more faults.
        self._told: tuple[RowSet, int] | None = None
        # Logits from which the next tokens are drawn, or tokens whose forward comes before that.
        self._logits_RV: Tensor | None = None
        self._due_R: Tensor | None = None
        # Rows whose first logits have not been looked at.
        self._new: set[RowTask] = set()
        self._events: list[Event] = []
        # Rows whose queries the next forward reads.
        self._unread: list[RowTask] = []

    def __len__(self) -> int:
        return len(self.tasks) + len(self._unread)

    def may_read(self, tasks: Sequence[RowTask]) -> bool:
        """True if a step of these rows may read the queries of a group on a context."""
        return (
            self._forwards.by_graph
            and may_join(tasks)
            and 0 < len(self.tasks) <= MOST_ROWS - tokens_of(tasks)
        )

    def read(self, tasks: Sequence[RowTask]) -> bool:
        """Let the next forward read queries; False if it has no room left for them."""
        tokens = tokens_of([*self._unread, *tasks])
        if tokens > min(MOST_TOKENS, MOST_ROWS - len(self.tasks)):
            return False
        self._unread += tasks
        return True

    def unreadable(self) -> list[RowTask]:
        """Remove and return rows whose queries no forward of these rows reads."""
        removed = [task for task in self._unread if task.reads_alone or not self.tasks]
        self._unread = [task for task in self._unread if task not in removed]
        return removed

    def join(self, tasks: Sequence[RowTask], logits_RV: Tensor) -> None:
        """Add rows after their first forward, with its logits."""
        self._run_due()
        if self._logits_RV is not None:
            logits_RV = torch.cat([self._logits_RV, logits_RV])
        self._new |= set(tasks)
        self.tasks, self._logits_RV = [*self.tasks, *tasks], logits_RV
        self._select(by_shard(self._kvs()))

    def drop_ended(self) -> None:
        """Remove the rows that have ended."""
        self._unread = [task for task in self._unread if not task.done]
        staying = [index for index, task in enumerate(self.tasks) if not task.done]
        if len(staying) < len(self.tasks):
            self._select(staying)

    def _select(self, order: list[int]) -> None:
        """Keep these rows, in this order."""
        at_R = send(order, self._handle.device)
        self.tasks = [self.tasks[index] for index in order]
        if self._logits_RV is not None:
            self._logits_RV = self._logits_RV[at_R] if order else None
        if self._due_R is not None:
            self._due_R = self._due_R[at_R] if order else None
        self._rows = RowSet(self._kvs())
        self._forwards.forget()

    def _kvs(self) -> list[RowKV]:
        return [task.kv for task in self.tasks if task.kv is not None]

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Draw the next token of each row; return what that adds to the rows."""
        self._run_due()
        if self.tasks:
            self._draw()
        events, self._events = self._events, []
        return events

    def _draw(self) -> None:
        tasks, logits_RV, new = self.tasks, self._logits_RV, self._new
        assert logits_RV is not None
        drawn = drawing.draw(logits_RV, [task.draw for task in tasks if task.draw is not None])
        finite_R = [finite.are_finite(logits_RV)] if new else []
        copied = AsyncCopy(torch.cat([drawn.tokens_R, drawn.ended_R, *finite_R]))
        self._due_R, self._logits_RV, self._new = drawn.tokens_R, None, set()
        if self._is_ahead and any(task.goes_on for task in tasks):
            self._run_ahead()
        rows, values = len(tasks), copied.wait()
        tokens, ended, numbers = (values[at : at + rows] for at in (0, rows, 2 * rows))
        for index, task in enumerate(tasks):
            if index in drawn.failures:
                self._fail(task, drawn.failures[index])
            elif task in new and not numbers[index]:
                self._fail(task, _not_finite(self._handle))
            else:
                one_1V = logits_RV[index : index + 1]
                delta = task.push(tokens[index], one_1V, ended=bool(ended[index]))
                if delta is not None or task.done:
                    self._events.append((task, delta or Delta()))
        self.drop_ended()

    def _run_due(self) -> None:
        """Run the forward of the last tokens; without memory for it, drop the youngest row."""
        while self._due_R is not None:
            try:
                self._run(self._due_R)
            except Exception as error:
                if self._lead.was_late and not self._lead.has_failed:
                    continue
                if self._lead.has_failed or not is_out_of_memory(error):
                    raise
                youngest = max(self.tasks, key=lambda task: task.number)
                refusal = OutOfMemoryError(
                    f"out of memory with {len(self.tasks):,} rows at once: this one, the youngest,"
                    " was dropped; run fewer (max_rows), or shorter contexts"
                )
                refusal.__cause__ = error
                self._fail(youngest, refusal)
            self.drop_ended()

    def _run_ahead(self) -> None:
        """Run the forward of the last tokens, if there is memory for it."""
        assert self._due_R is not None
        try:
            self._run(self._due_R)
        except (MemoryError, RuntimeError) as error:
            # The next step tries again.
            if not is_out_of_memory(error):
                raise

    def _run(self, tokens_R: Tensor) -> None:
        rows = self._rows.rows
        lengths = [row.tail_tokens for row in rows]
        try:
            if not self._run_with_queries(tokens_R):
                self._logits_RV = self._forward(tokens_R)
        except BaseException:
            for row, length in zip(rows, lengths, strict=True):
                row.rewind(length)
            raise
        self._due_R = None

    def _run_with_queries(self, tokens_R: Tensor) -> bool:
        """Run the forward if it can read the queries that wait for it; these rows join."""
        queries = [task for task in self._unread if not task.reads_alone]
        if not queries:
            return False
        logits_RV = None
        try:
            step = MixedStep.of(self.tasks, tokens_R, queries)
            logits_RV = self._forwards.run_with_queries(step.rows, step.tokens_R, step.wanted)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if logits_RV is None:
            for task in queries:
                task.reads_alone = True
            return False
        step.finish()
        self._unread = [task for task in self._unread if task.reads_alone]
        self._new |= set(queries)
        self.tasks, self._logits_RV = step.tasks, logits_RV
        self._rows = RowSet(self._kvs())
        return True

    def _forward(self, tokens_R: Tensor) -> Tensor:
        first = self.tasks[0]
        request, cache = first.request, first.cache
        assert request is not None
        with self._lead.command(lambda: self._command(tokens_R, request.rope_length)):
            if cache is None:
                logits_RV = self._forwards.run(
                    self._rows, tokens_R, request.rope_length, request.sliced
                )
            else:
                logits_RV = request.forward_next(tokens_R, cache)
        assert logits_RV is not None, "rank 0 has logits"
        return logits_RV

    def _command(self, tokens_R: Tensor, rope_length: int | None) -> Forward:
        told, self._told = self._told, (self._rows, self._lead.faults)
        if told != self._told:
            self._forwards.renew()
        tails = {task.number: task.kv.tail_tokens for task in self.tasks if task.kv is not None}
        return Forward(
            cohort=self._number,
            rows=None if told == self._told else tails,
            tokens=tokens_R.tolist(),
            rope_length=rope_length,
        )

    def _fail(self, task: RowTask, error: Exception) -> None:
        task.fail(error)
        self._events.append((task, Delta()))


def _not_finite(handle: ModelHandle) -> Exception:
    try:
        finite.check(handle, [0])
    except NonFiniteError as error:
        return error
    raise AssertionError("a row without numbers is refused")
