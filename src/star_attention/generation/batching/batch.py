"""`StarLLM.batch`: answers to different queries on different contexts, in shared decode steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Unpack

from star_attention.encoding import EncodeOptions, check_options
from star_attention.errors import InvalidInputError, quote, release_frames_on_oom
from star_attention.generation import requests
from star_attention.generation.batching.encoding import Encoding, Encodings, encode_task
from star_attention.generation.batching.leading import Lead
from star_attention.generation.batching.scheduler import Scheduler
from star_attention.generation.batching.task import RowTask, tasks_of
from star_attention.generation.conversation import (
    Conversation,
    KeptTokens,
    LeadingKeeper,
    beginning_with,
)
from star_attention.generation.result import Asked, Delta, Generation, talk_after
from star_attention.generation.run import warn_of_unanswered
from star_attention.generation.settings import GenerateOptions, ResolvedSettings
from star_attention.generation.start import ask_with
from star_attention.hf.text.tool_reader import with_tools
from star_attention.inputs import Content, Prepared
from star_attention.runtime import Runtime
from star_attention.storage.transient import Transient

MAX_ROWS = 64
"""Most rows of a batch that run at once, where no number is given."""


class Row(Transient):
    """One answer of a batch, while it is generated and afterwards.

    `result()` is the whole answer. `for piece in row` gives its text in pieces, and
    `for delta in row.deltas()` the model's reasoning, too. Both run the batch, and with it all
    other rows, as far as they need.
    """

    _instead_of_pickling = "take its result"
    _instead_of_deepcopy = "add the query again, with the same seed"

    def __init__(self, batch: Batch, task: RowTask) -> None:
        self._batch, self._task = batch, task
        self._result: Generation | None = None

    @property
    def text(self) -> str:
        """The text so far; what may begin a stop string is held back."""
        return self._task.answer.text.text

    @property
    def reasoning(self) -> str | None:
        """What the model marked as its reasoning so far; None for none."""
        return self._task.answer.text.reasoning

    @property
    def token_ids(self) -> list[int]:
        """The token ids so far."""
        return list(self._task.answer.text.token_ids)

    @property
    def num_tokens(self) -> int:
        """The number of tokens so far."""
        return len(self._task.answer.text.token_ids)

    @property
    def done(self) -> bool:
        """True once no token follows."""
        return self._task.done

    @property
    def error(self) -> Exception | None:
        """Why the row ended without an answer; None if it did not."""
        return self._task.error

    def result(self) -> Generation:
        """Return the answer, after running the batch until it has ended.

        Raises:
            OutOfMemoryError: there was too little memory for this row.
            NonFiniteError: the model computed NaN or infinity.
        """
        while not self.done:
            self._batch.step()
        if self._task.error is not None:
            raise self._task.error
        if self._result is None:
            self._result = self._task.answer.generation()
        return self._result

    def __iter__(self) -> Iterator[str]:
        for delta in self.deltas():
            if delta.text:
                yield delta.text

    def deltas(self) -> Iterator[Delta]:
        """Yield what was added to the answer since the last one, from the beginning.

        Raises:
            OutOfMemoryError, NonFiniteError: as for `result`.
        """
        text = reasoning = 0
        while True:
            done = self.done
            whole, thoughts = self.text, self.reasoning or ""
            if len(whole) > text or len(thoughts) > reasoning:
                yield Delta(text=whole[text:], reasoning=thoughts[reasoning:])
                text, reasoning = len(whole), len(thoughts)
            elif done:
                break
            else:
                self._batch.step()
        if self._task.error is not None:
            raise self._task.error

    def cancel(self) -> None:
        """End the answer here, and free what it holds; the result is the answer so far."""
        self._batch.cancel(self)

    def __repr__(self) -> str:
        """Return e.g. `Row('It is', 3 tokens, running)`."""
        state = "running"
        if self.error is not None:
            state = type(self.error).__name__
        elif self.done:
            state = str(self._task.answer.text.finish_reason)
        return f"Row({quote(self.text)}, {self.num_tokens} tokens, {state})"


class Batch(Transient):
    """Answers that share decode steps, each with a context, a query and settings of its own.

    Rows join and leave between steps: a row that is added while others run takes part in the next
    step, and one that ends makes room for the next that waits. Nothing runs by itself: `step`,
    iteration over the batch, and a row's `result` or pieces do the work. Use it from one thread.
    A row's answer is the one that `generate` would give, up to rounding, whatever runs beside it.
    """

    _instead_of_pickling = "take the results of its rows"
    _instead_of_deepcopy = "make another one"

    def __init__(self, runtime: Runtime, max_rows: int, lead: Lead) -> None:
        self._runtime, self._ask, self._lead = runtime, ask_with(runtime), lead
        self._scheduler = Scheduler(runtime, max_rows, lead)
        self._encodings = Encodings(runtime.device)
        # Rows that have not ended.
        self._rows: dict[RowTask, Row] = {}
        self._ended_by: str | None = None

    @property
    def running(self) -> int:
        """Rows that have begun and not ended."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Rows that wait for others to end."""
        return self._scheduler.waiting

    def add(
        self,
        context: Asked,
        query: Content | Prepared | None = None,
        *,
        begun: KeptTokens | None = None,
        **settings: Unpack[GenerateOptions],
    ) -> Row:
        """Add a row, which takes part from the next step on, as soon as there is room.

        Args:
            context: the context to ask, or a conversation to go on with, as for
                `StarLLM.generate`. It is referred to until the row has ended.
            query: one query, as for `StarLLM.generate`.
            begun: what a conversation on an equal context kept; as far as the query begins with its
                token ids, they are not computed again. For a context, not a conversation.
            settings: those of `StarLLM.generate` for one answer by greedy search or sampling.

        Raises:
            InvalidInputError: a setting that cannot work here, several queries, or a batch that is
                closed; and whatever `StarLLM.generate` raises.
        """
        self._check_open()
        with release_frames_on_oom():
            talk = talk_after(context, self._ask)
            if begun is not None:
                talk = beginning_with(talk, begun)
            task = self._task(talk, query, dict(settings))
        row = self._rows[task] = Row(self, task)
        self._scheduler.add(task)
        return row

    def _task(self, talk: Conversation, query: Any, options: dict[str, Any]) -> RowTask:
        """Make a row for the query after a conversation, or after a context without turns."""
        runtime, context = self._runtime, talk.context
        options = {"keep": True} | options if talk.turns else options
        if not runtime.handle.is_frozen:
            runtime.check_context(context)
        prepared = requests.prepared(runtime, context, query, options, talk.turns)
        settings = _check_single(prepared)
        requests.check_room(runtime, talk, prepared)
        (task,) = tasks_of(runtime, context, prepared, self._lead)
        task.go_on_from(talk)
        task.keeper = LeadingKeeper.of(
            talk, prepared.queries, settings, runtime.tokenizer, self._ask
        )
        return task

    def encode(
        self,
        content: Content | Prepared,
        **options: Unpack[EncodeOptions],
    ) -> Encoding:
        """Encode a context between the steps of the rows, which it slows down but does not stop.

        While rows run, decode steps get a seventh of the time, and none waits for longer than one
        forward of the context. Several contexts are encoded one after another. The result
        equals that of `StarLLM.encode`, up to rounding.

        Args:
            content: a context, as for `StarLLM.encode`.
            options: keywords of `StarLLM.encode`.

        Raises:
            InvalidInputError: several contexts, or a batch that is closed; and whatever
                `StarLLM.encode` raises before it encodes anything.
        """
        self._check_open()
        check_options(options)
        progress, tools = options.get("progress"), options.get("tools")
        kwargs = with_tools(self._runtime.tokenizer, options.get("chat_template_kwargs"), tools)
        wanted = {**options, "chat_template_kwargs": kwargs}
        with release_frames_on_oom():
            task = encode_task(self._runtime, self._lead, content, progress, wanted)
        self._encodings.add(task)
        return Encoding(task, self.step)

    def step(self) -> list[tuple[Row, Delta]]:
        """Let rows that wait begin, as far as there is room, and draw a token of every row.

        If contexts are encoded meanwhile, a forward of theirs may come before.

        Returns:
            The rows whose text or reasoning continues, with what was added, and those that have
            ended, whose delta may be empty.

        Raises:
            RankError: a rank is lost, or a part of the step failed on one. The batch has ended.
        """
        self._check_open()
        with self._running():
            self._lead.check()
            self._encodings.step()
            started = time.perf_counter()
            events = [(self._rows[task], delta) for task, delta in self._scheduler.step()]
            spent_s = time.perf_counter() - started
        for task in [task for task in self._rows if task.done]:
            del self._rows[task]
            if task.error is None:
                warn_of_unanswered([task.answer.text], task.answer.settings)
        self._encodings.spent(spent_s, more=bool(self._rows))
        self._settle()
        return events

    def _settle(self) -> None:
        """Let all ranks free what has ended, if no step may follow for long."""
        if not (self._rows or self._encodings):
            with self._running():
                self._lead.settle()

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Run a step; after an exception that is of no single row, the batch ends."""
        try:
            with release_frames_on_oom():
                yield
        except BaseException as error:
            self._end(f"has failed ({type(error).__name__})", error)
            raise

    def __iter__(self) -> Iterator[tuple[Row, Delta]]:
        """Step until all rows have ended and all contexts are there; yield what was added."""
        while self._rows or self._encodings:
            yield from self.step()

    def cancel(self, row: Row) -> None:
        """End a row here, as `Row.cancel` does."""
        for task in [task for task, own in self._rows.items() if own is row]:
            self._scheduler.cancel(task)
            del self._rows[task]
        if self._ended_by is None:
            self._settle()

    def close(self) -> None:
        """Cancel all that has not ended; nothing can be added afterwards."""
        if self._ended_by is None:
            self._end("is closed")

    def _end(self, why: str, failure: BaseException | None = None) -> None:
        self._ended_by = why
        self._encodings.close(failure)
        for task, row in list(self._rows.items()):
            self.cancel(row)
            if isinstance(failure, Exception):
                task.error = failure
        self._lead.close()

    def _check_open(self) -> None:
        if self._ended_by is not None:
            raise InvalidInputError(f"this batch {self._ended_by}; make a new one: star.batch()")

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        """Return e.g. `Batch(3 running, 1 waiting)`."""
        return f"Batch({self.running} running, {self.waiting} waiting)"


class BatchCalls:
    """The method of `StarLLM` that makes batches."""

    def batch(self: Any, *, max_rows: int = MAX_ROWS) -> Batch:
        """Make a batch: answers that share decode steps, and join and leave between them.

        Args:
            max_rows: maximum number of rows that run at once; others wait for their turn.

        Raises:
            InvalidInputError: `max_rows` is below 1, or the rank is not 0.
        """
        runtime: Runtime = self.runtime
        if isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1:
            raise InvalidInputError(
                f"max_rows: expected an integer of at least 1, got {quote(max_rows)}"
            )
        with runtime.collective("a batch"):
            if runtime.comm.rank > 0:
                raise InvalidInputError(
                    f"rank 0 runs a batch, and rank {runtime.comm.rank} follows it; call"
                    " star.follow() there"
                )
            lead = Lead.begin(runtime)
        return Batch(runtime, max_rows, lead)


def _check_single(prepared: Prepared) -> ResolvedSettings:
    """Check that there is one query, and one answer by our own loop; return the settings."""
    settings = prepared.settings
    assert settings is not None, "rank 0 prepares"
    if prepared.several_queries or len(prepared.prompts) != 1:
        raise InvalidInputError(
            f"a row answers one query, got {len(prepared.prompts)}; add them one by one"
        )
    if not settings.uses_own_loop:
        raise InvalidInputError(
            "a row is answered by greedy search or sampling, not by beams or prompt lookup; leave"
            " them out, or use generate"
        )
    if settings.answers_per_query > 1:
        raise InvalidInputError(
            f"a row is one answer, got num_return_sequences {settings.answers_per_query}; add the"
            " query several times, with another seed each"
        )
    return settings
