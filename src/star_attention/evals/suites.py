"""The suites that generate samples: one module each, with `TASKS` and `generate`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from star_attention.errors import InvalidInputError
from star_attention.evals.record import Sample
from star_attention.evals.sizing import Size
from star_attention.evals.sources import check_part

SUITES = {
    "ruler": "star_attention.evals.ruler",
    "babilong": "star_attention.evals.babilong",
    "infinitebench": "star_attention.evals.infinitebench",
    "niah": "star_attention.evals.niah",
    "shared": "star_attention.evals.shared",
}
"""By name, imported on use."""
_PATHS = ("essays", "background", "squad", "hotpot", "prompts")


class Suite(Protocol):
    """TASKS: names of its tasks. OPTIONS: words that `generate` takes in `options`, each with what it means."""

    TASKS: tuple[str, ...]
    OPTIONS: Mapping[str, str]

    def generate(self, task: str, *, size: Size, count: int, seed: int, options: Mapping[str, Any]) -> Iterator[Sample]:
        """`count` samples, the same for the same arguments; sample n does not depend on `count`."""


def get(name: str) -> Suite:
    """Raises `InvalidInputError` for an unknown one."""
    if name not in SUITES:
        raise InvalidInputError(f"suite {name!r} is unknown; choose one of {', '.join(SUITES)}")
    suite: Any = importlib.import_module(SUITES[name])
    return suite  # type: ignore[no-any-return]


def check(suite: Suite, name: str, task: str, options: Mapping[str, Any]) -> None:
    """Raises `InvalidInputError` for a task or an option that a suite does not have, and for values that no task could use,
    though this one may not need them.
    """
    if task not in suite.TASKS:
        raise InvalidInputError(f"task {task!r} of {name} is unknown; choose from {', '.join(suite.TASKS)}")
    unknown = sorted(set(options) - set(suite.OPTIONS))
    if unknown:
        raise InvalidInputError(
            f"option {unknown[0]!r} of {name} is unknown; it takes {', '.join(suite.OPTIONS) or 'none'}"
        )
    for option in _PATHS:
        if options.get(option) is not None and not Path(options[option]).exists():
            raise InvalidInputError(f"{option} {str(options[option])!r} is not there; check the path")
    check_part(options.get("words"))
