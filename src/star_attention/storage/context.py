"""`EncodedContext`: the result of phase 1, which users keep, query and save."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from star_attention.distributed import Comm, SoloComm
from star_attention.errors import InvalidInputError
from star_attention.planning import html
from star_attention.planning.lookback import described
from star_attention.planning.plan import BlockPlan
from star_attention.planning.segments import Segments
from star_attention.planning.traffic import Traffic
from star_attention.storage import writing
from star_attention.storage.header import WINDOWS_VERSION
from star_attention.storage.kv import NAMES, ContextKV
from star_attention.storage.transient import Transient


@dataclass(frozen=True, kw_only=True)
class RankStats:
    """Time, memory and traffic of phase 1 on one context-parallel rank.

    With tensor parallelism one entry covers all ranks that share a context shard.

    Attributes:
        busy_s: seconds until its shard was encoded; None for a saved context.
        peak_bytes: peak device memory; None if it is not measured (CPU).
        wire: traffic between context-parallel ranks, summed over all of them.
        wire_within: traffic of tensor parallelism, among the ranks of this entry.
    """

    busy_s: float | None
    peak_bytes: int | None
    wire: Traffic
    wire_within: Traffic

    def then(self, more: RankStats) -> RankStats:
        """Return the statistics of this work and the work that followed."""
        peaks = [peak for peak in (self.peak_bytes, more.peak_bytes) if peak is not None]
        is_known = self.busy_s is not None and more.busy_s is not None
        return RankStats(
            busy_s=(self.busy_s or 0.0) + (more.busy_s or 0.0) if is_known else None,
            peak_bytes=max(peaks, default=None),
            wire=self.wire.plus(more.wire),
            wire_within=self.wire_within.plus(more.wire_within),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedContext(Transient):
    """A context after phase 1: its token ids, its block plan, and its keys and values.

    Made by `StarLLM.encode`, `extend`, `edit` and `load_context`. Generating from a context
    never changes it, so that any number of queries can share one. `len(context)` is its number of
    tokens. It stays in its process: `save` takes it elsewhere, pickle and `copy.deepcopy` are
    refused.

    Attributes:
        token_ids: the context's token ids, int64 `[tokens]` on the CPU.
        plan: the blocks and the anchor, with sizes resolved for this context.
        kv: keys and values of every layer; on several ranks, the shard of this rank.
        layout: the tokens that each context-parallel rank holds.
        method: name of the attention method.
        identity: everything that the KV depends on (model, tokenizer, precision), by field.
        rope_length: length in tokens that length-dependent rotary frequencies are computed for;
            None if they do not depend on it.
        chat: how a chat continues after the context; None for raw text and token ids.
        end: the end of the text, with what is held back of it for the queries (see
            `hf/text/joining.py`); None for token ids.
        text: the whole text, with what is held back; None for chat messages and token ids, and
            where token ids were added.
        warned: what has been warned of.
        encode_s: seconds that phase 1 took on the slowest rank; of an extended context, those of
            its beginning too, and of an edited one those of what was encoded again.
        peak_bytes: peak device memory of phase 1 on this rank; None if it is not measured (CPU).
        reused_tokens: tokens whose keys and values were copied from the context that this one is a
            new version of.
        stats: the statistics of every context-parallel rank.
        source: how the model was named to `StarLLM.from_pretrained`, for `star-attention ask`; None
            if it was loaded elsewhere.
        model: weak reference to the model that encoded the context.
        model_state: fingerprint of that model's weights and adapters at the time.
        comm: the communicator of the ranks that hold the context.
        file: the saved file or folder that it was loaded from; None for others.
        key: identifies the context to the other ranks.
    """

    token_ids: Tensor
    plan: BlockPlan
    kv: ContextKV
    layout: tuple[Segments, ...]
    method: str
    identity: dict[str, Any]
    rope_length: int | None = None
    chat: dict[str, Any] | None = None
    end: dict[str, Any] | None = field(default=None, repr=False)
    text: str | None = field(default=None, repr=False)
    warned: set[str] = field(default_factory=set, repr=False)
    encode_s: float = 0.0
    peak_bytes: int | None = None
    reused_tokens: int = 0
    stats: tuple[RankStats, ...] = ()
    source: dict[str, Any] | None = field(default=None, repr=False)
    model: weakref.ref[Any] | None = field(default=None, repr=False)
    model_state: tuple[Any, ...] = field(default=(), repr=False)
    comm: Comm = field(default_factory=SoloComm, repr=False)
    file: str | None = field(default=None, repr=False)
    key: int = field(init=False, repr=False)

    _instead_of_pickling = (
        "write it with context.save(path), and read it there with star.load_context(path)"
    )
    _instead_of_deepcopy = "share it, since nothing changes it, or write it with context.save(path)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.comm.contexts.add(self))

    def __len__(self) -> int:
        return self.plan.context_tokens

    def __repr__(self) -> str:
        plan, visible = self.plan, self.kv.visible
        if visible is None and plan.is_dense:
            sizes = "1 block: dense"
        elif visible is None:
            sizes = f"{plan.num_blocks} x {plan.block_size:,}, anchor {plan.anchor_size:,}"
            if plan.lookback:
                sizes += f", look-back {described(plan.lookback, plan.lookback_layers)}"
        else:
            sizes = f"window {visible.recent:,}, {visible.first:,} sinks"
        return f"EncodedContext({self.method}, {len(self):,} tokens, {sizes})"

    def _repr_html_(self) -> str:
        """Return sizes and plan for a notebook; never the text."""
        rows = {
            "method": self.method,
            "tokens": f"{len(self):,}",
            "keys and values": f"{self.nbytes / 2**20:,.1f} MiB on rank {self.comm.rank}",
            "precision": self.kv.kv_format.dtype or self.identity.get("dtype", "the model's"),
            "encoded in": f"{self.encode_s:.2f} s",
            "continues": "a chat" if self.chat is not None else "raw text",
        }
        plan = html.preformatted(str(self.plan)) if self.kv.visible is None else ""
        return html.table("EncodedContext", rows, plan)

    @property
    def nbytes(self) -> int:
        """Bytes of the context's keys and values on this rank."""
        return self.kv.nbytes

    @property
    def reused_blocks(self) -> int:
        """Number of blocks that were copied from the context that this one is a new version of."""
        return -(-self.reused_tokens // self.plan.block_size)

    @property
    def wire(self) -> Traffic:
        """Traffic of phase 1 between context-parallel ranks, summed over all of them."""
        return self.stats[0].wire if self.stats else Traffic()

    @property
    def wire_within(self) -> Traffic:
        """Traffic of phase 1 from tensor parallelism, summed over all ranks."""
        total = Traffic()
        for stats in self.stats:
            total.add(stats.wire_within.bytes, stats.wire_within.calls)
        return total

    def as_dict(self) -> dict[str, Any]:
        """Return sizes and statistics as JSON values: the context's part of `--json`."""
        return {
            "method": self.method,
            "context_tokens": self.plan.context_tokens,
            "block_size": self.plan.block_size,
            "anchor_size": self.plan.anchor_size,
            "lookback": self.plan.lookback,
            "lookback_layers": self.plan.lookback_layers,
            "blocks": self.plan.num_blocks,
            "ranks": self.plan.ranks,
            "tensor_parallel": self.comm.tp_size,
            "reused_tokens": self.reused_tokens,
            "encode_s": self.encode_s,
            "wire_bytes_phase1": self.wire.bytes,
            "wire_calls_phase1": self.wire.calls,
            "wire_within_bytes_phase1": self.wire_within.bytes,
            "per_rank": [
                {
                    "tokens": segments.tokens,
                    "encode_s": stats.busy_s,
                    "peak_bytes": stats.peak_bytes,
                }
                for segments, stats in zip(self.layout, self.stats, strict=True)
            ],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the context atomically, to be loaded by `StarLLM.load_context` on any number of
        ranks.

        One process writes a file (safetensors); several ranks write a folder with one file each, on
        a file system that all machines share. The files contain the text and its token ids: protect
        them like the text.

        Args:
            path: the file, or on several ranks the folder. An earlier saved context there is
                replaced.

        Raises:
            ContextSaveError: the context cannot be written (disk full, no permission, something
                else is at the path). A context saved there before is left unchanged.
        """
        save_context(self, path)

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors that this rank writes: tensor-parallel rank 0 writes all heads."""
        tensors = {"token_ids": self.token_ids} if self.comm.rank == 0 else {}
        if self.comm.rank == 0 and self.text is not None:
            data = bytearray(self.text.encode())
            tensors["text"] = torch.frombuffer(data, dtype=torch.uint8)
        for index, layer in enumerate(self.kv.layers):
            if layer.is_empty:
                continue
            for name, tensor in zip(NAMES, layer.stored(), strict=False):
                shards = self.comm.tp_gather(tensor)
                if self.comm.tp_rank == 0:
                    tensors[f"layers.{index}.{name}"] = (
                        tensor
                        if len(shards) == 1
                        else torch.cat([shard.cpu() for shard in shards], 1)
                    )
        return tensors


def read_layer(context: EncodedContext, layer: int) -> None:
    """Read and verify a layer of a saved context, which is otherwise done at first use. Collective.

    Args:
        context: the context.
        layer: number of the layer.

    Raises:
        CorruptContextError: a rank's part of it is damaged.
    """
    comm, kv, failure = context.comm, context.kv.layers[layer], None
    with comm.collective("read", about=(context.key, layer)):
        try:
            if not kv.is_empty:
                kv.stored()
        except Exception as error:
            # Whatever it is, all ranks raise it.
            failure = error
        comm.raise_if_any_failed(failure)


def header_of(context: EncodedContext) -> dict[str, Any]:
    """Return what the header of a saved file says of the context, as JSON values."""
    header = {
        "method": context.method,
        "context_tokens": context.plan.context_tokens,
        "block_size": context.plan.block_size,
        "anchor_size": context.plan.anchor_size,
        "lookback": context.plan.lookback,
        "lookback_layers": context.plan.lookback_layers,
        "rope_length": context.rope_length,
        "chat": context.chat,
        "end": context.end,
        "encode_s": context.encode_s,
        "reused_tokens": context.reused_tokens,
        "kv_dtype": context.kv.kv_format.dtype,
        "kv_windows": context.kv.kv_format.windows,
        "expands": [layer.expands for layer in context.kv.layers],
        "identity": context.identity,
    }
    return header if context.source is None else header | {"source": context.source}


def place_of(kv: ContextKV) -> dict[str, Any]:
    """Return what a file's header says of the tokens in it, as JSON values.

    Files of which layers keep different tokens are of a later version.
    """
    kept = {
        str(index): layer.segments
        for index, layer in enumerate(kv.layers)
        if layer.segments != kv.segments
    }
    place: dict[str, Any] = {"segments": kv.segments}
    return place | {"kept": kept, "format_version": WINDOWS_VERSION} if kept else place


def save_context(
    context: EncodedContext,
    path: str | os.PathLike[str],
    conversation: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Save a context, with a conversation about it; see `EncodedContext.save`.

    Args:
        context: the context.
        path: the file, or on several ranks the folder.
        conversation: a conversation about it as JSON values, or None.
        tensors: those of the conversation; on one process.
        check: raises an error for a path that is not to be replaced; called on rank 0.
    """

    def target() -> Path:
        target = writing.as_path(path)
        if check is not None:
            check(target)
        return target

    header = header_of(context)
    if conversation is not None:
        header["conversation"] = conversation
    comm, place = context.comm, place_of(context.kv)
    if comm.size == 1:
        all_tensors = context._tensors() | (tensors or {})
        writing.write(target(), header | place, all_tensors)
        return
    with comm.collective("save", about=context.key):
        folder: str = comm.run_on_rank_0(lambda: str(target()))
        writing.write_shared(folder, header, place, context._tensors(), comm)


def check_place(context: Any, comm: Comm) -> None:
    """Check that something is a context, on the ranks that are to use it.

    Raises:
        InvalidInputError: it is not.
    """
    if not isinstance(context, EncodedContext):
        raise InvalidInputError(
            f"context: expected an EncodedContext, got {type(context).__name__}; call encode first"
        )
    other, own = ((c.cp_size, c.tp_size) for c in (context.comm, comm))
    if other != own:
        raise InvalidInputError(
            f"the context lies on a mesh of {other[0]} x {other[1]} ranks (context x tensor"
            f" parallel), this engine runs on {own[0]} x {own[1]}; save it and load it with"
            " this engine"
        )
