"""Several answers of one call of `generate`, as rows: those that end leave the others' steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from star_attention.errors import OutOfMemoryError
from star_attention.generation import requests
from star_attention.generation.batching.leading import Lead
from star_attention.generation.batching.scheduler import Scheduler
from star_attention.generation.batching.task import tasks_of
from star_attention.generation.result import Delta, Generation, Source
from star_attention.generation.run import Shape, out_of_memory, warn_of_unanswered
from star_attention.generation.settings import ResolvedSettings
from star_attention.hf.execution.rows import kind_of
from star_attention.hf.execution.sources import attention_of
from star_attention.hf.execution.timing import Clock
from star_attention.inputs import Prepared
from star_attention.runtime import Runtime
from star_attention.storage.context import EncodedContext

_WORTH_ROWS = 4
"""Fewest tokens of an answer for which a row is worth its making."""


def serves(runtime: Runtime, context: EncodedContext, prepared: Prepared) -> bool:
    """True if the answers of a call are better given as rows.

    Processors and criteria of the user's own see all rows of a call at once, as transformers' do.
    """
    settings = prepared.settings
    assert settings is not None, "rank 0 prepares"
    arguments = settings.arguments
    return (
        runtime.comm.size == 1
        and len(prepared.prompts) * settings.answers_per_query > 1
        and settings.max_new_tokens >= _WORTH_ROWS
        and settings.uses_own_loop
        and not settings.second_look
        and not arguments.keep
        and arguments.logits_processor is None
        and arguments.stopping_criteria is None
        and kind_of(runtime.handle, context.kv, context.rope_length) is not None
    )


class RowsRun:
    """A call on a single process, whose answers are the rows of a batch of its own.

    Args:
        runtime: the engine's.
        context: the context to ask.
        prepared: the queries, with the settings of their answers.
        number: the call's number.
        check: what is left to check of the model once the first forward has been issued.
    """

    def __init__(
        self,
        runtime: Runtime,
        context: EncodedContext,
        prepared: Prepared,
        number: int,
        check: Callable[[], None] | None = None,
    ) -> None:
        assert prepared.settings is not None, "rank 0 prepares"
        self.settings: ResolvedSettings = prepared.settings
        self.shape = Shape(
            several_queries=prepared.several_queries,
            answers_per_query=self.settings.answers_per_query,
        )
        self.number, self.program = number, None
        self._runtime, self._context, self._prompts = runtime, context, prepared.prompts
        self._clock = Clock(runtime.device)
        # Sources are found for all answers at once.
        lead = Lead(runtime.comm)
        self._tasks = list(tasks_of(runtime, context, prepared, lead, with_sources=False))
        first = self._tasks[0].request
        assert first is not None, "it has not begun"
        if check is not None and not first.is_ready:
            check()
            check = None
        self._check = check
        self._scheduler = Scheduler(runtime, len(self._tasks), lead, check)
        self._peak_bytes: int | None = None
        self._sources: list[tuple[Source, ...]] | None = None
        self._sources_s: float | None = None

    def pieces(self) -> Iterator[Delta]:
        """Run the call; there are no pieces.

        Raises:
            OutOfMemoryError: there is too little memory for all answers.
        """
        for task in self._tasks:
            self._scheduler.add(task)
        try:
            while self._scheduler.waiting or self._scheduler.running:
                self._scheduler.step()
                self._raise_fault()
        finally:
            for task in self._tasks:
                self._scheduler.cancel(task)
        _, self._peak_bytes = self._clock.stop()
        warn_of_unanswered([task.answer.text for task in self._tasks], self.settings)
        self._find_sources()
        return iter(())

    def _raise_fault(self) -> None:
        error = next((task.error for task in self._tasks if task.error is not None), None)
        if error is not None and self._check is not None:
            # A changed model may be the reason.
            self._check()
        if isinstance(error, OutOfMemoryError):
            message = out_of_memory(
                len(self._tasks), len(self._context), self._runtime.tokens_per_forward
            )
            raise OutOfMemoryError(message) from error
        if error is not None:
            raise error

    def _find_sources(self) -> None:
        finder = requests.source_finder(self._runtime, self._context, self.settings)
        if finder is None:
            return
        started = time.perf_counter()
        rows = [
            (self._prompts[row // self.settings.answers_per_query], task.answer.text.token_ids)
            for row, task in enumerate(self._tasks)
        ]
        request = requests.on(self._runtime, self._context, queries=[])
        self._sources = finder.sources(attention_of(request, finder.readings(rows)))
        _, self._peak_bytes = self._clock.stop()
        self._sources_s = time.perf_counter() - started

    def generations(self) -> list[Generation]:
        """Return the answers, those to one query next to each other."""
        answers = [
            replace(task.answer.generation(), peak_bytes=self._peak_bytes) for task in self._tasks
        ]
        if self._sources is None:
            return answers
        return [
            replace(
                answer,
                sources=sources,
                timings=replace(answer.timings, sources_s=self._sources_s),
            )
            for answer, sources in zip(answers, self._sources, strict=True)
        ]
