"""Processes that share a context: their mesh, messages, collectives and failures.

Importing this package does not import torch; names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from star_attention.distributed.comm import Comm as Comm
    from star_attention.distributed.environment import from_environment as from_environment
    from star_attention.distributed.solo import SoloComm as SoloComm
    from star_attention.distributed.torch_comm import TorchComm as TorchComm

_HOME = {
    "Comm": "comm",
    "SoloComm": "solo",
    "TorchComm": "torch_comm",
    "from_environment": "environment",
}

__all__ = ["Comm", "SoloComm", "TorchComm", "from_environment"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
