"""A batch on a rank that follows: the same forwards as on rank 0, which draws the tokens.

Axes: R rows.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from star_attention.generation import requests
from star_attention.generation.batching import leading
from star_attention.generation.batching.encoding import Turns, turns_of
from star_attention.generation.batching.prefill import ReadRow, read
from star_attention.hf.cache.rows import RowSet
from star_attention.hf.execution.request import Request
from star_attention.hf.execution.rows import RowForwards
from star_attention.hf.execution.sources import attention_of
from star_attention.runtime import Runtime
from star_attention.storage.kept import KeptTail, kept_row
from star_attention.storage.transfers import send

_log = logging.getLogger(__name__)


def begin(runtime: Runtime) -> None:
    """Take part in a new batch of rank 0. Collective; rank 0 runs `leading.Lead.begin`."""
    comm = runtime.comm
    with runtime.collective("a batch"):
        number: int = comm.receive_object()[1]
        # Ranks that follow hold their streams.
        comm.streams.add(BatchFollower(runtime, number))


@dataclass(frozen=True)
class _Row:
    """A row, with the request that its query was."""

    request: Request
    own: ReadRow


class _Cohort:
    """Rows that share forwards, in the order of rank 0."""

    def __init__(self, forwards: RowForwards, rows: dict[int, _Row]) -> None:
        self.rows, self._forwards = rows, forwards
        self._set = RowSet([row.own.kv for row in rows.values()])

    def forward(self, tokens_R: torch.Tensor, rope_length: int | None) -> None:
        """Run a forward; one that fails leaves nothing in the rows."""
        before = [row.tail_tokens for row in self._set.rows]
        try:
            self._forward(tokens_R, rope_length)
        except BaseException:
            for row, tokens in zip(self._set.rows, before, strict=True):
                row.rewind(tokens)
            raise

    def _forward(self, tokens_R: torch.Tensor, rope_length: int | None) -> None:
        first, *others = self.rows.values()
        if first.own.cache is None:
            self._forwards.run(self._set, tokens_R, rope_length, first.request.sliced)
        else:
            assert not others, "it has forwards of its own"
            first.request.forward_next(tokens_R, first.own.cache)


class BatchFollower:
    """A batch on one rank; a stream (`distributed.streams`), as on rank 0.

    Args:
        runtime: the engine's.
        number: the batch's number on all ranks.
    """

    def __init__(self, runtime: Runtime, number: int) -> None:
        self._runtime, self._comm = runtime, runtime.comm
        self.number = number
        self.is_suspended, self.ended = True, False
        self._rows: dict[int, _Row] = {}
        self._cohorts: dict[int, _Cohort] = {}
        self._encodings: dict[int, Turns] = {}
        # The last command that has been run, all of it.
        self._done = 0

    def repeat(self) -> None:
        """Do what rank 0 says until it suspends the batch or ends it."""
        try:
            while not (self.ended or self.is_suspended):
                message = self._comm.receive_about(self.number)
                if message is None:
                    self.leave()
                else:
                    self._take(message[2])
        except Exception:
            # Rank 0 has it, too, and asks how far this rank is.
            self.is_suspended = True
            raise

    def suspend(self) -> bool:
        """Leave the batch for another call, if rank 0 does so too."""
        message = self._comm.receive_about(self.number)
        if message is not None:
            self._take(message[2])
        return self.is_suspended

    def leave(self) -> None:
        """End the batch here."""
        self.ended = True
        self._rows.clear()
        self._cohorts.clear()
        self._encodings.clear()

    def end(self, answers: Any) -> None:
        """Do nothing: a batch has no answers on this rank."""

    def _take(self, command: leading.Command) -> None:
        for number in command.dropped:
            self._drop(number)
        if command.news is not None:
            self._comm.contexts.heed(command.news)
        try:
            self._run(command.what)
            self._done = command.number or self._done
        except Exception as error:
            if error is not self._comm.shared_error:
                raise
            # All ranks have it, in the same place: it is of one row or context.
            _log.info("a step of a batch failed on rank %d", self._comm.rank, exc_info=True)

    def _drop(self, number: int) -> None:
        self._rows.pop(number, None)
        steps = self._encodings.pop(number, None)
        if steps is not None:
            steps.close()
        # A cohort refers to the keys of its rows. Rank 0 names those that stay with their next
        # forward.
        self._cohorts = {
            key: cohort for key, cohort in self._cohorts.items() if number not in cohort.rows
        }

    @torch.no_grad()
    def _run(self, what: Any) -> None:
        match what:
            case None:
                pass
            case leading.Report():
                self._comm.gather(self._done)
            case leading.Suspend():
                self.is_suspended = True
            case leading.End():
                self.leave()
            case leading.Read():
                self._read(what)
            case leading.Forward():
                self._forward(what)
            case leading.Keep():
                tails = self._rows[what.row].own.kv.tails
                kept = KeptTail(kept_row(tails, 0, 0, what.tokens, copies=True))
                kept.key = self._comm.contexts.add(kept, what.key)
            case leading.ReadAgain():
                attention_of(self._rows[what.row].request, what.readings)
            case leading.Encode():
                self._encode(what)
            case _:
                raise AssertionError(f"{type(what).__name__} is no command")

    def _read(self, what: leading.Read) -> None:
        contexts, program = self._comm.contexts, what.program
        request = requests.on(
            self._runtime,
            contexts.get(what.context),
            queries=program.queries,
            tokens_per_forward=program.tokens_per_forward,
            sliced=program.sliced,
            second_look=program.second_look,
            kept=None if what.kept is None else contexts.get(what.kept),
        )
        done = read(request, program, [query for _, query in what.rows])
        for (number, _), own in zip(what.rows, done.rows, strict=True):
            self._rows[number] = _Row(done.request, own)

    def _forward(self, what: leading.Forward) -> None:
        if what.rows is not None:
            forwards = RowForwards(self._runtime.handle, self._comm)
            rows = {number: self._rows[number] for number in what.rows}
            for number, tokens in what.rows.items():
                # This rank may have run a forward that has failed on another one.
                rows[number].own.kv.rewind(tokens)
            self._cohorts[what.cohort] = _Cohort(forwards, rows)
        tokens_R = send(what.tokens, self._runtime.device)
        self._cohorts[what.cohort].forward(tokens_R, what.rope_length)

    def _encode(self, what: leading.Encode) -> None:
        if what.contexts is not None:
            old = None if what.reuse is None else self._comm.contexts.get(what.reuse)
            self._encodings[what.number] = turns_of(self._runtime, what.contexts, old, False)
        try:
            next(self._encodings[what.number])
        except StopIteration:
            # The context is registered, and held as long as rank 0 has its own.
            del self._encodings[what.number]
