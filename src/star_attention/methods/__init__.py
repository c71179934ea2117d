"""What differs between attention methods, one short file each: how a context is cut. Registered in `config.METHODS`."""

from __future__ import annotations

import importlib
from typing import Protocol

from star_attention.config import METHODS, StarConfig
from star_attention.plan import BlockPlan


class Method(Protocol):
    """How a method cuts a context of `context_tokens` into blocks."""

    def plan(self, config: StarConfig, context_tokens: int) -> BlockPlan: ...


def get(name: str) -> Method:
    """The method of that name, imported on use."""
    module, _, attribute = METHODS[name].partition(":")
    method: Method = getattr(importlib.import_module(module), attribute)()
    return method
