"""`star-attention plan`: blocks, memory and operations of a context, before anything is loaded."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from star_attention.cli.config_options import ConfigOptions
from star_attention.cli.estimate import SETTINGS, HardwareOptions, estimate
from star_attention.cli.model_options import ShapeOptions, TensorParallel, check_path
from star_attention.cli.options import Json, WorkloadOptions, option
from star_attention.cli.sizes import QUARTER
from star_attention.cli.streams import say
from star_attention.config import StarConfig
from star_attention.errors import quote
from star_attention.planning.advice import small_blocks
from star_attention.planning.plan import BlockPlan
from star_attention.planning.second_look import check_share
from star_attention.planning.sizes import parse_size

_ESTIMATE_SETTINGS = (*SETTINGS, "quality")
"""Settings that `plan --hardware` passes on."""
_NEEDLESS_SETTINGS = ("block_size", "anchor_source")
"""Others that it takes: an option of its own, and one of which both values are shown."""


@dataclass(frozen=True, kw_only=True)
class DeprecatedOptions:
    """`plan --hardware`, the former spelling of `estimate`. To be removed after one release."""

    hardware: Annotated[str | None, option("", "--hardware", panel="Hardware", hidden=True)] = None
    calibrate: Annotated[str | None, option("", "--calibrate", panel="Hardware", hidden=True)] = (
        None
    )


@dataclass(frozen=True, kw_only=True)
class PlanWorkloadOptions(WorkloadOptions):
    """The queries and answers whose memory and operations count."""

    queries: Annotated[
        int, option("Number of queries about the context.", panel="Workload", metavar="N", min=1)
    ] = 1
    second_look: Annotated[
        float,
        option(
            "Share of the context, 0 to 1, that is computed again for each query.",
            panel="Workload",
            metavar="SHARE",
            show_default="none",
        ),
    ] = 0.0


def plan(
    *,
    shape: ShapeOptions,
    context: Annotated[
        str, option("Tokens of the context.", "--context", panel="Context", metavar="SIZE")
    ],
    settings: Annotated[
        dict[str, Any],
        ConfigOptions(
            without=(
                "method",
                "reserve_tokens",
                "ring_layout",
                "allow_special_tokens",
                "slice_weights",
            )
        ),
    ],
    ranks: Annotated[
        str,
        option(
            "Number of context-parallel ranks, which share the blocks.",
            "--ranks",
            panel="Ranks",
            metavar="N",
        ),
    ] = str(BlockPlan.ranks),
    tensor_parallel: TensorParallel = 1,
    workload: PlanWorkloadOptions,
    deprecated: DeprecatedOptions,
    as_json: Json = False,
) -> None:
    """Show how a context is split into blocks, and the memory, operations and time it takes.

    Reads the model's config.json, no weights. "dense" is ordinary attention over the whole context;
    "official" is the paper's own implementation, which encodes the anchor again for every block.
    Times are predicted for one kind of GPU; `estimate` takes others, lists of lengths and of ranks
    (`plan --hardware` still runs it; that spelling is deprecated).

    Example: star-attention plan -m models/needle-17m --context 16k --ranks 4
    """
    if deprecated.hardware is not None:
        say("`plan --hardware` is deprecated and will be removed; use `star-attention estimate`")
        _check_estimate_options(
            settings,
            tensor_parallel=tensor_parallel,
            queries=workload.queries,
            second_look=workload.second_look or 1,
        )
        estimate(
            shape=shape,
            context=context,
            settings=_passed_on(settings),
            block_size=settings["block_size"],
            ranks=ranks,
            on=HardwareOptions(hardware=deprecated.hardware, calibrate=deprecated.calibrate),
            workload=workload,
            as_json=as_json,
        )
        return
    _check_plan_options(context, settings, ranks, deprecated)
    check_share(workload.second_look)
    config = StarConfig.of(**settings)
    tokens = parse_size(context, "context")
    blocks = config.plan(tokens, int(ranks))
    if warning := small_blocks(config.block_size, tokens):
        warnings.warn(warning, stacklevel=2)
    check_path(shape)

    from star_attention.cli.plan_costs import PlanRequest, plan_costs
    from star_attention.cli.plan_tables import costs_as_text

    costs = plan_costs(
        PlanRequest(
            model=shape.model,
            location=shape.location.kwargs(),
            dtype=shape.dtype,
            weights=shape.weights,
            rope_scaling=shape.rope_scaling,
            plan=blocks,
            config=config,
            tensor_parallel=tensor_parallel,
            queries=workload.queries,
            query_tokens=workload.query_tokens,
            answer_tokens=workload.answer_tokens,
            second_look=workload.second_look,
        )
    )
    print(json.dumps(costs.as_dict()) if as_json else costs_as_text(costs))


def _check_plan_options(
    context: str, settings: dict[str, Any], ranks: str, deprecated: DeprecatedOptions
) -> None:
    """Refuse values that only `estimate` takes."""
    if deprecated.calibrate is not None:
        raise typer.BadParameter(
            "`plan` has no times; use `star-attention estimate`", param_hint="--calibrate"
        )
    if "," in context or ".." in context:
        raise typer.BadParameter(
            f"{quote(context)} has several lengths; give one, or use `star-attention estimate`",
            param_hint="--context",
        )
    if settings["block_size"] == QUARTER:
        raise typer.BadParameter(
            f"{QUARTER!r} chooses by time; give a size, or use `star-attention estimate`",
            param_hint="--block-size",
        )
    if not ranks.isdecimal() or int(ranks) < 1:
        raise typer.BadParameter(
            f"{quote(ranks)} is not a number above 0; `star-attention estimate` takes several",
            param_hint="--ranks",
        )


def _check_estimate_options(settings: dict[str, Any], **others: float) -> None:
    """Refuse options that estimates do not take into account."""
    StarConfig.of(**_passed_on(settings))
    ignored = [name for name, value in others.items() if value != 1]
    defaults = StarConfig()
    ignored += [
        name
        for name, value in settings.items()
        if name not in (*_ESTIMATE_SETTINGS, *_NEEDLESS_SETTINGS)
        and value not in (None, str(getattr(defaults, name)))
    ]
    for name in ignored:
        raise typer.BadParameter(
            "estimates do not take it into account; leave it out",
            param_hint="--" + name.replace("_", "-"),
        )


def _passed_on(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that `estimate` takes."""
    return {name: settings[name] for name in _ESTIMATE_SETTINGS if name in settings}
