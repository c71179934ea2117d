"""The program of `serve`: what is checked before the model is read, and what is said."""

from __future__ import annotations

import importlib.util
import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star_attention.cli import session
from star_attention.cli.model_options import ServedModelOptions
from star_attention.cli.progress import Status
from star_attention.cli.torchrun import is_rank_0
from star_attention.errors import InvalidInputError, MissingPackageError
from star_attention.serve.settings import ServeSettings

if TYPE_CHECKING:
    from star_attention.engine import StarLLM

_PACKAGES = ("starlette", "uvicorn", "python_multipart", "prometheus_client")


def check_packages() -> None:
    """Raise an error if a server cannot start.

    Raises:
        MissingPackageError: the extra `serve` is not installed.
    """
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(
                f"serve needs the package {package.replace('_', '-')}"
                " (pip install 'star-attention[serve]')"
            )


def serve(
    model: ServedModelOptions,
    settings: ServeSettings,
    star_settings: dict[str, Any],
    status: Status,
) -> None:
    """Serve a model until a signal ends it; under torchrun rank 0 serves, and the others follow.

    Raises:
        MissingPackageError: the extra `serve` is not installed.
        InvalidInputError: a setting that cannot work, or an address that is taken.
    """
    check_packages()
    if not is_rank_0():
        _follow(model, settings, star_settings, status)
        return
    from star_attention.serve.keys import Keys

    keys = None if settings.keys is None else Keys.read(settings.keys)
    from star_attention.serve import listening

    with (
        _logged_requests(quiet=status.quiet, as_json=settings.log_json),
        listening.bind(settings.host, settings.port) as listener,
    ):
        star = load(model, status, star_settings)
        from star_attention.serve import program

        program.check_same(star, settings)
        name = settings.served_model_name or _name(model.shapes or model.model)
        service = program.make_service(star, name, settings)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host

        def ready() -> None:
            base = f"http://{shown}:{port}/"
            status.say(f"serving {name} at {base}v1, with a page at {base}; Ctrl-C ends it")

        with warnings.catch_warnings():
            # They quote texts, which are clients' from now on.
            warnings.simplefilter("ignore")
            program.run(service, keys, listener, ready)
        star.close()


def _follow(
    model: ServedModelOptions,
    settings: ServeSettings,
    star_settings: dict[str, Any],
    status: Status,
) -> None:
    """Do on this rank what the server on rank 0 does, until it ends."""
    star = load(model, status, star_settings)
    from star_attention.serve import program

    program.check_same(star, settings)
    # A launcher sends them to all ranks. Rank 0 lets answers end, and then the other ranks go.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        star.follow()


def load(model: ServedModelOptions, status: Status, settings: dict[str, Any]) -> StarLLM:
    """Load the model, or make one of random weights.

    Args:
        settings: settings of `StarConfig`, and the file of a calibration.

    Raises:
        InvalidInputError: both are wanted, or none; or a calibration of random weights.
    """
    if (model.shapes is None) == (not model.model):
        raise InvalidInputError("give either a model (-m) or the shapes of one (--shapes)")
    if model.shapes is None:
        return session.load_with_tokenizer(model, status, **settings)
    if settings.pop("calibration", None) is not None:
        raise InvalidInputError(
            "a calibration is of one model, and --shapes has random weights; leave out"
            " --calibration"
        )
    from star_attention.bench.models import load_model, random_tokenizer
    from star_attention.engine import StarLLM

    with status.waiting(f"making weights in the shapes of {model.shapes}"):
        made = load_model(
            None, model.shapes, dtype=model.dtype, device=model.device, weights=model.weights
        )
        tokenizer = random_tokenizer(made.config.vocab_size)
        return StarLLM(made, tokenizer, compile=model.compile, **model.settings | settings)


def _name(model: str) -> str:
    """Return the last part of a model's path or hub id."""
    return Path(model.rstrip("/")).name or model


@contextmanager
def _logged_requests(*, quiet: bool, as_json: bool) -> Iterator[None]:
    """Log a line about each request to stderr inside the block: no prompts, no keys."""
    from star_attention.serve.logs import JsonFormatter

    log = logging.getLogger("star_attention.serve")
    before = log.propagate, log.level
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if as_json else text)
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate, level = before
        log.setLevel(level)
