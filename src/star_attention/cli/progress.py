"""Status messages on stderr: loading, progress of encoding, and one-line summaries."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from star_attention.cli.streams import say
from star_attention.cli.torchrun import is_rank_0
from star_attention.planning.plan import BlockPlan, Span

_PROGRESS_LINES = 10
"""Lines of progress if stderr is not a terminal."""

Progress = Callable[[Span, BlockPlan], None]
"""A callback of `StarLLM.encode`."""

RankProgress = Callable[[], list[tuple[int, int]]]
"""Returns tokens done and tokens to do of each rank; an empty list on one rank."""


class Status:
    """Messages on stderr: animated on a terminal, plain lines elsewhere, none if `quiet`."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet or not is_rank_0()

    def say(self, text: str) -> None:
        """Print a line."""
        if not self.quiet:
            say(text)

    def waiting(self, text: str) -> AbstractContextManager[Any]:
        """Show the current activity."""
        if self.quiet or not sys.stderr.isatty():
            self.say(text)
            return nullcontext()
        from rich.console import Console

        return Console(stderr=True).status(text)

    @contextmanager
    def progress(self, rank_progress: RankProgress) -> Iterator[Any]:
        """Show the progress of encoding: yields a callback for `encode(progress=...)`, or None."""
        if self.quiet:
            yield None
        elif sys.stderr.isatty():
            yield from _rank_bars(rank_progress) if len(rank_progress()) > 1 else _bar()
        elif len(rank_progress()) > 1:
            lines = _RankLines(self, rank_progress)
            yield lines
            lines.end()
        else:
            yield _Lines(self)


class SizeNote:
    """A progress callback that first says how large the saved context will be.

    Args:
        status: prints it.
        describe: returns what to say of a context of so many tokens.
        progress: the callback that comes after it, or None.
    """

    def __init__(
        self, status: Status, describe: Callable[[int], str], progress: Progress | None
    ) -> None:
        self._status, self._describe = status, describe
        self._progress = progress
        self._layer = getattr(progress, "layer", None)

    def __call__(self, span: Span, plan: BlockPlan) -> None:
        self._say(plan)
        if self._progress is not None:
            self._progress(span, plan)

    def layer(self, span: Span, plan: BlockPlan, layers: int, num_layers: int) -> None:
        """Say it before the first forward has ended."""
        self._say(plan)
        if self._layer is not None:
            self._layer(span, plan, layers, num_layers)

    def _say(self, plan: BlockPlan) -> None:
        describe, self._describe = self._describe, lambda tokens: ""
        if text := describe(plan.context_tokens):
            self._status.say(text)


class _Lines:
    """A progress callback that prints a line for every tenth of the context."""

    def __init__(self, status: Status) -> None:
        self.status = status
        self.shown_tenth = 0

    def __call__(self, span: Span, plan: BlockPlan) -> None:
        tenth = span.stop * _PROGRESS_LINES // plan.context_tokens
        if tenth > self.shown_tenth:
            self.shown_tenth = tenth
            self.status.say(
                f"encoded {span.stop:,} of {plan.context_tokens:,} tok,"
                f" block {_block(span, plan)} of {plan.num_blocks}"
            )


class _RankLines:
    """A progress callback that prints a line about all ranks for every tenth of rank 0's part."""

    def __init__(self, status: Status, rank_progress: RankProgress) -> None:
        self.status, self.rank_progress = status, rank_progress
        self.shown_tenth = 0

    def __call__(self, span: Span, plan: BlockPlan) -> None:
        own = plan.layout[0]
        done = sum(stop - start for start, stop in own.within(0, span.stop))
        tenth = done * _PROGRESS_LINES // max(1, own.tokens)
        if tenth > self.shown_tenth:
            self.shown_tenth = tenth
            # Reports of other ranks are up to a second old. A rank without one may also be idle.
            others = [
                f", rank {rank} {done:,} of {total:,}"
                for rank, (done, total) in enumerate(self.rank_progress())
                if rank and total
            ]
            self.status.say(f"encoded: rank 0 {done:,} of {own.tokens:,} tok" + "".join(others))

    def end(self) -> None:
        """Print that every rank is done."""
        self.status.say(f"encoded: all {len(self.rank_progress())} ranks are done")


def _bar() -> Iterator[Any]:
    from rich.progress import TextColumn

    with _progress(TextColumn("encoding"), description_last=True) as bar:
        yield _Bar(bar)


class _Bar:
    """A progress callback that moves a bar of rich, layer by layer."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        # The plan is known from the first forward on.
        self._task = bar.add_task("", total=None)

    def __call__(self, span: Span, plan: BlockPlan) -> None:
        self._show(span.stop, span, plan)

    def layer(self, span: Span, plan: BlockPlan, layers: int, num_layers: int) -> None:
        """Show a part of a forward, which may take many seconds on a CPU."""
        self._show(span.start + span.tokens * layers / (num_layers + 1), span, plan)

    def _show(self, tokens: float, span: Span, plan: BlockPlan) -> None:
        self._bar.update(
            self._task,
            total=plan.context_tokens,
            completed=tokens,
            description=f"block {_block(span, plan)} of {plan.num_blocks},"
            f" {int(tokens):,} of {plan.context_tokens:,} tok",
        )


def _rank_bars(rank_progress: RankProgress) -> Iterator[Any]:
    """Show a bar per rank. A thread updates them: rank 0 may be in the middle of a long block."""
    with _progress() as bars:
        tasks = [bars.add_task(f"rank {rank}", total=None) for rank in range(len(rank_progress()))]
        ended = threading.Event()

        def refresh() -> None:
            while not ended.wait(0.3):
                for rank, (done, total) in enumerate(rank_progress()):
                    state = f"{done:,} of {total:,} tok" if total else "idle"
                    bars.update(
                        tasks[rank],
                        total=total or None,
                        completed=done,
                        description=f"rank {rank}: {state}",
                    )

        thread = threading.Thread(target=refresh, daemon=True)
        thread.start()
        try:
            yield lambda span, plan: None
        finally:
            ended.set()
            thread.join()


def _progress(*columns: Any, description_last: bool = False) -> Any:
    """Create rich's progress display on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    description = TextColumn("{task.description}")
    middle = (BarColumn(), description) if description_last else (description, BarColumn())
    return Progress(
        *columns,
        *middle,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _block(span: Span, plan: BlockPlan) -> int:
    return (span.stop - 1) // plan.block_size + 1
