"""The options of `serve`, which are the fields of `ServeSettings`, and its file of settings."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from star_attention.cli.options import option
from star_attention.errors import first_line
from star_attention.serve.settings import ServeSettings

_LISTEN, _LIMITS, _CONTEXTS, _TIMES = "Server", "Limits", "Contexts", "Times"
_DEFAULTS = ServeSettings()


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where a server listens, and whom it serves."""

    host: Annotated[
        str,
        option("Address to listen on. One that other machines reach needs --keys.", panel=_LISTEN),
    ] = _DEFAULTS.host
    port: Annotated[
        int, option("Port to listen on; 0 for any free one.", panel=_LISTEN, metavar="N")
    ] = _DEFAULTS.port
    keys: Annotated[
        str | None,
        option(
            "File with a key per line: name:key, or name:sha256:HEX. Each name has contexts and"
            " files of its own.",
            panel=_LISTEN,
            metavar="FILE",
        ),
    ] = None
    insecure: Annotated[
        bool, option("Serve other machines without keys.", "--insecure", panel=_LISTEN)
    ] = False
    allowed_hosts: Annotated[
        list[str] | None,
        option(
            "Another host name to accept requests for, without --keys; may be repeated.",
            "--allowed-hosts",
            panel=_LISTEN,
            metavar="NAME",
        ),
    ] = None
    public_metrics: Annotated[
        bool, option("Show /metrics without a key.", "--public-metrics", panel=_LISTEN)
    ] = False
    log_json: Annotated[
        bool,
        option(
            "Log one JSON object per line, with the fields of each request.",
            "--log-json",
            panel=_LISTEN,
        ),
    ] = False
    served_model_name: Annotated[
        str | None,
        option(
            "Name of the model in the API.",
            "--served-model-name",
            panel=_LISTEN,
            metavar="NAME",
            show_default="the last part of MODEL",
        ),
    ] = None
    warm_up: Annotated[
        bool,
        option(
            "Compile layers and capture CUDA graphs before the first request; /ready says when it"
            " is done.",
            "--warm-up/--no-warm-up",
            panel=_LISTEN,
        ),
    ] = True


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """How much a request may ask for."""

    max_rows: Annotated[
        int,
        option("Maximum number of answers generated at once.", panel=_LIMITS, metavar="N", min=1),
    ] = _DEFAULTS.max_rows
    max_rows_per_key: Annotated[
        int | None,
        option(
            "Maximum number of answers generated at once for one key.",
            panel=_LIMITS,
            metavar="N",
            min=1,
            show_default="no limit",
        ),
    ] = None
    max_waiting: Annotated[
        int,
        option(
            "Maximum number of open requests; others get status 429.",
            panel=_LIMITS,
            metavar="N",
            min=1,
        ),
    ] = _DEFAULTS.max_waiting
    max_body: Annotated[
        str, option("Maximum bytes of a request.", panel=_LIMITS, metavar="SIZE")
    ] = "64m"
    default_max_tokens: Annotated[
        str,
        option(
            "Maximum tokens of an answer whose request gives no limit.",
            panel=_LIMITS,
            metavar="SIZE",
        ),
    ] = str(_DEFAULTS.default_max_tokens)
    max_tokens: Annotated[
        str | None,
        option(
            "Maximum tokens of an answer that a request may ask for.",
            panel=_LIMITS,
            metavar="SIZE",
            show_default="all that fit",
        ),
    ] = None
    max_answers: Annotated[
        int, option("Maximum number of answers to one request.", panel=_LIMITS, metavar="N", min=1)
    ] = _DEFAULTS.max_answers
    max_responses: Annotated[
        int,
        option(
            "Maximum number of responses kept for a key, to be continued; 0 for none.",
            panel=_LIMITS,
            metavar="N",
            min=0,
        ),
    ] = _DEFAULTS.max_responses
    max_stops: Annotated[
        int,
        option("Maximum number of stop strings of a request.", panel=_LIMITS, metavar="N", min=1),
    ] = _DEFAULTS.max_stops


