"""Progress of phase 1: who is told, and the bar that shows it in Python."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from transformers.utils import logging

from star_attention.planning.plan import BlockPlan, Span

Progress = Callable[[Span, BlockPlan], None]
"""Called after each forward with the span that it encoded, and the plan of the context.

The span's `start` and `stop` count tokens of the context; those of the rank's own share on several
ranks. The plan has `context_tokens`, `num_blocks`, `block_size` and `anchor_size`. A callback with
a method `layer(span, plan, layers, num_layers)` is also called after each layer of a forward, of
which `layers` of `num_layers` are done: forwards of thousands of tokens take seconds on a CPU.
"""

SHOWN_AFTER_S = 1.0
"""Seconds after which the bar appears: short contexts show none."""


class ProgressBar:
    """A progress callback that moves a bar of tqdm, layer by layer.

    Args:
        bar: counts tokens.

    Attributes:
        contexts: contexts that the forwards encode together.
    """

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._done = 0
        self.contexts = 1

    def __call__(self, span: Span, plan: BlockPlan) -> None:
        self._done += span.tokens * self.contexts
        self._move_to(self._done)

    def layer(self, span: Span, plan: BlockPlan, layers: int, num_layers: int) -> None:
        """Show a part of a forward."""
        part = span.tokens * self.contexts * layers // (num_layers + 1)
        self._move_to(self._done + part)

    def _move_to(self, tokens: int) -> None:
        self._bar.update(max(0, min(tokens, self._bar.total) - self._bar.n))


@contextlib.contextmanager
def shown(progress: Progress | bool | None, tokens: int, *, leads: bool) -> Iterator[Any]:
    """Yield the callback for an encoding: the user's own, that of a bar, or None.

    Args:
        progress: a callback; True for a bar, False for none, None for a bar where somebody watches:
            on terminals and in notebooks, unless transformers' progress bars are switched off.
        tokens: tokens that will be encoded.
        leads: False on ranks that show nothing.
    """
    if progress is None:
        progress = logging.is_progress_bar_enabled() and _is_watched()
    if not isinstance(progress, bool):
        yield progress
    elif not (progress and leads):
        yield None
    else:
        with _tqdm()(
            total=tokens,
            desc="encoding",
            unit="tok",
            unit_scale=True,
            delay=SHOWN_AFTER_S,
            leave=False,
        ) as bar:
            yield ProgressBar(bar)


def _tqdm() -> Any:
    with warnings.catch_warnings():
        # Without ipywidgets the bar in notebooks is plain text, which it complains about.
        warnings.simplefilter("ignore")
        from tqdm.autonotebook import tqdm
    return tqdm


def _is_watched() -> bool:
    stderr = sys.stderr
    with contextlib.suppress(AttributeError, ValueError):
        # A stream that is closed, or of a program that has none.
        if stderr.isatty():
            return True
    shell = sys.modules.get("IPython")
    return shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"
