"""What differs between attention methods, one short file each: how a context is cut and encoded. Registered in `config.METHODS`."""

from __future__ import annotations

import importlib
from typing import Protocol

from torch import Tensor

from star_attention.config import METHODS, StarConfig
from star_attention.distributed.comm import Comm
from star_attention.hf.execution.handle import ModelHandle
from star_attention.phase1 import Progress
from star_attention.planning.plan import BlockPlan
from star_attention.planning.segments import Segments
from star_attention.storage.kv import ContextKV, VisibleRange


class Method(Protocol):
    """How a method cuts a context into blocks, who keeps which tokens, how each rank encodes its own, and what queries see."""

    def plan(self, config: StarConfig, context_tokens: int, ranks: int) -> BlockPlan: ...

    def layout(self, config: StarConfig, plan: BlockPlan) -> tuple[Segments, ...]: ...

    def visible(self, plan: BlockPlan) -> VisibleRange | None: ...

    def encode(
        self,
        handle: ModelHandle,
        ids_BL: Tensor,
        plan: BlockPlan,
        comm: Comm,
        config: StarConfig,
        *,
        rope_length: int | None,
        progress: Progress | None,
    ) -> list[ContextKV]: ...


def get(name: str) -> Method:
    """The method of that name, imported on use."""
    module, _, attribute = METHODS[name].partition(":")
    method: Method = getattr(importlib.import_module(module), attribute)()
    return method
