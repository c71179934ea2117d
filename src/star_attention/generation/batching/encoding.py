"""Contexts that are encoded while rows are answered, forward by forward."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import torch

from star_attention import encoding, inputs
from star_attention.errors import InvalidInputError, release_frames
from star_attention.generation import editing
from star_attention.generation.batching.leading import Encode, Lead, numbers
from star_attention.hf.progress import Progress
from star_attention.inputs import ContextInput
from star_attention.phase1 import Steps, finish
from star_attention.planning.turns import forwards_by_turn
from star_attention.runtime import Runtime
from star_attention.storage.context import EncodedContext
from star_attention.storage.transient import Transient

_SHARE = 0.18
"""Time of decode steps between two forwards of a context, as a share of a forward's."""

Turns = Generator[int, None, list[EncodedContext]]
"""Work that pauses after each turn, with the tokens that it encoded. All ranks take the same number
of turns; in some of them a rank may have nothing to do."""


class EncodeTask:
    """A context under way.

    Args:
        tokens: tokens of the context.
        turns: what encodes it on this rank.
        lead: tells the other ranks.
        first: what they need to know before the first turn.

    Attributes:
        tokens: tokens of the context.
        encoded: those that have been encoded.
        context: the encoded context, once it is there.
        error: why there is none; None if there is, or will be.
        canceled: True if nobody waits for it any more.
    """

    def __init__(self, tokens: int, turns: Turns, lead: Lead, first: Encode) -> None:
        self.tokens, self.encoded = tokens, 0
        self.context: EncodedContext | None = None
        self.error: Exception | None = None
        self.canceled = False
        self._turns: Turns | None = turns
        self._lead, self._command, self._number = lead, first, first.number
        self._faults: int | None = None

    @property
    def done(self) -> bool:
        return self._turns is None

    def step(self) -> None:
        """Take a turn.

        Raises:
            Exception: a fault in the middle of it, after which the ranks' rows differ.
        """
        turns, lead = self._turns, self._lead
        assert turns is not None, "the context has been encoded"
        if lead.failure is not None and self._faults not in (None, lead.faults):
            # What its ranks send each other may not arrive.
            self.fail(lead.failure)
            return
        self._faults = lead.faults
        try:
            with lead.command(lambda: self._command):
                self._take(turns)
        except Exception as error:
            if lead.has_failed:
                raise
            # It is this context's: rows and other contexts go on.
            self.fail(error)
        self._command = Encode(number=self._number)

    def _take(self, turns: Turns) -> None:
        try:
            self.encoded = min(self.tokens, self.encoded + next(turns))
        except StopIteration as end:
            (self.context,) = end.value
            self._turns = None

    def fail(self, error: Exception) -> None:
        """End without a context."""
        release_frames(error)
        self.error = error
        self._end()

    def cancel(self) -> None:
        """Stop here, and free what has been encoded."""
        if self._turns is not None:
            self.canceled = True
            self._end()

    def _end(self) -> None:
        if self._turns is not None:
            self._turns.close()
            self._turns = None
            self._lead.drop(self._number)