@dataclass(frozen=True, kw_only=True)
class TimeOptions:
    """How long things may take. All in seconds."""

    request_timeout: Annotated[
        float | None,
        option(
            "Maximum seconds from a request to its last token.",
            panel=_TIMES,
            metavar="X",
            show_default="no limit",
        ),
    ] = None
    drain_timeout: Annotated[
        float,
        option("Seconds that running answers get to end at shutdown.", panel=_TIMES, metavar="X"),
    ] = _DEFAULTS.drain_timeout
    keepalive: Annotated[
        float,
        option(
            "Seconds of silence after which a stream gets a comment line.",
            panel=_TIMES,
            metavar="X",
        ),
    ] = _DEFAULTS.keepalive
    heartbeat: Annotated[
        float,
        option(
            "Seconds of silence after which a stream gets a chunk without text.",
            panel=_TIMES,
            metavar="X",
        ),
    ] = _DEFAULTS.heartbeat
    engine_stall: Annotated[
        float,
        option(
            "Seconds without a step after which /health answers 503.", panel=_TIMES, metavar="X"
        ),
    ] = _DEFAULTS.engine_stall


@dataclass(frozen=True, kw_only=True)
class KeepOptions:
    """What is kept of prompts, and where."""

    implicit: Annotated[
        bool,
        option(
            "Keep the beginning of long prompts as a context even without a cache mark.",
            "--implicit/--no-implicit",
            panel=_CONTEXTS,
        ),
    ] = True
    min_context_tokens: Annotated[
        str,
        option(
            "Minimum tokens of a prompt whose beginning is kept without a mark.",
            panel=_CONTEXTS,
            metavar="SIZE",
        ),
    ] = str(_DEFAULTS.min_context_tokens)
    store: Annotated[
        str | None,
        option(
            "Folder for contexts that survive a restart. It holds the clients' texts.",
            "--store",
            panel=_CONTEXTS,
            metavar="FOLDER",
        ),
    ] = None
    max_context_bytes: Annotated[
        str | None,
        option(
            "Maximum bytes of contexts in the device's memory.",
            panel=_CONTEXTS,
            metavar="SIZE",
            show_default="half of what is free",
        ),
    ] = None
    max_host_bytes: Annotated[
        str | None,
        option(
            "Maximum bytes of host memory for contexts that leave the GPU; 0 for none.",
            panel=_CONTEXTS,
            metavar="SIZE",
            show_default="a quarter of what is free",
        ),
    ] = None
    max_store_bytes: Annotated[
        str,
        option(
            "Maximum bytes of contexts in the folder of --store.", panel=_CONTEXTS, metavar="SIZE"
        ),
    ] = "64g"
    context_ttl: Annotated[
        float | None,
        option(
            "Seconds without use after which a context is dropped.",
            panel=_CONTEXTS,
            metavar="X",
            show_default="no limit",
        ),
    ] = None
    max_conversations: Annotated[
        int,
        option(
            "Maximum number of conversations kept, whose next prompt computes only new tokens; 0"
            " for none.",
            panel=_CONTEXTS,
            metavar="N",
            min=0,
        ),
    ] = _DEFAULTS.max_conversations
    conversation_ttl: Annotated[
        float,
        option(
            "Seconds without use after which a conversation is dropped.",
            panel=_CONTEXTS,
            metavar="X",
        ),
    ] = _DEFAULTS.conversation_ttl


Groups = ServerOptions | LimitOptions | TimeOptions | KeepOptions


def settings_of(*groups: Groups) -> ServeSettings:
    """Return the settings that all options make together."""
    values = {field.name: getattr(group, field.name) for group in groups for field in fields(group)}
    return ServeSettings.of(**values)


def _read_config(context: typer.Context, path: str | None) -> str | None:
    """Take the values of a file as the defaults of the command's other options."""
    if path is None or context.resilient_parsing:
        return path
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {first_line(error)}") from None
    options = (p for p in context.command.params if p.param_type_name == "option")
    names = {p.name for p in options if p.name and p.name != "config"}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = key.removeprefix("--").replace("-", "_")
        if name not in names:
            raise typer.BadParameter(f"{path}: {_no_option(name, names)}")
        defaults[name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _no_option(name: str, names: set[str]) -> str:
    """Say why a file cannot have a key."""
    if name == "config":
        return "a file of settings names no other one; leave config out"
    switch = name.removeprefix("no_")
    hint = f"; give {switch.replace('_', '-')} = false" if switch in names else ""
    return f"serve has no option --{name.replace('_', '-')} in a file{hint}"


ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="TOML file with options of this command as keys, such as max-rows = 32. Options of the"
        " command line take precedence.",
        rich_help_panel=_LISTEN,
        callback=_read_config,
        is_eager=True,
    ),
]
