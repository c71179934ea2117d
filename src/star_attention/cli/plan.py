"""`star-attention plan`: blocks, memory and operations of a context, before anything is loaded."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from star_attention.cli.options import (
    DEFAULT_BLOCK,
    QUARTER,
    AnchorSize,
    AnchorSource,
    Dtype,
    Json,
    KvDevice,
    KvDtype,
    Model,
    TensorParallel,
    TokensPerForward,
    option,
    sizes,
)
from star_attention.config import MAX_NEW_TOKENS, StarConfig
from star_attention.planning.plan import ANCHOR_SOURCES, BlockPlan, parse_size


def plan(
    model: Model,
    context: Annotated[
        str,
        option(
            "Tokens of context; with --hardware several, or a range of doublings: 128k..1m.",
            panel="Context",
            metavar="SIZE",
        ),
    ],
    dtype: Dtype = "auto",
    tokens_per_forward: TokensPerForward = None,
    block_size: Annotated[
        str | None,
        option(
            "Tokens encoded together; with --hardware also `quarter`: the quickest from a quarter of the context on.",
            panel="Context",
            metavar="SIZE",
            show_default=DEFAULT_BLOCK,
        ),
    ] = None,
    anchor_size: AnchorSize = None,
    ranks: Annotated[
        str,
        option(
            "Hosts that share the blocks; with --hardware several: 1..1024.",
            "--ranks",
            panel="Ranks",
            metavar="N",
        ),
    ] = str(BlockPlan.ranks),
    tensor_parallel: TensorParallel = 1,
    anchor_source: AnchorSource = ANCHOR_SOURCES[0],
    kv_dtype: KvDtype = None,
    kv_device: KvDevice = None,
    queries: Annotated[
        int, option("Queries on the context.", panel="Answer", metavar="N", min=1)
    ] = 1,
    query_tokens: Annotated[
        int, option("Tokens of a query.", panel="Answer", metavar="N", min=1)
    ] = 64,
    answer_tokens: Annotated[
        int, option("Tokens of an answer.", panel="Answer", metavar="N", min=1)
    ] = MAX_NEW_TOKENS,
    hardware: Annotated[
        str | None,
        option(
            "Estimate times on h200-nvlink, h200-ib, a100-nvlink, cpu-ethernet, or numbers (h200-ib,link=2e10).",
            "--hardware",
            panel="Hardware",
            metavar="NAME",
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        option(
            "Take the rates of linear layers, attention and memory from this JSON of `bench prefill`, and show how well they"
            " fit it.",
            "--calibrate",
            panel="Hardware",
            metavar="FILE",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how a context would be cut, what memory it takes and how many operations it costs.

    Reads the model's config.json and no weights. "dense" is ordinary attention over the whole context, "official" the
    scheme of the paper's own implementation, which encodes the anchor again for every block.

    With --hardware it estimates times instead, for star, its variants, and ring attention over the same ranks, one row for
    each length and number of ranks.

    Example: star-attention plan -m models/needle-17m --context 32k --ranks 4
    """
    if hardware is not None:
        from star_attention.cli import estimate

        StarConfig.of(tokens_per_forward=tokens_per_forward, kv_dtype=kv_dtype)
        if kv_device is not None:
            raise typer.BadParameter(
                "--hardware does not know how fast the host's memory is; leave it out",
                param_hint="--kv-device",
            )
        ignored = {
            "--anchor-size": anchor_size is not None,
            "--tensor-parallel": tensor_parallel != 1,
            "--queries": queries != 1,
        }
        for name in (name for name, given in ignored.items() if given):
            raise typer.BadParameter(
                "--hardware has no times for it; leave it out", param_hint=name
            )
        print(
            estimate.report(
                model,
                hardware,
                contexts=sizes(context, "context"),
                tail_tokens=query_tokens + answer_tokens,
                ranks=sizes(ranks, "ranks", of_ranks=True),
                block=block_size,
                dtype=dtype,
                tokens_per_forward=None
                if tokens_per_forward is None
                else parse_size(tokens_per_forward, "tokens_per_forward"),
                kv_dtype=kv_dtype,
                calibrate=calibrate,
                as_json=as_json,
            )
        )
        return
    if calibrate is not None:
        raise typer.BadParameter(
            "it needs --hardware, whose other numbers it keeps", param_hint="--calibrate"
        )
    if "," in context or ".." in context:
        raise typer.BadParameter(
            f"{context!r} is several lengths, which need --hardware; give one",
            param_hint="--context",
        )
    if block_size == QUARTER:
        raise typer.BadParameter(
            "'quarter' needs --hardware, by whose times it chooses; give a size",
            param_hint="--block-size",
        )
    if not ranks.isdecimal() or int(ranks) < 1:
        raise typer.BadParameter(
            f"{ranks!r} is not a number above 0 (several need --hardware)", param_hint="--ranks"
        )
    settings = StarConfig.of(
        block_size=block_size,
        anchor_size=anchor_size,
        tokens_per_forward=tokens_per_forward,
        anchor_source=anchor_source,
        kv_dtype=kv_dtype,
        kv_device=kv_device,
    )
    blocks = settings.plan(parse_size(context, "context"), int(ranks))

    from star_attention.cli.report import Report

    report = Report(
        model,
        blocks,
        dtype=dtype,
        tokens_per_forward=settings.tokens_per_forward,
        queries=queries,
        query_tokens=query_tokens,
        answer_tokens=answer_tokens,
        anchor_source=settings.anchor_source,
        tensor_parallel=tensor_parallel,
        kv_dtype=settings.kv_dtype,
        kv_device=settings.kv_device,
    )
    print(json.dumps(report.as_dict()) if as_json else report.as_text())
