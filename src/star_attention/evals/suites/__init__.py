"""The suites: tasks whose samples are generated. Importing this package does not import torch.

Each suite is a package whose `__init__` declares it (`SUITE`) and whose `generate` module generates
its samples.
"""

from __future__ import annotations

import importlib

from star_attention.errors import InvalidInputError, quote
from star_attention.evals.suites.suite import Suite

SUITES = {
    "ruler": "star_attention.evals.suites.ruler",
    "babilong": "star_attention.evals.suites.babilong",
    "infinitebench": "star_attention.evals.suites.infinitebench",
    "niah": "star_attention.evals.suites.niah",
    "shared": "star_attention.evals.suites.shared",
}
"""Modules by name; each has a `SUITE`."""


def get(name: str) -> Suite:
    """Return the suite of this name.

    Raises:
        InvalidInputError: There is no such suite.
    """
    if name not in SUITES:
        raise InvalidInputError(
            f"suite {quote(name)} is unknown; choose one of {', '.join(SUITES)}"
        )
    suite: Suite = importlib.import_module(SUITES[name]).SUITE
    return suite
