"""A loaded model and an encoded context, for the commands that need them."""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star_attention.cli.options import ContextOptions, ModelOptions
from star_attention.cli.progress import Notes, in_bytes
from star_attention.cli.torchrun import rank_and_size
from star_attention.config import StarConfig, check_device, check_dtype
from star_attention.errors import ContextSaveError, InvalidInputError, ModelNotFoundError

if TYPE_CHECKING:
    from star_attention.engine import StarLLM
    from star_attention.storage.context import EncodedContext


def check_place(model: ModelOptions) -> None:
    check_dtype(model.dtype)
    check_device(model.device)


def load(model: ModelOptions, notes: Notes, **sizes: Any) -> StarLLM:
    """The model, with what is asked for checked before anything slow begins."""
    check_place(model)
    sizes |= dict(tokens_per_forward=model.tokens_per_forward, reserve_tokens=model.reserve_tokens)
    StarConfig.of(**sizes)
    where = "" if Path(model.model).exists() else ", which is no folder here, from the hub"
    with notes.waiting(f"loading {model.model}{where}"):
        from star_attention.distributed import from_environment
        from star_attention.engine import StarLLM
        from star_attention.hf.logs import hide_progress_bars

        hide_progress_bars()
        own = from_environment(None, stall_s=model.stall_limit)
        return StarLLM.from_pretrained(
            model.model,
            dtype=model.dtype,
            device=model.device,
            comm=own,
            tensor_parallel=model.tensor_parallel,
            compile=model.compile,
            **sizes,
        )


def load_for(model: ModelOptions, context: ContextOptions, notes: Notes) -> StarLLM:
    if context.method in ("dense", "ring") and (context.block_size, context.anchor_size) != (
        None,
        None,
    ):
        warnings.warn(
            f"--block-size and --anchor-size have no effect on {context.method} attention",
            stacklevel=2,
        )
    star = load(
        model,
        notes,
        block_size=context.block_size,
        anchor_size=context.anchor_size,
        method=context.method,
        anchor_source=context.anchor_source,
        ring_layout=context.ring_layout,
        kv_dtype=context.kv_dtype,
        kv_device=context.kv_device,
    )
    _check_tokenizer(star, model)
    return star


def _check_tokenizer(star: StarLLM, model: ModelOptions) -> None:
    if star.tokenizer is None:
        raise ModelNotFoundError(
            f"the model at {model.model} has no tokenizer, which texts need; copy its files (tokenizer.json and the like) there"
        )


def encode_text(
    star: StarLLM,
    text: str,
    notes: Notes,
    *,
    chat: bool,
    queries: list[str] | None = None,
    words: dict[str, Any] | None = None,
) -> EncodedContext:
    """Phase 1 with progress; as a chat, the text is the first part of a user message that stays open for the query.

    What queries and the words of `generate` would be refused for is said before.
    """
    content: Any = text
    has_template = bool(getattr(star.tokenizer, "chat_template", None))
    if chat and not has_template:
        raise InvalidInputError("this model has no chat template; leave out --chat")
    if not chat and has_template:
        notes.say("the text goes in as it is; this model has a chat template, which --chat uses")
    if chat:
        from star_attention.hf.text.chat import user_message

        content = user_message(text)
    with notes.progress(star.rank_progress) as progress:
        context: EncodedContext = star.encode(
            content, progress=progress, query=queries, settings=words
        )
    return context


def check_target(path: str | None) -> None:
    """Whether a context can be saved there, asked before it is encoded and not after.

    Raises `ContextSaveError`.
    """
    if path is None:
        return
    from star_attention.storage import saving

    target = Path(path)
    saving.check_target(target, as_folder=rank_and_size()[1] > 1)
    try:
        with tempfile.NamedTemporaryFile(
            prefix=f".{target.name[:32]}.", suffix=".part", dir=target.parent
        ):
            pass
    except OSError as error:
        raise ContextSaveError(
            f"cannot save the context to {target}: the folder {target.parent} cannot be written to ({error.strerror})"
        ) from None


def check_folder(path: str) -> None:
    """Whether results can be written there, asked before anything is measured and not after.

    Raises `InvalidInputError`.
    """
    nearest = next(one for one in (Path(path), *Path(path).parents) if one.exists())
    if not nearest.is_dir():
        raise InvalidInputError(f"{nearest} is no folder; give another one with --out")
    if not os.access(nearest, os.W_OK):
        raise InvalidInputError(
            f"the folder {nearest} cannot be written to; give another one with --out"
        )


def save(context: EncodedContext, path: str, notes: Notes) -> None:
    context.save(path)
    target = Path(path)
    files = target.iterdir() if target.is_dir() else [target]
    size = in_bytes(sum(file.stat().st_size for file in files))
    notes.say(f"saved to {path} ({size}); it holds the text's token ids, guard it like the text")


def load_saved(model: ModelOptions, path: str, notes: Notes) -> tuple[StarLLM, EncodedContext]:
    """A saved context and its model, with the method and, unless one is asked for, the precision of the file."""
    check_place(model)

    from star_attention.storage.saved import SavedContext

    header = SavedContext(path).header  # a file that is none is refused before the model is loaded
    if model.dtype == "auto":
        model = replace(model, dtype=header["identity"]["dtype"].removeprefix("torch."))
    star = load(model, notes, method=header["method"])
    _check_tokenizer(star, model)
    return star, star.load_context(path)
