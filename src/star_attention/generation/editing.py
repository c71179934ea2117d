"""New versions of contexts, and edits: only blocks that changed are encoded again."""

from __future__ import annotations

from typing import Any

from star_attention import encoding, inputs, methods, phase1, phase1_versions
from star_attention.config import StarConfig
from star_attention.errors import InvalidInputError
from star_attention.hf.progress import Progress, shown
from star_attention.hf.text import editing
from star_attention.hf.text.conversation import ChatContext
from star_attention.inputs import ContextInput, TextOrIds
from star_attention.phase1 import EncodeJob, Steps
from star_attention.planning.edits import (
    blocks_again,
    blocks_with_windows,
    lacks_windows,
    rounds,
)
from star_attention.planning.plan import BlockPlan
from star_attention.planning.windows import dropping
from star_attention.runtime import Runtime
from star_attention.storage.context import EncodedContext


class EditCalls:
    """The method of `StarLLM` that edits contexts."""

    def edit(
        self: Any,
        context: EncodedContext,
        start: int,
        stop: int,
        text: TextOrIds,
        *,
        progress: Progress | bool | None = None,
    ) -> EncodedContext:
        """Return a new context with a part of the text replaced; the old one stays as it is.

        Equals encoding the new text with the context's own sizes, up to rounding. Only blocks that
        change pass through the model: the replaced tokens' own, all those after it if the number
        of tokens changes, those that look back to them, and all if the anchor changes. The others
        are copied: `reused_tokens` of the result counts them.

        Args:
            context: the context to edit, of text, chat messages or token ids. Of chat messages,
                the text of the last one is edited.
            start: first character to replace; of a context of token ids, the first token.
            stop: one after the last character (or token). Equal to `start`, `text` is inserted.
            text: what comes in their place; "" deletes. For a context of token ids, token ids.
            progress: as for `encode`.

        Raises:
            InvalidInputError: a place outside of the text, a context without a text to edit, or
                one of a method whose blocks cannot be reused.
            TokenError: nothing is left.
            ContextLengthError: beyond the model's positions.
        """
        runtime = self.runtime

        def prepare() -> Any:
            key = reused_key(runtime, context)
            return key, edited_input(runtime, context, start, stop, text)

        with runtime.collective("edit"):
            key, source = runtime.comm.run_on_rank_0(prepare)
            old = encoding.local_context(runtime, context, key)
            (edited,) = encode_again(runtime, [source], old, progress)
        return edited


def reused_key(runtime: Runtime, context: Any) -> int | None:
    """Return the key of a context whose blocks are to be reused; None for no context.

    Raises:
        InvalidInputError: it is not a context, or of a method whose blocks cannot be reused.
        ContextMismatchError: another model encoded it.
    """
    if context is None:
        return None
    runtime.check_context(context)
    refusal = methods.get(context.method).why_not_reuse()
    if refusal is not None:
        raise InvalidInputError(refusal)
    key: int = context.key
    return key


def edited_input(
    runtime: Runtime, context: EncodedContext, start: int, stop: int, new: TextOrIds
) -> ContextInput:
    """Return what a context was made of, with a part of it replaced; see `hf/text/editing.py`."""
    content: Any
    kwargs = None
    if context.chat is not None:
        chat = ChatContext.from_dict(context.chat)
        content, kwargs = editing.edited_messages(chat, start, stop, new), chat.template_kwargs
    elif context.text is not None:
        content = editing.edited_text(context.text, start, stop, new)
    else:
        vocab_size = runtime.handle.vocab_size
        content = editing.edited_ids(context.token_ids, start, stop, new, vocab_size)
    _, (source,) = inputs.prepare_contexts(runtime, content, template_kwargs=kwargs)
    return source


def encode_again(
    runtime: Runtime,
    contexts: list[ContextInput],
    old: EncodedContext,
    progress: Progress | bool | None = None,
) -> list[EncodedContext]:
    """Encode new versions of a context without a pause; as `steps`. Collective."""
    return phase1.finish(steps(runtime, contexts, old, progress))


