"""Progress of encoding in Python: a bar where somebody watches, callbacks, and silence."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tqdm.std import tqdm
from transformers.utils import logging

from star_attention import BlockPlan, StarLLM
from star_attention.hf import progress as progress_module
from star_attention.planning.plan import Span
from tests.engines import engine, ids

CONTEXT = 100


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def star() -> StarLLM:
    # Two forwards for a context.
    return engine("llama", block_size=20, tokens_per_forward=60)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Show bars at once, and every move of them."""
    # Commands that ran in this process before have switched them off.
    was_enabled = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    monkeypatch.setattr(progress_module, "SHOWN_AFTER_S", 0.0)
    monkeypatch.setattr(progress_module, "_tqdm", lambda: partial(tqdm, mininterval=0))
    yield
    if not was_enabled:
        logging.disable_progress_bar()


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, call: Any) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        call()
    return stream.getvalue()


@pytest.mark.usefixtures("at_once")
def test_a_bar_on_terminals(star: StarLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It moves within a forward, and estimates the time that is left."""
    text = shown(monkeypatch, Terminal(), lambda: star.encode(ids(CONTEXT)))
    counts = [float(count) for count in re.findall(r" ([\d.]+)/100 ", text)]
    assert counts == sorted(counts)
    assert counts[-1] == CONTEXT
    assert len(set(counts) - {0, 60, CONTEXT}) >= 2, "moves within forwards"
    assert re.search(r"encoding: +\d+%.*\[\d\d:\d\d<\d\d:\d\d", text), "time left"
    assert text.rstrip("\r").endswith(" "), "cleared at the end"


@pytest.mark.usefixtures("at_once")
def test_no_bar_where_nobody_watches(star: StarLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, io.StringIO(), lambda: star.encode(ids(CONTEXT))) == ""
    call = lambda: star.encode(ids(CONTEXT), progress=False)  # noqa: E731
    assert shown(monkeypatch, Terminal(), call) == ""
    call = lambda: star.encode(ids(CONTEXT), progress=True)  # noqa: E731
    assert "encoding" in shown(monkeypatch, io.StringIO(), call)
    logging.disable_progress_bar()
    try:
        assert shown(monkeypatch, Terminal(), lambda: star.encode(ids(CONTEXT))) == ""
    finally:
        logging.enable_progress_bar()
    monkeypatch.setattr(sys, "stderr", None)
    star.encode(ids(CONTEXT))


@pytest.mark.usefixtures("at_once")
def test_a_bar_in_notebooks(star: StarLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel: Any = ModuleType("IPython")
    kernel.get_ipython = type("ZMQInteractiveShell", (), {})
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    call = lambda: star.encode(ids(CONTEXT))  # noqa: E731
    assert "encoding" in shown(monkeypatch, io.StringIO(), call)
    kernel.get_ipython = lambda: SimpleNamespace()
    assert shown(monkeypatch, io.StringIO(), call) == ""


def test_short_contexts_show_none(star: StarLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tok" not in shown(monkeypatch, Terminal(), lambda: star.encode(ids(CONTEXT)))


@pytest.mark.usefixtures("at_once")
def test_a_bar_for_batches_and_extensions(star: StarLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    call = lambda: star.encode([ids(20), ids(20, 2), ids(30)], progress=True)  # noqa: E731
    assert " 70.0/70.0 " in shown(monkeypatch, Terminal(), call)
    context = star.encode(ids(50))
    call = lambda: star.extend(context, ids(40, 2), progress=True)  # noqa: E731
    assert " 40.0/40.0 " in shown(monkeypatch, Terminal(), call)


def test_callbacks_get_span_and_plan(star: StarLLM) -> None:
    calls: list[tuple[int, int, int]] = []

    def report(span: Span, plan: BlockPlan) -> None:
        calls.append((span.start, span.stop, plan.context_tokens))

    star.encode(ids(CONTEXT), progress=report)
    assert calls == [(0, 60, CONTEXT), (60, 100, CONTEXT)]


def test_callbacks_may_follow_the_layers(star: StarLLM) -> None:
    calls: list[tuple[int, int, int]] = []

    class Report:
        def __call__(self, span: Span, plan: BlockPlan) -> None:
            calls.append((span.stop, 0, 0))

        def layer(self, span: Span, plan: BlockPlan, layers: int, num_layers: int) -> None:
            calls.append((span.stop, layers, num_layers))

    star.encode(ids(CONTEXT), progress=Report())
    layers = len(star.runtime.handle.windows)
    forwards = [[(stop, i, layers) for i in range(1, layers + 1)] for stop in (60, 100)]
    assert calls == [*forwards[0], (60, 0, 0), *forwards[1], (100, 0, 0)]
