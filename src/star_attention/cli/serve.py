"""`star-attention serve`: an engine over HTTP."""

from __future__ import annotations

from typing import Annotated, Any

from star_attention.cli.config_options import ConfigOptions
from star_attention.cli.model_options import ServedModelOptions
from star_attention.cli.options import CalibrationFile, Quiet
from star_attention.cli.progress import Status
from star_attention.cli.serve_options import (
    ConfigFile,
    KeepOptions,
    LimitOptions,
    ServerOptions,
    TimeOptions,
    settings_of,
)


def serve(
    model: ServedModelOptions,
    server: ServerOptions,
    limits: LimitOptions,
    keep: KeepOptions,
    times: TimeOptions,
    settings: Annotated[
        dict[str, Any],
        # Contexts are encoded beside rows, where ranks take turns.
        ConfigOptions(
            without=("tokens_per_forward", "reserve_tokens", "slice_weights", "balance_ranks")
        ),
    ],
    calibration: CalibrationFile = None,
    config: ConfigFile = None,
    quiet: Quiet = False,
) -> None:
    """Serve OpenAI's and Anthropic's APIs over HTTP. A long document is encoded once and asked many
    times.

    Needs the extra `serve`. Clients, contexts and limits: docs/serving.md.

    Example: star-attention serve -m models/needle-17m
    """
    serve_settings = settings_of(server, limits, keep, times)
    from star_attention.cli import serving

    star_settings = settings | {"calibration": calibration}
    serving.serve(model, serve_settings, star_settings, Status(quiet=quiet))
