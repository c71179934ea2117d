"""Encoding of checked inputs: batches, measurements, extension, and saved contexts."""

from __future__ import annotations

import math
import os
import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import torch

from star_attention import inputs, methods, phase1, phase1_versions
from star_attention.config import StarSettings
from star_attention.errors import OF_THE_ENGINE, InvalidInputError, quote, unknown_option
from star_attention.hf.execution import finite
from star_attention.hf.loading import identity
from star_attention.hf.progress import Progress, ProgressBar, shown
from star_attention.inputs import Content, Contents, ContextInput, TextOrIds
from star_attention.methods import Method
from star_attention.phase1 import EncodeJob, Steps
from star_attention.planning.lookback import described
from star_attention.planning.plan import BlockPlan
from star_attention.planning.segments import Segments
from star_attention.planning.traffic import Traffic
from star_attention.planning.windows import ALL
from star_attention.runtime import Runtime
from star_attention.storage.context import EncodedContext, RankStats
from star_attention.storage.header import lookback_in, plan_in
from star_attention.storage.host import pinned
from star_attention.storage.kv import ContextKV, KVFormat, LayerKV, StoredKV
from star_attention.storage.reading import SavedContext


class EncodeOptions(TypedDict, total=False):
    """Keywords of `StarLLM.encode`, for editors and type checkers."""

    progress: Progress | bool | None
    query: Content | Contents | None
    settings: dict[str, Any] | None
    tools: Sequence[Any] | None
    chat_template_kwargs: dict[str, Any] | None
    reuse: EncodedContext | None


def check_options(names: Iterable[str]) -> None:
    """Raise `UnknownOptionError` for the first keyword that `StarLLM.encode` does not take."""
    known = EncodeOptions.__annotations__
    for name in names:
        if name not in known:
            raise unknown_option(
                "encode()",
                name,
                known=known,
                instead=dict.fromkeys(StarSettings.__annotations__, OF_THE_ENGINE.format(name)),
                otherwise=f"it takes {', '.join(known)}",
            )


def encode(
    runtime: Runtime,
    contexts: list[ContextInput],
    progress: Progress | bool | None = None,
    *,
    method: Method | None = None,
) -> list[EncodedContext]:
    """Encode contexts without a pause; arguments as for `steps`. Collective."""
    return phase1.finish(steps(runtime, contexts, progress, method=method))


