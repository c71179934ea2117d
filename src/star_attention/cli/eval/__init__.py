"""`star-attention eval`: the accuracy of methods on the same samples, with reports."""

from __future__ import annotations

from collections.abc import Callable

from star_attention.cli.eval.perplexity import perplexity
from star_attention.cli.eval.run import report, run
from star_attention.cli.eval.suite_commands import suite_command
from star_attention.cli.eval.sweeps import ablations, sweep
from star_attention.evals import suites

COMMANDS: tuple[Callable[..., None], ...] = (
    run,
    # ruler, babilong, ...: options from evals/suites/NAME/__init__.py
    *(suite_command(suites.get(name)) for name in suites.SUITES),
    sweep,
    ablations,
    perplexity,
    report,
)
