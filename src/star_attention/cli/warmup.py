"""`star-attention warmup`: compile and capture what a model needs, to find it on disk later."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from star_attention.cli.config_options import ConfigOptions
from star_attention.cli.formatting import format_bytes, format_seconds
from star_attention.cli.model_options import ModelOptions
from star_attention.cli.options import CalibrationFile, Quiet, option
from star_attention.cli.progress import Status
from star_attention.cli.torchrun import is_rank_0
from star_attention.serve.settings import ServeSettings

if TYPE_CHECKING:
    from star_attention.engine import StarLLM

_TORCHS, _TRITONS = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
_NOTHING = (
    "nothing is compiled on this device: a short context and an answer ran, and there are no caches"
    " to keep"
)


def warmup(
    model: ModelOptions,
    settings: Annotated[
        dict[str, Any],
        ConfigOptions(without=("tokens_per_forward", "reserve_tokens", "slice_weights")),
    ],
    rows: Annotated[
        int,
        option(
            "Maximum number of answers at once: --max-rows of the server.",
            "--rows",
            panel="Model",
            metavar="N",
            min=1,
        ),
    ] = ServeSettings.max_rows,
    calibration: CalibrationFile = None,
    quiet: Quiet = False,
) -> None:
    """Compile what `generate` and `serve` need, and fill the caches on disk.

    Prints the folders of the caches, as the variables that set them. Later processes with the same
    model, settings, versions and kind of GPU start with what is there, also on other machines and
    in images that these folders were copied to. Forwards of a context are compiled only for a
    --block-size. On a CPU nothing is compiled, unless --compile is given.

    Example: star-attention warmup -m models/needle-17m
    """
    import time

    from star_attention.cli import session

    status, start = Status(quiet=quiet), time.perf_counter()
    star = session.load(model, status, calibration=calibration, **settings)
    if not is_rank_0():
        star.follow()
        return
    from star_attention.generation.batching.warming import warm_up

    for piece in warm_up(star, rows, is_for_generate=True):
        status.say(f"warming up: {piece}")
    star.close()
    status.say(f"warm after {format_seconds(time.perf_counter() - start)}")
    _print_caches(star, status)


def _print_caches(star: StarLLM, status: Status) -> None:
    """Print where the caches are, and say how large."""
    if star.runtime.handle.compiled is None:
        status.say(_NOTHING)
        return
    for name, folder in _caches(has_triton=star.device.type == "cuda").items():
        files = [file for file in folder.rglob("*") if file.is_file()]
        status.say(f"{folder}: {format_bytes(sum(file.stat().st_size for file in files))}")
        print(f"{name}={folder}")


def _caches(*, has_triton: bool) -> dict[str, Path]:
    """Return the folders of torch's and of Triton's cache, by the variables that set them."""
    # torch sets its variable when it compiles.
    folders = {_TORCHS: os.environ.get(_TORCHS)}
    if has_triton:
        import triton

        folders[_TRITONS] = os.environ.get(_TRITONS) or triton.knobs.cache.dir
    return {name: Path(folder) for name, folder in folders.items() if folder}
