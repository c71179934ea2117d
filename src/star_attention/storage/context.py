"""What phase 1 leaves behind: `EncodedContext`, one object a user keeps, asks and saves."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from star_attention.distributed.comm import Comm, SoloComm
from star_attention.planning.plan import BlockPlan
from star_attention.planning.segments import Segments
from star_attention.planning.traffic import Traffic
from star_attention.storage import saved
from star_attention.storage.kv import NAMES, ContextKV


@dataclass(frozen=True, kw_only=True)
class RankStats:
    """What one host (a rank, or those that share its heads) spent on phase 1.

    busy_s: seconds until it was done with its own share, None for a saved context. peak_bytes: peak device memory, None where
    it is not measured (CPU). wire: what the hosts exchanged, all together; wire_within: what the ranks of this one did.
    """

    busy_s: float | None
    peak_bytes: int | None
    wire: Traffic
    wire_within: Traffic


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedContext:
    """An encoded context: its tokens, its sizes and its keys and values.

    Answering leaves it as it was, so that any number of queries can share it.

    token_ids: the context's token ids, int64 `[tokens]` on CPU.
    plan: blocks and anchor as they were resolved for this context.
    kv: keys and values of every layer: on several ranks those of this rank's share.
    layout: which tokens each host keeps.
    method: the attention method's name.
    identity: what the context depends on (model, tokenizer, precision), by field.
    rope_length: tokens that length-dependent rotary frequencies were computed for, or None.
    chat: how a chat continues, or None for raw text.
    encode_s: seconds that phase 1 took, on the slowest host; peak_bytes: its peak device memory on this one, or None where it is
        not measured (CPU).
    stats: the same of every host, with what they exchanged.
    model: the model that encoded it, while it lives; model_state: how its weights and adapters were then.
    """

    token_ids: Tensor
    plan: BlockPlan
    kv: ContextKV
    layout: tuple[Segments, ...]
    method: str
    identity: dict[str, Any]
    rope_length: int | None = None
    chat: dict[str, Any] | None = None
    encode_s: float = 0.0
    peak_bytes: int | None = None
    stats: tuple[RankStats, ...] = ()
    model: weakref.ref[Any] | None = field(default=None, repr=False)
    model_state: tuple[Any, ...] = field(default=(), repr=False)
    comm: Comm = field(default_factory=SoloComm, repr=False)
    key: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.comm.register(self))

    def __len__(self) -> int:
        return self.plan.context_tokens

    def __repr__(self) -> str:
        sizes = f"{self.plan.context_tokens:,} tokens, {self.plan.num_blocks} x {self.plan.block_size:,}"
        if self.method == "streaming_llm":
            sizes = f"{self.plan.context_tokens:,} tokens, window {self.plan.block_size:,}"
            return f"EncodedContext({self.method}, {sizes}, {self.plan.anchor_size:,} sinks)"
        return f"EncodedContext({self.method}, {sizes}, anchor {self.plan.anchor_size:,})"

    @property
    def nbytes(self) -> int:
        """Bytes of the context's keys and values, on this rank."""
        return self.kv.nbytes

    @property
    def wire(self) -> Traffic:
        """What the hosts exchanged in phase 1, all together."""
        return self.stats[0].wire if self.stats else Traffic()

    @property
    def wire_within(self) -> Traffic:
        """What ranks of one host exchanged in phase 1, of all hosts together (tensor parallelism)."""
        total = Traffic()
        for host in self.stats:
            total.add(host.wire_within.bytes, host.wire_within.calls)
        return total

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the context, atomically: to one file (safetensors); on several ranks to a folder, each rank its own share.

        What is written holds the text's token ids: guard it like the text. Any number of ranks can load it. On several
        machines the folder must be on a file system that all of them see.

        Raises `ContextSaveError` when it cannot be written (the disk is full, no permission); what stood there
        before is then untouched.
        """
        header = {
            "method": self.method,
            "context_tokens": self.plan.context_tokens,
            "block_size": self.plan.block_size,
            "anchor_size": self.plan.anchor_size,
            "rope_length": self.rope_length,
            "chat": self.chat,
            "encode_s": self.encode_s,
            "kv_dtype": self.kv.kv_format.dtype,
            "expands": [layer.expands for layer in self.kv.layers],
            "identity": self.identity,
        }
        if self.comm.size == 1:
            saved.write(path, header | {"segments": self.kv.segments}, self._tensors())
            return
        with self.comm.collective("save"):
            place: str = self.comm.run_on_rank_0(lambda: str(saved.as_path(path)))
            saved.write_shared(place, header, self.kv.segments, self._tensors(), self.comm)

    def _tensors(self) -> dict[str, Tensor]:
        """What this rank writes: of a host's ranks the first one writes the heads of all."""
        tensors = {"token_ids": self.token_ids} if self.comm.rank == 0 else {}
        for index, layer in enumerate(self.kv.layers):
            if layer.is_empty:
                continue
            for name, part in zip(NAMES, layer.stored(), strict=False):
                shares = self.comm.tp_gather(part)
                if self.comm.tp_rank == 0:
                    whole = (
                        part
                        if len(shares) == 1
                        else torch.cat([share.cpu() for share in shares], 1)
                    )
                    tensors[f"layers.{index}.{name}"] = whole
        return tensors
