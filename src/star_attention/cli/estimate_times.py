"""The numbers that `star-attention estimate` prints.

They are times of both phases for several lengths and numbers of ranks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from star_attention.cli.formatting import format_bytes, table
from star_attention.cli.model_facts import ModelRequest, read_model
from star_attention.cli.plan_costs import warn_beyond_positions
from star_attention.cli.sizes import QUARTER
from star_attention.config import StarConfig
from star_attention.errors import InvalidInputError
from star_attention.planning import estimate
from star_attention.planning.cost import Flops
from star_attention.planning.estimate import Estimate
from star_attention.planning.hardware import Hardware, calibrate, parse_hardware
from star_attention.planning.model_shape import ModelShape
from star_attention.planning.plan import BlockPlan
from star_attention.planning.sizes import format_size, parse_size

_MEASURED_METHODS = ("dense", "star", "official")
"""Methods of `bench prefill` that calibrate."""


@dataclass(frozen=True, kw_only=True)
class EstimateRequest:
    """The arguments of `estimate`.

    Attributes:
        model: folder, GGUF file or hub id.
        location: where in it the model is: arguments of `model_config.load_config`.
        dtype: dtype of the weights.
        hardware: a name in `HARDWARE`, or rates, for `parse_hardware`.
        contexts: lengths in tokens.
        ranks: numbers of ranks.
        block: a size, `QUARTER`, or None for the paper's rule.
        config: settings of the engine; its block size is not used.
        tail_tokens: length of a query and its answer.
        calibrate: path of JSON of `bench prefill`, whose rates replace those of the hardware.
        rope_scaling: rotary scaling in place of the config's (`--rope-scaling`).
        weights: precision of linear layers (`--weights`).
    """

    model: str
    location: dict[str, Any] = field(default_factory=dict)
    dtype: str
    hardware: str
    contexts: list[int]
    ranks: list[int]
    block: str | None
    config: StarConfig
    tail_tokens: int
    calibrate: str | None
    rope_scaling: str | None = None
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Estimates by scheme, one dict per length and number of ranks; `fit`: how they calibrate."""

    model: str
    hardware: Hardware
    schemes: list[dict[str, Estimate]]
    fit: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields of `--json`."""
        rows = [
            {name: asdict(row) | {"encode_s": row.encode_s} for name, row in schemes.items()}
            for schemes in self.schemes
        ]
        return {
            "model": self.model,
            "hardware": asdict(self.hardware),
            "calibration": self.fit,
            "estimates": rows,
        }

    def as_text(self) -> str:
        """Return the rates and the tables."""
        hardware = self.hardware
        rates = (
            f"{self.model} on {hardware.name}: linear layers {hardware.matrix / 1e12:,.4g} and"
            f" attention {hardware.attention / 1e12:,.4g} TFLOP/s,"
            f" memory {hardware.bandwidth / 1e12:,.3g} TB/s, link {hardware.link / 1e9:,.4g} GB/s"
        )
        times = (
            "phase 1 in seconds, by scheme; milliseconds per answer token, with weights whole and"
            " in slices; memory of the fullest device\n" + _estimate_table(self.schemes)
        )
        fit = ["calibrated on\n" + _fit_table(self.fit)] if self.fit else []
        return "\n\n".join([rates, times, *fit])


def make_estimates(request: EstimateRequest) -> Estimates:
    """Estimate every scheme for every length and number of ranks."""
    model = read_model(
        ModelRequest(
            model=request.model,
            location=request.location,
            dtype=request.dtype,
            weights=request.weights,
            rope_scaling=request.rope_scaling,
        )
    )
    shape = model.shape
    hardware, fit = _calibrated(
        parse_hardware(request.hardware).with_fp8(shape.quantized_share), request
    )
    schemes = [
        _schemes(shape, hardware, context, ranks, request)
        for context in request.contexts
        for ranks in request.ranks
    ]
    warn_beyond_positions(
        model.text_config,
        max(request.contexts) + request.tail_tokens,
        is_rescaled=request.rope_scaling is not None,
    )
    return Estimates(model=request.model, hardware=hardware, schemes=schemes, fit=fit)


def _schemes(
    shape: ModelShape, hardware: Hardware, context: int, ranks: int, request: EstimateRequest
) -> dict[str, Estimate]:
    forward = request.config.forward_size("cuda", ranks)

    def plan_of(block: int | None) -> BlockPlan:
        return replace(request.config, block_size=block).plan(context, ranks)

    if request.block == QUARTER:
        block = estimate.best_block(
            shape,
            hardware,
            plan_of,
            smallest=-(-context // 4),
            tokens_per_forward=forward,
            balance_ranks=request.config.balance_ranks,
        ).block
    else:
        block = None if request.block is None else parse_size(request.block, "block_size")
    plan = plan_of(block)
    return {
        scheme: estimate.estimate(
            shape,
            hardware,
            scheme,
            plan,
            tokens_per_forward=forward,
            kv_dtype=request.config.kv_dtype,
            kv_windows=request.config.kv_windows,
            balance_ranks=request.config.balance_ranks,
        )
        for scheme in estimate.SCHEMES
    }


def _calibrated(
    hardware: Hardware, request: EstimateRequest
) -> tuple[Hardware, list[dict[str, Any]]]:
    """Take rates from the JSON of `bench prefill`; return measured and predicted times as well.

    Raises:
        InvalidInputError: If the file is not such JSON, or of weights in another precision.
    """
    path = request.calibrate
    if path is None:
        return hardware, []
    from star_attention.tools import machine

    results = machine.read_record(Path(path), "prefill")
    if results.get("weights") != request.weights:
        raise InvalidInputError(
            f"{path} was measured with weights {results.get('weights') or 'as in the files'}, not"
            f" {request.weights or 'as in the files'}; give --weights as it was measured"
        )
    try:
        rows = [
            (row, Flops(linear=row["linear_flops"], attention=row["attention_flops"]))
            for row in results["rows"]
            if row["seconds"] is not None
            and row["method"] in _MEASURED_METHODS
            and not row.get("extrapolated")
        ]
        bandwidth = float(results["ceilings"]["bytes_per_s"])
    except (ValueError, KeyError, TypeError):
        raise InvalidInputError(
            f"{path} is not JSON of `bench prefill` as this version writes it; run it again"
        ) from None
    measured = [(flops, row["seconds"]) for row, flops in rows]
    hardware = calibrate(hardware, measured, bandwidth)
    return hardware, [
        {
            "method": row["method"],
            "context": row["context"],
            "block": row["block"],
            "measured_s": row["seconds"],
            "predicted_s": hardware.seconds(flops),
        }
        for row, flops in rows
    ]


def _estimate_table(schemes: list[dict[str, Estimate]]) -> str:
    heading = (
        "context",
        "ranks",
        "block",
        "star s",
        "anchor local",
        "official",
        "ring",
        "contiguous ring",
        "ring / star",
        "contiguous / star",
        "ms per token",
        "in slices",
        "memory",
    )
    return table([heading, *(_estimate_row(row) for row in schemes)])


def _estimate_row(schemes: dict[str, Estimate]) -> tuple[str, ...]:
    star, local, official, ring, contiguous = (
        schemes[name] for name in ("star", "star-local", "official", "ring", "ring-plain")
    )
    return (
        format_size(star.context),
        str(star.ranks),
        format_size(star.block or 0),
        *(f"{scheme.encode_s:,.3g}" for scheme in (star, local, official, ring, contiguous)),
        *(f"{scheme.encode_s / star.encode_s:.2f}" for scheme in (ring, contiguous)),
        f"{star.token_s * 1e3:,.3g}",
        "" if star.sliced_token_s is None else f"{star.sliced_token_s * 1e3:,.3g}",
        format_bytes(star.memory) + ("" if star.fits else " (too much)"),
    )


def _fit_table(fit: list[dict[str, Any]]) -> str:
    rows: list[tuple[str, ...]] = [
        ("method", "context", "block", "measured s", "predicted s", "error")
    ]
    for row in fit:
        rows.append(
            (
                row["method"],
                format_size(int(row["context"])),
                format_size(int(row["block"])) if row["block"] else "",
                f"{row['measured_s']:,.3g}",
                f"{row['predicted_s']:,.3g}",
                f"{row['predicted_s'] / row['measured_s'] - 1:+.1%}",
            )
        )
    return table(rows)