def steps(
    runtime: Runtime,
    contexts: list[ContextInput],
    old: EncodedContext,
    progress: Progress | bool | None = None,
) -> Steps[list[EncodedContext]]:
    """Encode new versions of a context, copying the blocks that are the same. Collective.

    Sizes, method and KV format are those of `old`.
    """
    runtime.handle.check_config()
    comm = runtime.comm
    blocks = comm.run_on_rank_0(lambda: [_blocks_again(runtime, old, each) for each in contexts])
    tokens = sum(map(len, blocks)) * old.plan.block_size
    with shown(progress, tokens // comm.cp_size, leads=comm.rank == 0) as callback:
        versions = []
        for source, again in zip(contexts, blocks, strict=True):
            versions.append((yield from _version(runtime, old, source, again, callback)))
        return versions


def _blocks_again(runtime: Runtime, old: EncodedContext, source: ContextInput) -> list[int]:
    """Return the blocks to encode again. On rank 0, which holds keys of every layer with any."""
    plan = methods.get(old.method).extended_plan(old.plan, len(source.ids_L))
    rope_length = _rope_length(runtime, old, source)
    # Below this length nothing depends on it.
    unscaled = runtime.handle.unscaled_length or 0
    if max(old.rope_length or 0, unscaled) != max(rope_length or 0, unscaled):
        return list(range(plan.num_blocks))
    windows = runtime.handle.windows
    # What is empty here and keeps less than the shard may be elsewhere.
    layers = 1 + max(
        index
        for index, layer in enumerate(old.kv.layers)
        if not layer.is_empty or layer.segments != old.kv.segments
    )
    again = blocks_again(
        plan,
        old.token_ids.tolist(),
        source.ids_L.tolist(),
        plan.lookbacks(len(windows))[:layers],
        windows[:layers],
    )
    dropped = dropped_windows(windows, old, plan)
    return blocks_with_windows(plan, again, len(old), dropped)


def dropped_windows(
    windows: list[int | None], old: EncodedContext, plan: BlockPlan
) -> list[int | None]:
    """Return the windows of layers of which a context or its new version drops tokens, or None."""
    tokens = max(len(old), plan.context_tokens)
    return dropping(windows, tokens, old.kv.kv_format.windows)


def _rope_length(runtime: Runtime, old: EncodedContext, source: ContextInput) -> int | None:
    if source.needed is None and len(source.ids_L) == len(old):
        return old.rope_length
    return runtime.rope_length(len(source.ids_L), source.needed)


def _version(
    runtime: Runtime,
    old: EncodedContext,
    source: ContextInput,
    again: list[int],
    progress: Progress | None,
) -> Steps[EncodedContext]:
    """Encode a new version of a context, in which the blocks `again` differ."""
    method, kv_format, windows = methods.get(old.method), old.kv.kv_format, runtime.handle.windows
    config = StarConfig.of(
        runtime.config,
        kv_dtype=kv_format.dtype,
        kv_device=kv_format.device,
        kv_resident=kv_format.resident,
        kv_windows=kv_format.windows,
    )
    plan = method.extended_plan(old.plan, len(source.ids_L))
    is_new = len(again) == plan.num_blocks
    layout = method.layout(config, plan)
    if plan.num_blocks == old.plan.num_blocks and not is_new:
        # Every block stays where it is.
        owner = next(rank for rank, runs in enumerate(old.layout) if runs.holds(len(old) - 1))
        layout = encoding.extended_layout(old.layout, owner, len(source.ids_L))
    shares = rounds(plan, again, layout, old.layout)
    dropped = dropped_windows(windows, old, plan)
    if not is_new and lacks_windows(plan, shares, plan.lookbacks(len(windows)), dropped):
        is_new, layout = True, method.layout(config, plan)
        shares = rounds(plan, range(plan.num_blocks), layout, old.layout)
    job = EncodeJob(
        handle=runtime.handle,
        comm=runtime.comm,
        config=config,
        ids_BL=source.ids_L[None],
        plan=plan,
        layout=layout,
        rope_length=_rope_length(runtime, old, source),
        progress=progress,
    )
    encoding.warn_if_idle(job)
    encoded = sum(share.tokens for together in shares for share in together)
    with runtime.measured() as stats:
        if is_new:
            (store,) = yield from method.encode(job)
        elif not shares and layout == old.layout:
            store = old.kv
        else:
            store = yield from phase1_versions.encode_again(job, old.kv, shares)
    return encoding.version(
        runtime,
        old,
        source,
        job,
        store,
        encode_s=encoding.slowest(stats),
        peak_bytes=stats[runtime.comm.cp_rank].peak_bytes,
        reused_tokens=len(source.ids_L) - encoded,
        stats=tuple(stats),
    )
