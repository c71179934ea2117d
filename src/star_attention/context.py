"""What phase 1 leaves behind: `EncodedContext`, one object a user keeps, asks and saves."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from star_attention import saved
from star_attention.plan import BlockPlan
from star_attention.store import ContextKV


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedContext:
    """An encoded context: its tokens, its sizes and its keys and values.

    Answering leaves it as it was, so that any number of queries can share it.

    token_ids: the context's token ids, int64 `[tokens]` on CPU.
    plan: blocks and anchor as they were resolved for this context.
    kv: keys and values of every layer.
    method: the attention method's name.
    identity: what the context depends on (model, tokenizer, precision), by field.
    rope_length: tokens that length-dependent rotary frequencies were computed for, or None.
    chat: how a chat continues, or None for raw text.
    encode_s: seconds that phase 1 took; peak_bytes: its peak device memory, or None where it is not measured (CPU).
    model: the model that encoded it, while it lives.
    """

    token_ids: Tensor
    plan: BlockPlan
    kv: ContextKV
    method: str
    identity: dict[str, Any]
    rope_length: int | None = None
    chat: dict[str, Any] | None = None
    encode_s: float = 0.0
    peak_bytes: int | None = None
    model: weakref.ref[Any] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.plan.context_tokens

    def __repr__(self) -> str:
        sizes = f"{self.plan.context_tokens:,} tokens, {self.plan.num_blocks} x {self.plan.block_size:,}"
        return f"EncodedContext({self.method}, {sizes}, anchor {self.plan.anchor_size:,})"

    @property
    def nbytes(self) -> int:
        """Bytes of the context's keys and values."""
        return self.kv.nbytes

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the context to one file (safetensors), atomically.

        The file holds the text's token ids: guard it like the text.

        Raises `ContextSaveError` when it cannot be written (the disk is full, no permission); a file that stood there
        before is then untouched.
        """
        tensors, expands = {"token_ids": self.token_ids}, []
        for index, layer in enumerate(self.kv.layers):
            expands.append(layer.expands)
            if not layer.is_empty:
                tensors[f"layers.{index}.k"], tensors[f"layers.{index}.v"] = layer.pair()
        header = {
            "method": self.method,
            "context_tokens": self.plan.context_tokens,
            "block_size": self.plan.block_size,
            "anchor_size": self.plan.anchor_size,
            "rope_length": self.rope_length,
            "chat": self.chat,
            "encode_s": self.encode_s,
            "expands": expands,
            "identity": self.identity,
        }
        saved.write(path, header, tensors)
