"""How pytest-xdist gives tests to processes: several of a file at a time, groups as a whole.

With units of one test, as `--dist loadgroup` has, xdist looks through all that have run whenever a
test ends: 13 s of a core for 9,000 tests. Tests of a file share what it makes once in a process.
"""

from __future__ import annotations

from collections import Counter

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadGroupScheduling

TOGETHER = 8


class InParts(LoadGroupScheduling):
    """Units of consecutive tests of a file, and groups."""

    def __init__(self, config: pytest.Config, log: Producer | None = None) -> None:
        super().__init__(config, log)
        self._units: dict[str, str] = {}
        self._tests: Counter[str] = Counter()

    def _split_scope(self, nodeid: str) -> str:
        if nodeid not in self._units:
            unit = super()._split_scope(nodeid)
            if unit == nodeid:
                file = nodeid.partition("::")[0]
                unit = f"{file} {self._tests[file] // TOGETHER}"
                self._tests[file] += 1
            self._units[nodeid] = unit
        return self._units[nodeid]
