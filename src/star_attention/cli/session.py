"""Load the model and encode the context, for the commands that need them."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star_attention import methods
from star_attention.cli.chat_options import context_kwargs, messages
from star_attention.cli.formatting import format_bytes
from star_attention.cli.model_options import ModelOptions
from star_attention.cli.options import ContextOptions
from star_attention.cli.progress import SizeNote, Status
from star_attention.config import KV_DTYPES, StarConfig, check_device, check_dtype
from star_attention.errors import (
    ContextSaveError,
    InvalidInputError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from star_attention.planning.positions import Positions

if TYPE_CHECKING:
    from star_attention.engine import StarLLM
    from star_attention.generation.conversation import Conversation
    from star_attention.hf.loading.files import ModelFiles
    from star_attention.storage.context import EncodedContext

_log = logging.getLogger(__name__)

NO_TEMPLATE = "this model has no chat template; leave out --chat"


def load(
    model: ModelOptions,
    status: Status,
    *,
    needs_tokenizer: bool = False,
    needs_template: bool = False,
    calibration: str | None = None,
    text: str = "",
    second_look: float = 0.0,
    **settings: Any,
) -> StarLLM:
    """Load the model. Whatever can be checked is checked before anything slow starts.

    Args:
        model: The options.
        status: Says that the model is being loaded.
        needs_tokenizer: True to refuse a model without a tokenizer.
        needs_template: True to refuse one without a chat template, if its files show that.
        calibration: The file of a calibration, whose look-back holds where settings have none.
        text: What is to be encoded.
        second_look: Share of the context that queries will look at again.
        settings: Settings of `StarConfig`.

    Raises:
        ModelNotFoundError: If there is no model, or no tokenizer where one is needed.
    """
    _check_words(model)
    config, model_kwargs = StarConfig.of(**model.settings | settings), model.kwargs()
    methods.check_lookback(config.method, config.lookback)
    methods.check_second_look(config.method, second_look)
    lookback = {} if calibration is None else _lookback_options(calibration, settings)
    model_files = _check_files(
        model,
        model_kwargs,
        needs_tokenizer=needs_tokenizer,
        needs_template=needs_template,
        text=text,
    )
    with status.waiting(f"loading {model.model}{_described(model, model_files)}"):
        if model_files.folder is not None:
            # What transformers refuses in a config is known before the rest is imported.
            from star_attention.hf.loading import model_config

            model_config.config_of(model_files)

        from star_attention.distributed import from_environment
        from star_attention.engine import StarLLM
        from star_attention.hf.logs import hide_progress_bars

        hide_progress_bars()
        return StarLLM.from_pretrained(
            model.model,
            config=config,
            dtype=model.dtype,
            device=model.device,
            comm=from_environment(None, stall_s=model.stall_limit),
            tensor_parallel=model.tensor_parallel,
            model_kwargs=model_kwargs,
            compile=model.compile,
            adapter=model.adapter,
            weights=model.weights,
            calibration=calibration,
            **lookback,
        )


def _check_words(model: ModelOptions) -> None:
    """Check what names precisions and a device."""
    from star_attention.hf.loading.packages import check_device_is_here
    from star_attention.hf.loading.weight_formats import check_name

    check_dtype(model.dtype)
    check_name(model.weights)
    check_device(model.device)
    check_device_is_here(model.device)


def _lookback_options(calibration: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the look-back that options ask for. Checks the file before anything slow starts."""
    from star_attention.planning.calibration import LOOKBACK_SETTINGS, Calibration

    Calibration.read(calibration)
    return {name: settings[name] for name in LOOKBACK_SETTINGS if settings.get(name) is not None}


def _check_files(
    model: ModelOptions,
    model_kwargs: dict[str, Any],
    *,
    needs_tokenizer: bool,
    needs_template: bool,
    text: str = "",
) -> ModelFiles:
    """Check the model's files without torch, and that a text is not far too long for it."""
    from star_attention.hf.loading import checks, rope_words

    model_files = _located(model, model_kwargs)
    checks.check_loadable(model_files)
    checks.check_weights(model_files, model_kwargs)
    checks.check_can_quantize(model_files, model_kwargs, model.weights)
    rotary, _ = rope_words.take(model_kwargs)
    if needs_tokenizer and model_files.tokenizer_source is None:
        raise ModelNotFoundError(
            f"the model at {model.model} has no tokenizer, which text input needs;"
            " copy its files (tokenizer.json and the like) there"
        )
    if needs_template and checks.lacks_chat_template(model_files):
        raise InvalidInputError(NO_TEMPLATE)
    checks.check_tokenizer(model_files)
    _check_length(model_files, rotary, text)
    if model_files.gguf_file is not None:
        # transformers' bar for these files cannot be switched off otherwise.
        os.environ.setdefault("TQDM_DISABLE", "1")
    return model_files