class Encodings:
    """The contexts that a batch encodes, one after another.

    A forward of a context comes after so many decode steps that these take a share of its time.

    Args:
        device: where forwards run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tasks: deque[EncodeTask] = deque()
        self._owed_s = 0.0

    def __bool__(self) -> bool:
        """True while a context is under way."""
        while self._tasks and self._tasks[0].done:
            self._tasks.popleft()
        return bool(self._tasks)

    def add(self, task: EncodeTask) -> None:
        self._tasks.append(task)

    def step(self) -> None:
        """Run a forward of the first context, if decode steps have had their share."""
        if not self or self._owed_s > 0.0:
            return
        started = time.perf_counter()
        self._tasks[0].step()
        if self._device.type == "cuda":
            # The time of a forward, not of its launch.
            torch.cuda.synchronize(self._device)
        self._owed_s = _SHARE * (time.perf_counter() - started)

    def spent(self, seconds: float, *, more: bool) -> None:
        """Count the time of a decode step.

        Args:
            seconds: the time.
            more: True if other rows wait for the next one.
        """
        self._owed_s = self._owed_s - seconds if more else 0.0

    def close(self, failure: BaseException | None = None) -> None:
        """Cancel all; after a failure they have its error."""
        for task in self._tasks:
            if isinstance(failure, Exception) and not task.done:
                task.fail(failure)
            task.cancel()


class Encoding(Transient):
    """A context that a batch encodes while rows are answered."""

    _instead_of_pickling = "take its result, and save it"
    _instead_of_deepcopy = "take its result"

    def __init__(self, task: EncodeTask, step: Callable[[], Any]) -> None:
        self._task, self._step = task, step

    @property
    def done(self) -> bool:
        """True once the context is there, or will never be."""
        return self._task.done

    @property
    def context(self) -> EncodedContext | None:
        """The encoded context, None before it is there."""
        return self._task.context

    @property
    def error(self) -> Exception | None:
        """Why the context could not be encoded; None otherwise."""
        return self._task.error

    @property
    def progress(self) -> float:
        """The share of the context that has been encoded, 0 to 1."""
        if self.context is not None:
            # Blocks that were copied are no forward's.
            return 1.0
        return self._task.encoded / self._task.tokens

    def result(self) -> EncodedContext:
        """Return the context, after running the batch until it has been encoded.

        Raises:
            OutOfMemoryError: there was too little memory for it.
            InvalidInputError: it was canceled.
        """
        while not self.done:
            self._step()
        if self._task.error is not None:
            raise self._task.error
        if self._task.context is None:
            raise InvalidInputError("this context was canceled; encode it again")
        return self._task.context

    def cancel(self) -> None:
        """Stop encoding, and free what has been encoded."""
        self._task.cancel()

    def __repr__(self) -> str:
        """Return e.g. `Encoding(4,096 of 16,384 tokens)`."""
        return f"Encoding({self._task.encoded:,} of {self._task.tokens:,} tokens)"


def encode_task(
    runtime: Runtime,
    lead: Lead,
    content: Any,
    progress: Progress | bool | None,
    options: dict[str, Any],
) -> EncodeTask:
    """Check a context, and return what encodes it.

    Args:
        runtime: the engine's.
        lead: tells the other ranks.
        content: a context, as for `StarLLM.encode`.
        progress: as for `StarLLM.encode`.
        options: `query`, `settings`, `chat_template_kwargs` and `reuse` of `StarLLM.encode`.

    Raises:
        InvalidInputError: several contexts; and whatever `StarLLM.encode` refuses.
    """
    several, contexts = inputs.prepare_contexts(
        runtime,
        content,
        options.get("query"),
        options.get("settings"),
        options.get("chat_template_kwargs"),
    )
    if several:
        raise InvalidInputError(
            f"a batch encodes one context at a call, got {len(contexts)}; call encode for each"
        )
    reuse = options.get("reuse")
    first = Encode(
        number=next(numbers), contexts=contexts, reuse=editing.reused_key(runtime, reuse)
    )
    turns = turns_of(runtime, contexts, reuse, progress)
    return EncodeTask(len(contexts[0].ids_L), turns, lead, first)


def turns_of(
    runtime: Runtime,
    contexts: list[ContextInput],
    reuse: EncodedContext | None,
    progress: Progress | bool | None,
) -> Turns:
    """Return what encodes a context on this rank, turn by turn. Collective.

    Args:
        runtime: the engine's.
        contexts: the context.
        reuse: a context whose blocks are copied; None for none.
        progress: as for `StarLLM.encode`.
    """
    if reuse is not None:
        # On several ranks, which of them encodes how much depends on what has changed.
        once: list[int] | None = None if runtime.comm.size == 1 else []
        return _in_turns(editing.steps(runtime, contexts, reuse, progress), once)
    forwards = _forwards(runtime, len(contexts[0].ids_L))
    shares = runtime.comm.cp_size
    steps = encoding.steps(runtime, contexts, progress, in_turns=True)
    return _in_turns(steps, forwards, shares)


def _forwards(runtime: Runtime, tokens: int) -> list[int] | None:
    """Return how many forwards this rank runs in each turn; None for one, until the end.

    Where a rank's forward waits for many of other ranks', there is a single turn.
    """
    comm, method, plan = runtime.comm, runtime.method, runtime.plan_for(tokens)
    if comm.size == 1:
        return None
    if plan.stripes is not None or method.layout(runtime.config, plan) != plan.layout:
        return []
    return forwards_by_turn(
        plan,
        runtime.tokens_per_forward,
        rank=comm.cp_rank,
        local_anchor=runtime.config.anchor_source == "local",
    )


def _in_turns(
    steps: Steps[list[EncodedContext]], forwards: list[int] | None, shares: int = 1
) -> Turns:
    """Run work in turns.

    Args:
        steps: the work, which pauses after each forward.
        forwards: forwards of each turn but the last, in which the rest is done; None for one a turn
            until the end.
        shares: ranks that encode as many tokens at the same time.
    """
    try:
        if forwards is None:
            while True:
                yield next(steps).tokens
        for count in forwards:
            yield shares * sum(next(steps).tokens for _ in range(count))
        return finish(steps)
    except StopIteration as end:
        contexts: list[EncodedContext] = end.value
        return contexts
    finally:
        steps.close()
