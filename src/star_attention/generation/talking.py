"""Saved conversations become conversations of an engine."""

from __future__ import annotations

import os
from typing import Any

from star_attention import encoding
from star_attention.errors import InvalidInputError, quote
from star_attention.generation.conversation import Conversation, Keeper
from star_attention.generation.start import ask_with
from star_attention.generation.turns import Turn
from star_attention.hf.loading import identity
from star_attention.runtime import Runtime
from star_attention.storage import talks
from star_attention.storage.context import EncodedContext


class ConversationCalls:
    """The method of `StarLLM` that loads conversations."""

    def load_conversation(
        self: Any, path: str | os.PathLike[str], context: EncodedContext | None = None
    ) -> Conversation:
        """Load what `Conversation.save` saved, to go on with `star.generate(conversation, query)`.

        Its context is loaded, too, as `load_context` does: from the same file, or from the one that
        it was loaded from, at its old place or beside the conversation.

        Args:
            path: the file, or the folder of several ranks.
            context: the context that it is about, where it is at hand.

        Raises:
            ContextMismatchError: model, tokenizer, method or context differ; names the field.
            CorruptContextError: a file that is damaged, or no conversation.
            ContextNotFoundError: the file, or that of the context, does not exist.
        """
        runtime: Runtime = self.runtime
        with runtime.collective("load_conversation"):
            header, file, key = runtime.comm.run_on_rank_0(lambda: _read(runtime, path, context))
            if key is None:
                context = encoding.load(runtime, file)
            else:
                context = encoding.local_context(runtime, context, key)
            saved = header["conversation"]
            runtime.comm.run_on_rank_0(lambda: talks.check_context(str(path), saved, context))
            layers = None
            if runtime.comm.size == 1:
                handle = runtime.handle
                devices = [handle.layer_device(index) for index in range(len(handle.windows))]
                layers = talks.read_layers(path, devices)
        turns = tuple(Turn(**turn) for turn in saved["turns"])
        keeper = Keeper(context=context, ask=ask_with(runtime))
        return keeper.conversation(turns, saved["ids"], layers)


def _read(
    runtime: Runtime, path: Any, context: EncodedContext | None
) -> tuple[dict[str, Any], str, int | None]:
    """Return a conversation's header, the file of its context, and the key of one at hand."""
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidInputError(
            f"cannot load a conversation from {quote(path)}: expected a str or Path, got"
            f" {type(path).__name__}"
        )
    header, file = talks.read(path)
    if context is not None:
        runtime.check_context(context)
    identity.check(str(path), header["identity"], runtime.identity)
    if context is not None:
        return header, file, context.key
    return header, talks.found(path, file), None