def steps(
    runtime: Runtime,
    contexts: list[ContextInput],
    progress: Progress | bool | None = None,
    *,
    method: Method | None = None,
    in_turns: bool = False,
) -> Steps[list[EncodedContext]]:
    """Encode contexts, those of equal length as one batch. Collective.

    Args:
        runtime: the engine's.
        contexts: checked inputs.
        progress: a callback, or whether to show a bar (`hf.progress.shown`).
        method: a method object to use in place of the configured one, with the same plan and
            layout.
        in_turns: as for `EncodeJob`.
    """
    runtime.handle.check_config()
    method = method or runtime.method
    plans = [runtime.plan_for(len(context.ids_L)) for context in contexts]
    encoded: dict[int, EncodedContext] = {}
    comm, tokens = runtime.comm, sum(plan.context_tokens for plan in plans)
    with shown(progress, tokens // comm.cp_size, leads=comm.rank == 0) as callback:
        lengths = [runtime.rope_length(len(context.ids_L), context.needed) for context in contexts]
        for indices in _batches(plans, lengths, runtime.tokens_per_forward):
            plan = plans[indices[0]]
            if isinstance(callback, ProgressBar):
                callback.contexts = len(indices)
            job = EncodeJob(
                handle=runtime.handle,
                comm=comm,
                config=runtime.config,
                ids_BL=torch.stack([contexts[i].ids_L for i in indices]),
                plan=plan,
                layout=method.layout(runtime.config, plan),
                rope_length=lengths[indices[0]],
                progress=callback,
                in_turns=in_turns,
            )
            warn_if_idle(job)
            with runtime.measured() as stats:
                stores = yield from method.encode(job)
            comm.raise_if_any_failed(finite.problem_in(runtime.handle, stores))
            for i, store in zip(indices, stores, strict=True):
                encoded[i] = _context(runtime, contexts[i], job, store, stats)
    return [encoded[i] for i in range(len(contexts))]


def _batches(
    plans: list[BlockPlan], rope_lengths: list[int | None], tokens_per_forward: int
) -> list[list[int]]:
    """Group contexts with equal plans, as many as whole blocks (or stripes) fit in one forward."""
    groups: dict[tuple[BlockPlan, int | None], list[int]] = {}
    for index, key in enumerate(zip(plans, rope_lengths, strict=True)):
        groups.setdefault(key, []).append(index)
    batches = []
    for (plan, _), indices in groups.items():
        stripes = plan.stripes
        together = min(plan.block_size, plan.context_tokens) if stripes is None else stripes.longest
        size = max(1, tokens_per_forward // together)
        batches += [indices[i : i + size] for i in range(0, len(indices), size)]
    return batches


def warn_if_idle(job: EncodeJob) -> None:
    """Warn of ranks that get no block."""
    idle = sum(not segments for segments in job.layout)
    if idle and job.comm.rank == 0:
        blocks = job.plan.num_blocks
        warnings.warn(
            f"{idle} of {job.plan.ranks} context-parallel ranks are idle: the context has"
            f" {blocks:,} {'block' if blocks == 1 else 'blocks'}; a smaller block_size gives each"
            " rank work",
            stacklevel=6,
        )


def _context(
    runtime: Runtime,
    source: ContextInput,
    job: EncodeJob,
    kv: ContextKV,
    stats: list[RankStats],
) -> EncodedContext:
    encode_s = slowest(stats)
    return EncodedContext(
        token_ids=source.ids_L,
        plan=job.plan,
        kv=kv,
        layout=job.layout,
        method=runtime.config.method,
        identity=runtime.identity_within(encode_s / 100),
        rope_length=job.rope_length,
        chat=source.chat,
        end=source.end,
        text=source.text,
        encode_s=encode_s,
        peak_bytes=stats[runtime.comm.cp_rank].peak_bytes,
        stats=tuple(stats),
        source=runtime.source,
        model=weakref.ref(runtime.handle.model),
        model_state=identity.state(runtime.handle.outer),
        comm=runtime.comm,
    )


def extend(
    runtime: Runtime,
    context: EncodedContext,
    more: TextOrIds,
    progress: Progress | bool | None = None,
) -> EncodedContext:
    """Return a new context that continues with `more`. Collective; rank 0's arguments count."""

    def prepare() -> tuple[int, ContextInput]:
        runtime.check_context(context)
        method = methods.get(context.method)
        refusal = method.why_not_extend(runtime.comm.cp_size)
        if refusal is not None:
            raise InvalidInputError(refusal)
        return context.key, inputs.extended(runtime, context, more)

    key, source = runtime.comm.run_on_rank_0(prepare)
    old = local_context(runtime, context, key)
    ids_L, start = source.ids_L, len(old.token_ids)
    if len(ids_L) == start:
        # All that is new waits for what follows.
        return replace(
            old, chat=source.chat, end=source.end, text=source.text, warned=set(), file=None
        )
    owner = next(rank for rank, runs in enumerate(old.layout) if runs and runs[-1][1] == start)
    job = EncodeJob(
        handle=runtime.handle,
        comm=runtime.comm,
        config=runtime.config,
        ids_BL=ids_L[None],
        plan=methods.get(old.method).extended_plan(old.plan, len(ids_L)),
        layout=extended_layout(old.layout, owner, len(ids_L)),
        rope_length=old.rope_length,
    )
    leads = runtime.comm.rank == 0
    with (
        shown(progress, len(ids_L) - start, leads=leads) as callback,
        runtime.measured() as stats,
    ):
        job = replace(job, progress=callback)
        store = phase1_versions.extend(job, old.kv, start=start, owner=owner)
    return version(
        runtime,
        old,
        source,
        job,
        store,
        encode_s=old.encode_s + slowest(stats),
        peak_bytes=stats[runtime.comm.cp_rank].peak_bytes,
        stats=tuple(before.then(more) for before, more in zip(old.stats, stats, strict=True)),
    )


def version(
    runtime: Runtime,
    old: EncodedContext,
    source: ContextInput,
    job: EncodeJob,
    kv: ContextKV,
    **measured: Any,
) -> EncodedContext:
    """Return a version of `old` with other tokens, after checking its keys. Collective.

    Args:
        runtime: the engine's.
        old: the context that it is a version of.
        source: what the version was made of.
        job: how it was encoded.
        kv: this rank's keys and values; those of `old` if this rank encoded nothing.
        measured: fields that hold measurements.
    """
    # A saved context of another rank need not be read for this.
    changed = [] if kv is old.kv else [kv]
    runtime.comm.raise_if_any_failed(finite.problem_in(runtime.handle, changed))
    return replace(
        old,
        token_ids=source.ids_L,
        plan=job.plan,
        kv=kv,
        layout=job.layout,
        rope_length=job.rope_length,
        chat=source.chat,
        end=source.end,
        text=source.text,
        warned=set(),
        file=None,
        **measured,
    )


def extended_layout(
    layout: tuple[Segments, ...], owner: int, context_tokens: int
) -> tuple[Segments, ...]:
    """Return a layout whose last block, on rank `owner`, ends with the context."""
    extended = [*layout]
    extended[owner] = layout[owner].grow_to(context_tokens)
    return tuple(extended)


def local_context(runtime: Runtime, context: Any, key: int) -> EncodedContext:
    """Return this rank's part of the context that rank 0 means by `key`."""
    if runtime.comm.size == 1:
        assert isinstance(context, EncodedContext)
        return context
    local: EncodedContext = runtime.comm.contexts.get(key)
    return local


def _checked_path(path: Any) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidInputError(
            f"cannot load a context from {quote(path)}: expected a str or Path, got"
            f" {type(path).__name__}"
        )
    return str(path)


def load(runtime: Runtime, path: str | os.PathLike[str]) -> EncodedContext:
    """Map a saved context into memory, after checking that it fits the model. Collective.

    Rank 0's path counts. Tensors are verified when first read (`storage/reading.py`).
    """
    comm = runtime.comm
    path = comm.run_on_rank_0(lambda: _checked_path(path))
    file = SavedContext(path)
    header = file.header
    own = runtime.identity_within(math.inf)
    config = runtime.config
    identity.check(
        str(path),
        header["identity"]
        | {"method": header["method"], "lookback": described(**lookback_in(header))},
        own
        | {
            "method": config.method,
            "lookback": described(config.lookback, config.lookback_layers),
        },
    )
    plan = plan_in(header, comm.cp_size)
    layout = runtime.method.layout(runtime.config, plan)
    segments = layout[comm.cp_rank]
    config = runtime.config
    kv_format = KVFormat(
        dtype=header.get("kv_dtype"),
        device=config.kv_device,
        resident=config.kv_resident,
        # Files of earlier versions hold everything.
        windows=header.get("kv_windows", ALL),
    )
    kept = runtime.method.kept(plan, segments, runtime.handle.windows, kv_format.windows)
    layers = [_saved_layer(runtime, file, index, own, kv_format) for index, own in enumerate(kept)]
    ids_L = file.token_ids()
    # Wait here, so that a rank that cannot find its part fails on all ranks.
    comm.gather(None)
    stats = [
        RankStats(busy_s=None, peak_bytes=None, wire=Traffic(), wire_within=Traffic())
        for _ in range(comm.cp_size)
    ]
    return EncodedContext(
        token_ids=ids_L,
        plan=plan,
        kv=ContextKV(layers, segments, runtime.method.visible_range(plan)),
        layout=layout,
        method=runtime.config.method,
        identity=own,
        rope_length=header["rope_length"],
        chat=header["chat"],
        # Files of earlier versions have none.
        end=header.get("end"),
        text=file.text(),
        encode_s=header["encode_s"],
        reused_tokens=header.get("reused_tokens", 0),
        stats=tuple(stats),
        source=runtime.source or header.get("source"),
        # A file of a conversation may be replaced by a later state of it.
        file=None if "conversation" in header else os.path.abspath(path),
        model=weakref.ref(runtime.handle.model),
        model_state=identity.state(runtime.handle.outer),
        comm=comm,
    )


def _saved_layer(
    runtime: Runtime, file: SavedContext, index: int, segments: Segments, kv_format: KVFormat
) -> LayerKV:
    """Return a layer that is read, verified and moved to its device at first use."""
    expands = file.header["expands"]
    if not segments or not file.has_layer(index):
        return LayerKV(segments, expands=expands[index], kv_format=kv_format)
    device = runtime.handle.layer_device(index)
    on_host = kv_format.on_host(index, len(expands))
    tp_rank, tp_size = runtime.comm.tp_rank, runtime.comm.tp_size

    def source() -> StoredKV:
        tensors = (part.chunk(tp_size, 1)[tp_rank] for part in file.layer(index, segments))
        if on_host:
            return tuple(pinned.copy_of(tensor, device) for tensor in tensors)
        return tuple(tensor.to(device) for tensor in tensors)

    return LayerKV(
        segments,
        expands=expands[index],
        kv_format=kv_format,
        on_host=on_host,
        source=source,
        dtype=runtime.handle.dtype,
        device=device,
    )


def slowest(stats: list[RankStats]) -> float:
    """Return the seconds of the slowest rank."""
    return max(rank.busy_s or 0.0 for rank in stats)
