"""Whose turn it is, where several tenants wait for the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping


class Turns:
    """Remembers in which order tenants were served. All of it is for one thread."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._served: dict[str, int] = {}

    def first(self, tenants: Iterable[str], held: Mapping[str, int] | None = None) -> str:
        """Return the tenant to serve: who holds least, or else was served the longest ago.

        Args:
            tenants: those that wait, the one that came first before others.
            held: what each holds of what they wait for; None for nothing.
        """
        held = held or {}
        return min(tenants, key=lambda tenant: (held.get(tenant, 0), self._served.get(tenant, 0)))

    def note(self, tenant: str) -> None:
        """Note that a tenant was served."""
        self._served[tenant] = next(self._numbers)
