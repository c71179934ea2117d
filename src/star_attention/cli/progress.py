"""What is told on stderr besides the answer: loading, progress over blocks, and a one-line summary."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from star_attention.cli.streams import say
from star_attention.cli.torchrun import is_rank_0
from star_attention.planning.plan import BlockPlan, Span, counted, format_size

if TYPE_CHECKING:
    from star_attention.generation.result import Generation
    from star_attention.storage.context import EncodedContext

_STEPS = 10
"""Lines of progress where stderr is no terminal."""


class Notes:
    """Messages on stderr, animated on a terminal, plain lines otherwise, none when `quiet`."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet or not is_rank_0()

    def say(self, text: str) -> None:
        if not self.quiet:
            say(text)

    def waiting(self, text: str) -> AbstractContextManager[Any]:
        """Says what is being waited for."""
        if self.quiet or not sys.stderr.isatty():
            self.say(text)
            return nullcontext()
        from rich.console import Console

        return Console(stderr=True).status(text)

    @contextmanager
    def progress(self, of_ranks: Callable[[], list[tuple[int, int]]]) -> Iterator[Any]:
        """A callback for `encode(progress=...)`; `of_ranks` tells how far each of several ranks is."""
        if self.quiet:
            yield None
        elif sys.stderr.isatty():
            yield from _bars(of_ranks) if len(of_ranks()) > 1 else _bar()
        elif len(of_ranks()) > 1:
            lines = _RankLines(self, of_ranks)
            yield lines
            lines.end()
        else:
            yield _Lines(self)


class _Lines:
    """A line for every tenth of the context; a callback."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self.told = 0

    def __call__(self, span: Span, plan: BlockPlan) -> None:
        tenth = span.stop * _STEPS // plan.context_tokens
        if tenth > self.told:
            self.told = tenth
            self.notes.say(
                f"encoded {span.stop:,} of {plan.context_tokens:,} tok, block {_block(span, plan)} of {plan.num_blocks}"
            )


def _bar() -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("encoding"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)  # the plan is known from the first forward on

        def advance(span: Span, plan: BlockPlan) -> None:
            told = f"block {_block(span, plan)} of {plan.num_blocks}, {span.stop:,} of {plan.context_tokens:,} tok"
            bar.update(task, total=plan.context_tokens, completed=span.stop, description=told)

        yield advance


class _RankLines:
    """A line about all ranks for every tenth of rank 0's share; a callback."""

    def __init__(self, notes: Notes, of_ranks: Callable[[], list[tuple[int, int]]]) -> None:
        self.notes, self.of_ranks = notes, of_ranks
        self.told = 0

    def __call__(self, span: Span, plan: BlockPlan) -> None:
        start, stop = plan.rank_range(0)
        tenth = (span.stop - start) * _STEPS // max(1, stop - start)
        if tenth > self.told:
            self.told = tenth
            # (What the others say is a second old at most; one that has said nothing yet may be idle, too.)
            others = [
                f", rank {rank} {done:,} of {total:,}"
                for rank, (done, total) in enumerate(self.of_ranks())
                if rank and total
            ]
            self.notes.say(
                f"encoded: rank 0 {span.stop - start:,} of {stop - start:,} tok" + "".join(others)
            )

    def end(self) -> None:
        self.notes.say(f"encoded: all {len(self.of_ranks())} ranks are done")


def _bars(of_ranks: Callable[[], list[tuple[int, int]]]) -> Iterator[Any]:
    """A bar for each rank, kept up to date by a thread: rank 0 may be in the middle of a long block."""
    import threading

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks = [bar.add_task(f"rank {rank}", total=None) for rank in range(len(of_ranks()))]
        ended = threading.Event()

        def refresh() -> None:
            while not ended.wait(0.3):
                for rank, (task, (done, total)) in enumerate(zip(tasks, of_ranks(), strict=True)):
                    told = (
                        f"rank {rank}: {done:,} of {total:,} tok" if total else f"rank {rank}: idle"
                    )
                    bar.update(task, total=total or None, completed=done, description=told)

        thread = threading.Thread(target=refresh, daemon=True)
        thread.start()
        try:
            yield lambda span, plan: None
        finally:
            ended.set()
            thread.join()


def _block(span: Span, plan: BlockPlan) -> int:
    return (span.stop - 1) // plan.block_size + 1


def context_summary(context: EncodedContext) -> str:
    """`context 131,072 tok, 8 blocks x 16k, anchor 16k`."""
    plan = context.plan
    head = f"context {plan.context_tokens:,} tok, "
    if plan.ranks > 1:
        head += f"{plan.ranks} ranks, "
    if context.method in ("dense", "ring"):
        return head + context.method
    if context.method == "streaming_llm":
        return head + f"{counted(plan.anchor_size, 'sink')}, window {format_size(plan.block_size)}"
    blocks = f"{counted(plan.num_blocks, 'block')} x {format_size(plan.block_size)}"
    return head + f"{blocks}, anchor {format_size(plan.anchor_size)}"


def answer_summary(reply: Generation) -> str:
    """`first token 0.4 s, 41 tok/s`."""
    rate = reply.timings.tokens_per_s
    return f"first token {seconds(reply.timings.ttft_s)}" + (
        "" if rate is None else f", {rate:,.0f} tok/s"
    )


def seconds(value: float) -> str:
    """Seconds with one decimal, or two below a tenth."""
    return f"{value:,.1f} s" if value >= 0.1 else f"{value:.2f} s"


def amount(size: float, units: tuple[str, ...], step: int) -> str:
    """A quantity in the largest unit that leaves a number of at least 1: `1.2 GiB`, `3.4 PFLOP`."""
    index = 0
    while size >= step and index < len(units) - 1:
        size, index = size / step, index + 1
    return f"{size:,.0f} {units[index]}" if index == 0 else f"{size:,.1f} {units[index]}"


def in_bytes(size: int) -> str:
    return amount(size, ("B", "KiB", "MiB", "GiB", "TiB"), 1024)


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as they need be: names to the left, numbers to the right, a remark behind them."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append(f"  {first.ljust(widths[0])}  {'   '.join(cells)}".rstrip())
    return "\n".join(lines)