def _described(model: ModelOptions, model_files: ModelFiles) -> str:
    """Return what to add to a model's name, about where it comes from."""
    if model_files.folder is None:
        return " from the hub (there is no such folder here)"
    adapter = "" if model_files.adapter in (None, model.model) else f" with {model_files.adapter}"
    return adapter if model_files.adapter != model.model else f", an adapter of {model_files.path}"


def most_positions(model: ModelOptions) -> int | None:
    """Return a number of positions that a model has at most, before torch is imported.

    None if its files do not say, or rotary settings are given.
    """
    from star_attention.hf.loading import rope_words

    rotary, model_kwargs = rope_words.take(model.kwargs())
    return _limit(_located(model, model_kwargs), rotary)


def _located(model: ModelOptions, model_kwargs: dict[str, Any]) -> ModelFiles:
    from star_attention.hf.loading import files

    location = {name: model_kwargs[name] for name in files.LOCATION if name in model_kwargs}
    return files.locate(model.model, location, model.adapter)


def _limit(model_files: ModelFiles, rotary: dict[str, Any]) -> int | None:
    from star_attention.hf.loading.positions import most_positions

    config = model_files.config
    return most_positions(config) if config and not rotary else None


def _check_length(model_files: ModelFiles, rotary: dict[str, Any], text: str) -> None:
    """Refuse a text that is far too long for a model."""
    from star_attention.hf.loading.text_length import least_tokens

    limit = _limit(model_files, rotary)
    if limit is not None:
        positions = Positions(limit=limit, reserve_tokens=0)
        count = least_tokens(model_files, text, limit)
        positions.check(count, "the context has at least", "cut the context, or use another model")


def config_and_tokenizer(model: ModelOptions, *, needs_template: bool) -> tuple[Any, Any]:
    """Load a model's config and tokenizer, without its weights, and check that it can run.

    Args:
        model: The options.
        needs_template: True to refuse a model without a chat template, if its files show that.

    Raises:
        ModelNotFoundError: If there is no model, or it has no tokenizer.
        UnsupportedModelError: If Star Attention cannot run it.
    """
    _check_words(model)
    model_kwargs = model.kwargs()
    _check_files(model, model_kwargs, needs_tokenizer=True, needs_template=needs_template)
    from star_attention.hf.loading import rope_words
    from star_attention.hf.loading.model_config import load_config, location_kwargs

    location = location_kwargs(model_kwargs)
    rotary, _ = rope_words.take(model_kwargs)
    config = load_config(model.model, rotary, **location)
    from star_attention.hf.loading import load as loading
    from star_attention.hf.loading import support

    reasons = support.reasons(config)
    if reasons:
        raise UnsupportedModelError(f"{config.model_type} ({model.model})", reasons)
    return config, loading.load_tokenizer(model.model, **location)


def load_with_tokenizer(model: ModelOptions, status: Status, **settings: Any) -> StarLLM:
    """Load a model that works on text.

    Raises:
        ModelNotFoundError: If it has no tokenizer.
    """
    return load(model, status, needs_tokenizer=True, **settings)


def load_for(
    model: ModelOptions,
    context: ContextOptions,
    status: Status,
    *,
    text: str = "",
    second_look: float = 0.0,
) -> StarLLM:
    """Load the model to encode a text as the options say."""
    star = load_with_tokenizer(
        model,
        status,
        needs_template=context.chat,
        calibration=context.calibration,
        text=text,
        second_look=second_look,
        **context.settings,
    )
    config, method = star.config, star.runtime.method
    if not method.takes_sizes and (config.block_size, config.anchor_size) != (None, None):
        warnings.warn(
            f"--block-size and --anchor-size have no effect on {method.name} attention",
            stacklevel=2,
        )
    return star


