"""What runs next: rows that wait are admitted in order, then each cohort takes a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

from star_attention.errors import release_frames
from star_attention.generation.batching.answer import CANCELED
from star_attention.generation.batching.cohort import Cohort, Event
from star_attention.generation.batching.leading import Lead
from star_attention.generation.batching.prefill import groups_of, prefill
from star_attention.generation.batching.task import RowTask
from star_attention.generation.result import Delta
from star_attention.hf.execution.rows import RowForwards, kind_of
from star_attention.runtime import Runtime


class Scheduler:
    """The rows of one batch.

    Args:
        runtime: the engine's.
        max_rows: most rows that run at once.
        lead: tells the other ranks.
        check: what is left to check of the model once the first forward has been issued. Its error
            is that of all rows.
    """

    def __init__(
        self,
        runtime: Runtime,
        max_rows: int,
        lead: Lead,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.max_rows = max_rows
        self._runtime, self._lead, self._check = runtime, lead, check
        self._waiting: deque[RowTask] = deque()
        self._cohorts: dict[Hashable, Cohort] = {}

    @property
    def waiting(self) -> int:
        """Rows that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Rows that have begun and not ended."""
        return sum(len(cohort) for cohort in self._cohorts.values())

    def add(self, task: RowTask) -> None:
        """Let a row wait for its turn."""
        self._waiting.append(task)

    def cancel(self, task: RowTask) -> None:
        """End a row here, and free what it holds."""
        if task.done:
            return
        task.end(CANCELED)
        if task in self._waiting:
            self._waiting.remove(task)
        for cohort in self._cohorts.values():
            cohort.drop_ended()
        self._tidy()

    def step(self) -> list[Event]:
        """Admit rows as far as there is room, and draw a token of every row.

        Returns:
            What each row got, and rows that have ended.
        """
        events = self._admit()
        for cohort in list(self._cohorts.values()):
            events += cohort.step()
        self._tidy()
        return events

    def _tidy(self) -> None:
        """Let rows wait again whose queries no step reads, and drop cohorts without rows."""
        for cohort in self._cohorts.values():
            self._wait_again(cohort.unreadable())
        self._cohorts = {key: each for key, each in self._cohorts.items() if len(each)}

    def _wait_again(self, tasks: list[RowTask]) -> None:
        """Let rows wait before all others, which came later."""
        self._waiting.extendleft(sorted(tasks, key=_age, reverse=True))

    def _admit(self) -> list[Event]:
        """Read the queries of waiting rows, or let a step do so; return those that ended by it."""
        admitted: list[RowTask] = []
        # A long query keeps the others waiting for a forward, not for all that wait.
        tokens, room = self._runtime.tokens_per_forward, self.max_rows - self.running
        while self._waiting and len(admitted) < room:
            task = self._waiting[0]
            # Answers to one query begin together: they share random numbers.
            if tokens <= 0 and not (admitted and task.shares_query(admitted[-1])):
                break
            admitted.append(self._waiting.popleft())
            tokens -= task.unread_tokens
        events: list[Event] = []
        groups = sorted(groups_of(admitted), key=lambda group: min(map(_age, group)))
        for at, group in enumerate(groups):
            cohort = self._reader(group)
            if cohort is None:
                events += self._begin(group)
            elif not cohort.read(group):
                # Nobody overtakes them.
                self._wait_again([task for later in groups[at:] for task in later])
                break
        return events

    def _reader(self, tasks: list[RowTask]) -> Cohort | None:
        """Return the rows whose next step may read the queries of a group; None for no rows."""
        request = tasks[0].request
        assert request is not None
        kind = kind_of(request.handle, request.shard, request.rope_length)
        cohort = None if kind is None else self._cohorts.get(kind)
        return cohort if cohort is not None and cohort.may_read(tasks) else None

    def _begin(self, tasks: list[RowTask]) -> list[Event]:
        """Read the queries of a group; a row that fails alone ends with its error."""
        try:
            logits_RV = prefill(tasks, self._lead)
        except Exception as error:
            if self._lead.has_failed:
                raise
            if self._lead.was_late:
                return self._begin(tasks)
            if len(tasks) == 1:
                tasks[0].fail(error)
                return [(tasks[0], Delta())]
            release_frames(error)
            return [event for task in tasks for event in self._begin([task])]
        check, self._check = self._check, None
        if check is not None:
            check()
        kind = tasks[0].kind
        key = ("alone", tasks[0].number) if kind is None else kind
        if key not in self._cohorts:
            self._cohorts[key] = self._new_cohort()
        self._cohorts[key].join(tasks, logits_RV)
        return []

    def _new_cohort(self) -> Cohort:
        handle = self._runtime.handle
        forwards = RowForwards(handle, self._runtime.comm)
        # The other ranks wait for tokens that Python has seen.
        is_ahead = handle.device.type == "cuda" and self._lead.is_alone
        return Cohort(handle, forwards, self._lead, is_ahead=is_ahead)


def _age(task: RowTask) -> int:
    return task.number
