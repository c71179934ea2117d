"""`plan --hardware`: phase 1 and phase 2 over lengths and numbers of ranks, on hardware that need not be there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from star_attention.cli.options import QUARTER
from star_attention.cli.progress import in_bytes, table
from star_attention.cli.report import warn_of_positions
from star_attention.config import StarConfig
from star_attention.errors import InvalidInputError
from star_attention.hf.loading import load
from star_attention.hf.shape import model_shape
from star_attention.planning import estimate
from star_attention.planning.cost import Flops
from star_attention.planning.estimate import Estimate
from star_attention.planning.hardware import Hardware, calibrate, parse_hardware
from star_attention.planning.model_shape import ModelShape
from star_attention.planning.plan import default_block_size, format_size, parse_size
from star_attention.tools import machine


def report(
    model: str,
    hardware: str,
    *,
    contexts: list[int],
    tail_tokens: int,
    ranks: list[int],
    block: str | None,
    dtype: str,
    tokens_per_forward: int | None,
    kv_dtype: str | None,
    calibrate: str | None,
    as_json: bool,
) -> str:
    """The estimates as a table for people, or as JSON; see `scale`.

    tail_tokens: of a query and its answer. block: a size, `quarter` (the quickest of blocks of a quarter of the context or more,
    the paper's rule for full accuracy), or None for the paper's default.
    """
    config = load.load_config(model)
    shape = model_shape(config, dtype)
    on = parse_hardware(hardware)
    forward = StarConfig(tokens_per_forward=tokens_per_forward).forward_size("cuda")
    fit: list[dict[str, float]] = []
    if calibrate is not None:
        on, fit = _calibrated(on, calibrate)
    found = [
        {
            scheme.scheme: scheme
            for scheme in _schemes(shape, on, length, count, block, forward, kv_dtype)
        }
        for length in contexts
        for count in ranks
    ]
    warn_of_positions(config, max(contexts) + tail_tokens)
    if as_json:
        rows = [
            {name: vars(one) | {"encode_s": one.encode_s} for name, one in schemes.items()}
            for schemes in found
        ]
        return json.dumps(
            {"model": model, "hardware": vars(on), "calibration": fit, "estimates": rows}
        )
    return _text(model, on, found, fit)


def _schemes(
    shape: ModelShape,
    on: Hardware,
    context: int,
    ranks: int,
    block: str | None,
    tokens_per_forward: int,
    kv_dtype: str | None,
) -> list[Estimate]:
    if block == QUARTER:
        best = estimate.best_block(
            shape,
            on,
            context=context,
            ranks=ranks,
            smallest=-(-context // 4),
            tokens_per_forward=tokens_per_forward,
        )
        size = best.block
    else:
        size = (
            default_block_size(context)
            if block is None
            else min(parse_size(block, "block_size"), context)
        )
    return [
        estimate.estimate(
            shape,
            on,
            scheme,
            context=context,
            ranks=ranks,
            block=size,
            tokens_per_forward=tokens_per_forward,
            kv_dtype=kv_dtype,
        )
        for scheme in estimate.SCHEMES
    ]


def _calibrated(on: Hardware, path: str) -> tuple[Hardware, list[dict[str, float]]]:
    """Rates from the JSON of `bench prefill`, and measured beside predicted seconds of each of its rows.

    Raises `InvalidInputError` for a file that is none.
    """
    found = machine.read_record(Path(path), "prefill")
    try:
        measured: list[tuple[dict[str, Any], Flops]] = [
            (row, Flops(linear=row["linear_flops"], attention=row["attention_flops"]))
            for row in found["rows"]
            if row["seconds"] is not None
            and row["method"] in ("dense", "star", "official")
            and not row.get("extrapolated")
        ]
        bandwidth = float(found["ceilings"]["bytes_per_s"])
    except (ValueError, KeyError, TypeError):
        raise InvalidInputError(
            f"{path} is not JSON of `bench prefill` as this version writes it"
        ) from None
    on = calibrate(on, [(flops, row["seconds"]) for row, flops in measured], bandwidth)
    return on, [
        {
            "method": row["method"],
            "context": row["context"],
            "block": row["block"],
            "measured_s": row["seconds"],
            "predicted_s": flops.linear / on.matrix + flops.attention / on.attention,
        }
        for row, flops in measured
    ]


def _text(
    model: str, on: Hardware, found: list[dict[str, Estimate]], fit: list[dict[str, float]]
) -> str:
    lines: list[tuple[str, ...]] = [
        (
            *(
                "context",
                "ranks",
                "block",
                "star s",
                "anchor local",
                "official",
                "ring",
                "plain ring",
            ),
            *("x ring", "x plain", "ms a token", "memory"),
        )
    ]
    for schemes in found:
        star = schemes["star"]
        others = [schemes[name] for name in ("star-local", "official", "ring", "ring-plain")]
        lines.append(
            (
                *(format_size(star.context), str(star.ranks), format_size(star.block or 0)),
                *(f"{one.encode_s:,.3g}" for one in (star, *others)),
                *(
                    f"{schemes[name].encode_s / star.encode_s:.2f}"
                    for name in ("ring", "ring-plain")
                ),
                f"{star.token_s * 1e3:,.3g}",
                in_bytes(star.memory) + ("" if star.fits else " (too much)"),
            )
        )
    rates = (
        f"{model} on {on.name}: linear layers {on.matrix / 1e12:,.4g} and attention {on.attention / 1e12:,.4g} TFLOP/s,"
        f" memory {on.bandwidth / 1e12:,.3g} TB/s, link {on.link / 1e9:,.4g} GB/s"
    )
    parts = [
        rates,
        "seconds of phase 1 by scheme; a token of an answer; memory of the fullest device\n"
        + table(lines),
    ]
    if fit:
        compared: list[tuple[str, ...]] = [
            ("method", "context", "block", "measured s", "predicted s", "error")
        ]
        for row in fit:
            error = row["predicted_s"] / row["measured_s"] - 1
            block = row["block"]
            compared.append(
                (
                    *(
                        str(row["method"]),
                        format_size(int(row["context"])),
                        format_size(int(block)) if block else "",
                    ),
                    *(f"{row['measured_s']:,.3g}", f"{row['predicted_s']:,.3g}", f"{error:+.1%}"),
                )
            )
        parts.append("calibrated on\n" + table(compared))
    return "\n\n".join(parts)
