"""`star-attention plan`: blocks, memory and operations of a context, before anything is loaded."""

from __future__ import annotations

import json
from typing import Annotated

from star_attention.cli.options import (
    AnchorSize,
    AnchorSource,
    BlockSize,
    Dtype,
    Json,
    Model,
    TensorParallel,
    TokensPerForward,
    option,
)
from star_attention.config import ANCHOR_SOURCES, MAX_NEW_TOKENS, StarConfig
from star_attention.plan import BlockPlan, parse_size


def plan(
    model: Model,
    context: Annotated[str, option("Tokens of context.", panel="Context", metavar="SIZE")],
    dtype: Dtype = "auto",
    tokens_per_forward: TokensPerForward = None,
    block_size: BlockSize = None,
    anchor_size: AnchorSize = None,
    ranks: Annotated[
        int, option("Hosts that share the blocks.", "--ranks", panel="Ranks", metavar="N", min=1)
    ] = BlockPlan.ranks,
    tensor_parallel: TensorParallel = 1,
    anchor_source: AnchorSource = ANCHOR_SOURCES[0],
    queries: Annotated[int, option("Queries on the context.", panel="Answer", metavar="N", min=1)] = 1,
    query_tokens: Annotated[int, option("Tokens of a query.", panel="Answer", metavar="N", min=1)] = 64,
    answer_tokens: Annotated[int, option("Tokens of an answer.", panel="Answer", metavar="N", min=1)] = MAX_NEW_TOKENS,
    as_json: Json = False,
) -> None:
    """Show how a context would be cut, what memory it takes and how many operations it costs.

    Reads the model's config.json and no weights. "dense" is ordinary attention over the whole context, "official" the
    scheme of the paper's own implementation, which encodes the anchor again for every block.

    Example: star-attention plan -m models/needle-17m --context 32k --ranks 4
    """
    sizes = StarConfig.of(
        block_size=block_size,
        anchor_size=anchor_size,
        tokens_per_forward=tokens_per_forward,
        anchor_source=anchor_source,
    )
    blocks = sizes.plan(parse_size(context, "context"), ranks)

    from star_attention.cli.report import Report

    report = Report(
        model,
        blocks,
        dtype=dtype,
        tokens_per_forward=sizes.tokens_per_forward,
        queries=queries,
        query_tokens=query_tokens,
        answer_tokens=answer_tokens,
        anchor_source=sizes.anchor_source,
        tensor_parallel=tensor_parallel,
    )
    print(json.dumps(report.as_dict()) if as_json else report.as_text())
