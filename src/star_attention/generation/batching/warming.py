"""What the first answers of a batch would wait for: layers compiled and CUDA graphs captured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from star_attention.generation.batching.mixed import MOST_TOKENS
from star_attention.hf.execution.graphs import BUCKETS
from star_attention.hf.execution.row_graphs import BUCKETS as ROW_BUCKETS
from star_attention.planning.sizes import counted

_BLOCKS = 3
"""Blocks of a context after which forwards of its length are compiled."""
_SHORT = 64
"""Tokens of a context where nothing is compiled for its length."""
_ANSWER = 3
"""Tokens of an answer: the last ones come from steps alone."""


def warm_up(star: Any, max_rows: int, *, is_for_generate: bool = False) -> Iterator[str]:
    """Compile and capture what a batch needs, a piece at a time; yield the name of the next one.

    On a GPU these are forwards of a context in blocks of the size that is set, of queries, and of
    any number of rows. Elsewhere a short context and answer load what is loaded at first use.

    Args:
        star: the engine, on rank 0.
        max_rows: most rows of the batch.
        is_for_generate: True for answers of `star.generate`, too, whose steps are others.
    """
    runtime = star.runtime
    graphs, block_size = runtime.handle.graphs, star.config.block_size
    limit = runtime.positions.limit or 2**62
    lengths = [length for length in BUCKETS if length > 1] if graphs is not None else [1]
    tokens = _SHORT
    if runtime.handle.compiled is not None and block_size is not None:
        tokens = max(_SHORT, _BLOCKS * block_size)
    tokens = min(tokens, limit // 2)
    yield f"a context of {counted(tokens, 'token')}"
    with star.batch() as batch:
        context = batch.encode(_ids(star, tokens), progress=False).result()
        for length in lengths:
            if tokens + length + _ANSWER <= limit:
                yield f"a query of {counted(length, 'token')}"
                query = _ids(star, length)
                batch.add(context, query, max_new_tokens=_ANSWER, ignore_eos=True).result()
    if is_for_generate:
        yield "an answer by itself"
        star.generate(context, _ids(star, 1), max_new_tokens=_ANSWER, ignore_eos=True)
    if graphs is None:
        return
    if runtime.comm.size == 1:
        for key in graphs.of_rows.usual(context.kv, max_rows + MOST_TOKENS):
            yield f"steps of {counted(key[0], 'row')}, {key[1]} in a tile"
            graphs.of_rows.prepare(key, context.kv, runtime.comm)
        return
    # The other ranks capture their part in a step.
    for rows in (bucket for bucket in ROW_BUCKETS if bucket <= max_rows):
        yield f"steps of {counted(rows, 'row')}"
        with star.batch(max_rows=rows) as batch:
            for row in [
                batch.add(context, _ids(star, 1), max_new_tokens=2, ignore_eos=True)
                for _ in range(rows)
            ]:
                row.result()


def _ids(star: Any, tokens: int) -> Tensor:
    vocab_size: int = star.runtime.handle.vocab_size
    return torch.arange(1, tokens + 1, device="cpu") % vocab_size