def load_saved(
    model: ModelOptions, path: str, status: Status, **settings: Any
) -> tuple[StarLLM, EncodedContext]:
    """Load a saved context and its model, with these settings; see `load_for_saved`."""
    star, _ = load_for_saved(model, path, status, **settings)
    return star, star.load_context(path)


def load_for_saved(
    model: ModelOptions, path: str, status: Status, **settings: Any
) -> tuple[StarLLM, dict[str, Any]]:
    """Load the model of a saved context or conversation; return it with the file's header.

    Method and look-back are the file's, and so are the precision with `--dtype auto`, and the model
    without `--model`.

    Raises:
        ContextMismatchError: If the options ask for another precision or architecture.
        InvalidInputError: If neither the file nor the options name a model.
    """
    _check_words(model)

    from star_attention.cli.saved_model import check_fits, named_by
    from star_attention.storage.header import lookback_in, read_header

    # Refuses other files, and other models, before torch is imported.
    header = read_header(path)
    model = named_by(header, path, model)
    check_fits(header, path, model)
    settings |= {"method": header["method"], **lookback_in(header)}
    return load_with_tokenizer(model, status, **settings), header


def encode_text(
    star: StarLLM,
    text: str,
    status: Status,
    context: ContextOptions,
    *,
    queries: list[str] | None = None,
    generation_kwargs: dict[str, Any] | None = None,
    save_to: str | None = None,
    reuse: EncodedContext | None = None,
) -> EncodedContext:
    """Encode a text, showing progress. Queries and generation settings are checked before.

    With `--chat`, the text starts a user message that the query completes. With `save_to`, where
    the context will be saved, its size is said before. With `reuse`, blocks that are the same are
    copied from that context.

    Raises:
        InvalidInputError: If the model has no chat template for `--chat`.
        ContextSaveError: If the disk has no room for the context.
    """
    chat = context.chat
    content: Any = text
    has_template = bool(getattr(star.tokenizer, "chat_template", None))
    if chat and not has_template:
        raise InvalidInputError(NO_TEMPLATE)
    if not chat and has_template:
        status.say("using the text as it is; --chat applies this model's chat template")
    kwargs = dict(context_kwargs(context) or {})
    # Those of --chat-template-kwargs are what the template reads, whatever calls it writes.
    tools = None if context.tools is None else kwargs.pop("tools", None)
    if chat:
        content = messages(text, context)
    _log.info("%r", star)
    with status.progress(star.rank_progress) as progress:
        if save_to is not None:
            progress = SizeNote(status, partial(_saved_size, star, save_to), progress)
        encoded: EncodedContext = star.encode(
            content,
            # None would show a bar.
            progress=progress or False,
            query=queries,
            settings=generation_kwargs,
            tools=tools,
            chat_template_kwargs=kwargs or None,
            reuse=reuse,
        )
    _log.info("%s", encoded.plan)
    return encoded


def _saved_size(star: StarLLM, path: str, context_tokens: int) -> str:
    """Say how large the file of a context will be, and how to make it smaller.

    Raises:
        ContextSaveError: If the disk has no room for it.
    """
    size, smaller = star.context_bytes(context_tokens), ""
    if star.config.kv_dtype is None:
        for name in KV_DTYPES:
            smaller += (
                f"; --kv-dtype {name} makes it"
                f" {format_bytes(star.context_bytes(context_tokens, name))}"
            )
    free = shutil.disk_usage(Path(path).absolute().parent).free
    if free < size:
        raise ContextSaveError(
            f"cannot save the context to {path}: it will take {format_bytes(size)}, and"
            f" {format_bytes(free)} are free there; free space or choose another place{smaller}"
        )
    return f"the saved context will take about {format_bytes(size)}{smaller}"


def save(saved: EncodedContext | Conversation, path: str, status: Status) -> None:
    """Save a context or a conversation, and report the size of the file or folder."""
    saved.save(path)
    target = Path(path)
    files = target.iterdir() if target.is_dir() else [target]
    size = format_bytes(sum(file.stat().st_size for file in files))
    status.say(
        f"saved to {path} ({size}); it contains the text and its token ids: protect it like the"
        " text"
    )
