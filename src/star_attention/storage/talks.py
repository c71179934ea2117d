"""Saved conversations: beside the context in one file, or alone if the context has a file.

The header of the file has a field `conversation`: its turns, and of what context. A conversation
alone also names that context's file (`context_file`). The keys and values of its turns may be there
too; without them, they are computed again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from star_attention.errors import (
    ContextMismatchError,
    ContextNotFoundError,
    ContextSaveError,
    CorruptContextError,
    quote_path,
)
from star_attention.storage import writing
from star_attention.storage.context import EncodedContext, header_of, save_context
from star_attention.storage.header import CONVERSATION_VERSION, read_header
from star_attention.storage.kv import Pair
from star_attention.storage.reading import SavedFile, checksum


def write(
    path: str | os.PathLike[str],
    context: EncodedContext,
    conversation: dict[str, Any],
    layers: list[Pair | None] | None,
) -> None:
    """Save a conversation.

    Args:
        path: the file, or on several ranks the folder.
        context: its context; saved with it, unless it was loaded from a file.
        conversation: the conversation as JSON values.
        layers: keys and values of its turns; on one process, or None.

    Raises:
        ContextSaveError: it cannot be written.
    """
    conversation = conversation | {"context": facts_of(context)}
    tensors: dict[str, Tensor] = {}
    for index, pair in enumerate(layers or []):
        if pair is not None:
            tensors |= {f"turns.{index}.k": pair[0], f"turns.{index}.v": pair[1]}
    if context.file is None or context.comm.size > 1:
        save_context(
            context, path, conversation, tensors, lambda target: _check_target(target, context.file)
        )
        return
    target = writing.as_path(path)
    _check_target(target, context.file)
    # The text stays in its file.
    chat = context.chat and {"template_kwargs": context.chat["template_kwargs"]}
    header = header_of(context) | {
        "format_version": CONVERSATION_VERSION,
        "chat": chat,
        "end": None,
        "context_file": context.file,
        "conversation": conversation,
    }
    writing.write(target, header, tensors)


def _check_target(target: Path, context_file: str | None) -> None:
    """Refuse to replace a saved context, which may be that of this conversation."""
    if not os.path.exists(target):
        return
    own = context_file is not None and os.path.exists(context_file)
    if own and os.path.samefile(target, str(context_file)):
        what = "it is the file of its context"
    else:
        try:
            if "conversation" in read_header(target):
                return
        except (CorruptContextError, ContextNotFoundError):
            # What is no saved context is refused by the writer, in its words.
            return
        what = "it is a saved context, which would be lost"
    raise ContextSaveError(
        f"cannot save the conversation to {quote_path(target)}: {what}; choose another name"
    )


def facts_of(context: EncodedContext) -> dict[str, Any]:
    """Return what a context must share with that of a saved conversation."""
    plan = context.plan
    return {
        "tokens": plan.context_tokens,
        "method": context.method,
        "block_size": plan.block_size,
        "anchor_size": plan.anchor_size,
        "lookback": plan.lookback,
        "lookback_layers": plan.lookback_layers,
        "sha256": checksum(context.token_ids),
    }


def check_context(path: str, conversation: dict[str, Any], context: EncodedContext) -> None:
    """Raise `ContextMismatchError` for another context than the conversation was about."""
    saved = conversation["context"]
    for name, own in facts_of(context).items():
        if saved.get(name) != own:
            is_text = name == "sha256"
            values = "" if is_text else f": {saved.get(name)} in the file, {own} in the context"
            raise ContextMismatchError(
                name,
                f"the conversation in {quote_path(path)} does not fit the context: it differs in"
                f" {'the text' if is_text else name}{values}; give the context that it is about",
            )


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    """Return the header of a saved conversation, and the file of its context.

    Raises:
        CorruptContextError: it is damaged, or no conversation.
        ContextNotFoundError: there is nothing at the path.
    """
    header = read_header(path)
    if "conversation" not in header:
        raise CorruptContextError(
            f"{quote_path(path)} is a saved context without a conversation; load it with"
            " load_context, and begin one with generate(..., keep=True)"
        )
    return header, str(header.get("context_file", path))


def found(path: str | os.PathLike[str], context_file: str) -> str:
    """Return where the context of a conversation is: at its place, or beside the conversation.

    Raises:
        ContextNotFoundError: it is at neither.
    """
    beside = Path(path).parent / Path(context_file).name
    for place in (context_file, str(beside)):
        if os.path.exists(place):
            return place
    raise ContextNotFoundError(
        f"the context of the conversation {quote_path(path)} is not at {quote_path(context_file)};"
        " put it back or beside the conversation, or give it to load_conversation as context"
    )


def read_layers(
    path: str | os.PathLike[str], devices: list[torch.device]
) -> list[Pair | None] | None:
    """Return the keys and values of a conversation's turns; None where the file has none.

    Args:
        path: the file.
        devices: where those of each layer are to be.
    """
    if os.path.isdir(path):
        return None
    file = SavedFile(path)
    names = file.header["tensors"]

    def layer(index: int) -> Pair | None:
        if f"turns.{index}.k" not in names:
            return None
        # Of their own: the file may be replaced.
        k, v = (file.tensor(f"turns.{index}.{name}").clone() for name in "kv")
        return k.to(devices[index]), v.to(devices[index])

    layers = [layer(index) for index in range(len(devices))]
    return None if all(pair is None for pair in layers) else layers
