"""`encode --reuse`: a saved context of an older version, and options that must fit it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from star_attention import methods
from star_attention.cli import session
from star_attention.cli.model_options import ModelOptions
from star_attention.cli.options import ContextOptions
from star_attention.cli.progress import Status
from star_attention.config import StarConfig
from star_attention.errors import InvalidInputError
from star_attention.planning.lookback import parse_layers
from star_attention.planning.sizes import parse_size

ANYWHERE = ("kv_device", "kv_resident", "allow_special_tokens")
"""Settings that may differ from those with which a saved context was encoded."""

if TYPE_CHECKING:
    from star_attention.engine import StarLLM
    from star_attention.storage.context import EncodedContext


def load(
    model: ModelOptions, path: str, context: ContextOptions, status: Status, *, text: str
) -> tuple[StarLLM, EncodedContext]:
    """Load a saved context to reuse for a new text, and its model.

    Raises:
        InvalidInputError: If options differ from the saved context, or its blocks cannot be reused.
    """
    from star_attention.storage.header import read_header

    header = read_header(path)
    _check_options(header, path, context)
    refusal = methods.get(header["method"]).why_not_reuse()
    if refusal is not None:
        raise InvalidInputError(refusal)
    settings = {name: context.settings[name] for name in ANYWHERE}
    settings |= {name: header.get(name) for name in ("block_size", "anchor_size", "kv_dtype")}
    return session.load_saved(
        model, path, status, needs_template=context.chat, text=text, **settings
    )


_NAMED = ("method", "kv_windows")
"""Options with a default: with it, they need not have been given."""


def _check_options(header: dict[str, Any], path: str, context: ContextOptions) -> None:
    """Refuse options that ask for something else than the saved context has."""
    settings = context.settings
    # What a file of format 1 lacks is 0 and "all".
    saved = {"lookback": 0, "lookback_layers": "all", "kv_windows": "all"} | header
    for name, read in (
        ("method", str),
        ("block_size", parse_size),
        ("anchor_size", parse_size),
        ("lookback", int),
        ("lookback_layers", parse_layers),
        ("kv_dtype", str),
        ("kv_windows", str),
    ):
        value = settings.get(name)
        is_default = name in _NAMED and value == getattr(StarConfig, name)
        if value is None or is_default or read(value) == saved.get(name):
            continue
        raise InvalidInputError(
            f"{_option(name)} {value} does not fit {path}, which has {saved.get(name)}; leave it"
            " out, or encode without --reuse"
        )
    for name, given in (("quality", settings.get("quality")), ("calibration", context.calibration)):
        if given is not None:
            raise InvalidInputError(
                f"{_option(name)} {given} has no effect with --reuse, which takes the look-back of"
                f" {path}; leave it out, or encode without --reuse"
            )
    if (header["chat"] is not None) != context.chat:
        is_chat, remedy = ("a chat", "add") if header["chat"] is not None else ("no chat", "drop")
        raise InvalidInputError(
            f"{path} is {is_chat}, and the new text would share no block with it; {remedy} --chat,"
            " or encode without --reuse"
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
