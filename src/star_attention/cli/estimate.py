"""`star-attention estimate`: times of a context on hardware that may not be available."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from star_attention.cli.config_options import ConfigOptions
from star_attention.cli.model_options import ShapeOptions, check_path
from star_attention.cli.options import Json, WorkloadOptions, option
from star_attention.cli.sizes import QUARTER, rank_counts, token_counts
from star_attention.config import DEFAULT_BLOCK_RULE, StarConfig
from star_attention.planning.plan import BlockPlan

HARDWARE_NAMES = ("h200-nvlink", "h200-ib", "a100-nvlink", "cpu-ethernet")
"""Keys of `planning.hardware.HARDWARE`, which only the command itself imports."""


SETTINGS = (
    "anchor_size",
    "lookback",
    "lookback_layers",
    "tokens_per_forward",
    "kv_dtype",
    "kv_windows",
    "balance_ranks",
)
"""Fields of `StarConfig` that estimates take into account, beside the block size."""


@dataclass(frozen=True, kw_only=True)
class HardwareOptions:
    """The hardware whose rates are assumed."""

    hardware: Annotated[
        str,
        option(
            f"{', '.join(HARDWARE_NAMES)}, or one of them with other rates (h200-ib,link=2e10).",
            "--hardware",
            panel="Hardware",
            metavar="NAME",
        ),
    ] = HARDWARE_NAMES[0]
    calibrate: Annotated[
        str | None,
        option(
            "JSON of `bench prefill`: use the measured rates of linear layers, attention and"
            " memory, and show how well they fit the measurements.",
            "--calibrate",
            panel="Hardware",
            metavar="FILE",
        ),
    ] = None


def estimate(
    *,
    shape: ShapeOptions,
    context: Annotated[
        str,
        option(
            "Tokens of the context; several as 128k,1m, or as a range of doublings: 128k..1m.",
            "--context",
            panel="Context",
            metavar="SIZES",
        ),
    ],
    block_size: Annotated[
        str | None,
        option(
            f"Tokens per block, or {QUARTER}: the fastest size of a quarter of the context or"
            " more.",
            "--block-size",
            panel="Context",
            metavar="SIZE",
            show_default=DEFAULT_BLOCK_RULE,
        ),
    ] = None,
    settings: Annotated[dict[str, Any], ConfigOptions(*SETTINGS)],
    ranks: Annotated[
        str,
        option(
            "Number of devices that share the context; several as 1,8, or as a range of"
            " doublings: 1..1024.",
            "--ranks",
            panel="Ranks",
            metavar="NUMBERS",
        ),
    ] = str(BlockPlan.ranks),
    on: HardwareOptions,
    workload: WorkloadOptions,
    as_json: Json = False,
) -> None:
    """Estimate the time to encode a context and to generate a token, on given hardware.

    Compares star, its variants and ring attention over the same ranks, with a row for each length
    and number of ranks. Reads the model's config.json, no weights, and needs no such hardware.

    Example: star-attention estimate -m models/needle-17m --context 4k..16k --ranks 1..4
    --hardware a100-nvlink
    """
    config = StarConfig.of(**settings)
    contexts, rank_numbers = token_counts(context, "context"), rank_counts(ranks)
    check_path(shape)

    from star_attention.cli.estimate_times import EstimateRequest, make_estimates

    estimates = make_estimates(
        EstimateRequest(
            model=shape.model,
            location=shape.location.kwargs(),
            dtype=shape.dtype,
            weights=shape.weights,
            rope_scaling=shape.rope_scaling,
            hardware=on.hardware,
            contexts=contexts,
            ranks=rank_numbers,
            block=block_size,
            config=config,
            tail_tokens=workload.query_tokens + workload.answer_tokens,
            calibrate=on.calibrate,
        )
    )
    print(json.dumps(estimates.as_dict()) if as_json else estimates.as_text())
