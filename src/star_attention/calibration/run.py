"""Run a calibration: build contexts, measure, and choose the settings."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from typing import Any

from star_attention import StarLLM
from star_attention.calibration.measure import Progress, measure
from star_attention.calibration.result import (
    FLOOR,
    PAPER,
    Measured,
    Result,
    Variant,
    best_of,
    layer_runs,
)
from star_attention.calibration.settings import GPU_LENGTH, LENGTH, CalibrationSettings
from star_attention.calibration.texts import prose, samples
from star_attention.errors import SizeError, UnsupportedModelError
from star_attention.planning.calibration import Calibration, Lookback
from star_attention.planning.lookback import ALL, sink_size
from star_attention.planning.quality import BALANCED, HALF_LOOKS_BACK, HIGH, all_look_back
from star_attention.planning.sizes import counted
from star_attention.runtime import model_facts

_TAIL = 512
"""Positions for questions and answers."""


def default_length(star: StarLLM) -> int:
    """Return the length of contexts for the device, within the model's positions."""
    length = LENGTH if star.device.type == "cpu" else GPU_LENGTH
    positions = star.runtime.handle.max_positions
    return length if positions is None else min(length, positions - _TAIL)


def calibrate(
    star: StarLLM,
    settings: CalibrationSettings | None = None,
    *,
    text: str | None = None,
    progress: Progress | None = None,
) -> tuple[Calibration, Result]:
    """Measure which layers of a model should look back. Collective.

    Facts are planted in a text, and asked for. What counts is the mean negative log-likelihood of
    the answers, and of the text that follows, in nats per token, with look-back in no layers, in
    all, and in parts of them.

    Args:
        star: the engine.
        settings: the contexts; None takes `default_length`.
        text: where contexts come from; None for the language reference of Python.
        progress: called with a line after each variant.

    Returns:
        The settings to use, and what was measured.

    Raises:
        SizeError: a text too short, or contexts that do not fit the model's positions.
        UnsupportedModelError: a model of one layer.
        InvalidInputError: the engine has no tokenizer.
    """
    started = time.perf_counter()
    settings = settings or CalibrationSettings(length=default_length(star))
    tokenizer = star.runtime.need_tokenizer("calibration")
    _check_fits(star, settings)
    text = prose() if text is None else text
    contexts = samples(tokenizer, text, settings)

    def run(*variants: Variant) -> tuple[Measured, ...]:
        lines = progress or (lambda line: None)
        return tuple(measure(star, list(variants), contexts, settings, lines))

    result = _measured(len(star.runtime.handle.windows), run)
    return (
        Calibration(
            model=model_facts(star.runtime),
            settings={BALANCED: result.balanced, HIGH: result.high},
            measured=_record(result, settings, text, time.perf_counter() - started),
        ),
        result,
    )


def _check_fits(star: StarLLM, settings: CalibrationSettings) -> None:
    name, layers = type(star.model).__name__, len(star.runtime.handle.windows)
    if layers < 2:
        raise UnsupportedModelError(name, [f"{layers} layer leaves nothing to choose"])
    positions = star.runtime.handle.max_positions
    if positions is not None and settings.length + _TAIL > positions:
        raise SizeError(
            f"length {settings.length:,} and {_TAIL} tokens for questions exceed the model's"
            f" {positions:,} positions; give a length of at most {positions - _TAIL:,}"
        )


def _measured(num_layers: int, run: Any) -> Result:
    def looking_back(lookback: int, layers: str) -> Variant:
        settings = Lookback(lookback=lookback, lookback_layers=layers)
        where = "all layers" if layers == ALL else f"layers {layers}"
        return Variant(name=f"{counted(lookback, 'block')}, {where}", settings=settings)

    floor, paper, near, ceiling = run(
        FLOOR, PAPER, *(looking_back(all_look_back(quality), ALL) for quality in HALF_LOOKS_BACK)
    )
    blocks, far_blocks = HALF_LOOKS_BACK[BALANCED], HALF_LOOKS_BACK[HIGH]
    groups = layer_runs(num_layers, 1)
    half = layer_runs(num_layers, max(1, len(groups) // 2))
    halves = run(*(looking_back(blocks, layers) for layers in half))
    (far,) = run(looking_back(far_blocks, best_of(halves).variant.settings.lookback_layers))
    return Result(
        floor=floor,
        paper=paper,
        near=near,
        ceiling=ceiling,
        groups=run(*(looking_back(blocks, layers) for layers in groups)),
        halves=halves,
        far=far,
    )


def _record(
    result: Result, settings: CalibrationSettings, text: str, seconds: float
) -> dict[str, Any]:
    """Return the measurements as JSON values: gains over no look-back, in nats per token."""

    def entry(measured: Measured) -> dict[str, Any]:
        gains = {part: measured.gain(result.floor, part) for part in ("total", "facts", "text")}
        return asdict(measured.variant.settings) | {
            "loss": round(measured.mean, 4),
            "gain": {part: _rounded(asdict(gain)) for part, gain in gains.items()},
        }

    return {
        **asdict(settings),
        "block_size": settings.block_size,
        "anchor_size": sink_size(settings.block_size),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
        "seconds": round(seconds, 1),
        "reason": result.reason,
        "none": {"loss": round(result.floor.mean, 4)},
        "paper": entry(result.paper),
        "all": [entry(result.near), entry(result.ceiling)],
        "groups": [entry(group) for group in result.groups],
        "halves": [entry(half) for half in result.halves],
        "far": entry(result.far),
    }


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}
