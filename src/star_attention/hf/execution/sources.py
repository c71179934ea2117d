"""What an answer attended to: one more forward of query and answer, once the answer has ended.

Axes: L context tokens, S tokens of a forward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from star_attention.hf.cache.second_look import MassCache
from star_attention.hf.execution.request import Request
from star_attention.hf.execution.second_look import mass_of_all_ranks


@dataclass(frozen=True, kw_only=True)
class Readings:
    """Texts after a context whose attention to it is wanted, as rank 0 tells it the other ranks.

    Attributes:
        neutral: token ids of a text that asks for nothing.
        rows: token ids before each query, which do not count, those of the query, and those of
            its answer.
        tokens_per_forward: most tokens of one forward.
    """

    neutral: list[int]
    rows: list[tuple[list[int], list[int], list[int]]]
    tokens_per_forward: int


def attention_of(request: Request, readings: Readings) -> list[Tensor]:
    """Return how much each answer attended to each context token. Collective.

    Half of it is a mean over the tokens of the query, the other half over those that the answer's
    were drawn from; both are summed over all heads and layers. Only what exceeds the attention of
    the neutral text counts: line ends get some whatever is asked. The first token does not count.

    Args:
        request: a request on the context.
        readings: the texts.

    Returns:
        fp32 `[L]` on the CPU for each row, at least 0.
    """
    request = replace(request, tokens_per_forward=readings.tokens_per_forward)
    request.comm.tick("phase 2, reading what answers attended to")
    (usual_L,) = _mean_attention(request, [readings.neutral])
    rows = []
    for before, query, answer in readings.rows:
        # An answer's first token was drawn from the query's last one.
        parts = [part for part in (query[:-1], [*query[-1:], *answer[:-1]]) if part]
        means = _mean_attention(request, parts, before)
        more_L = (sum(means[1:], means[0]) / len(means) - usual_L).clamp_(min=0.0)
        # It takes what is not needed elsewhere, which may be more than of a line break.
        more_L[0] = 0.0
        rows.append(more_L)
    with request.comm.waiting():
        return [row_L.cpu() for row_L in rows]


def _mean_attention(
    request: Request, parts: list[list[int]], before: list[int] | None = None
) -> list[Tensor]:
    """Return the attention of each part of a text after the context, fp32 `[L]` each.

    It is the mean over the part's tokens, and the sum over all heads and layers: the same bits on
    every rank. Tokens `before` the parts are read, too.
    """
    handle, context_tokens = request.handle, len(request.context_ids_L)
    cache = MassCache(request.shard, handle.windows, context_tokens, request.comm, handle.device)
    means = []
    for part in [before, *parts] if before else parts:
        cache.position.mass_K.zero_()
        for start in range(0, len(part), request.tokens_per_forward):
            ids = part[start : start + request.tokens_per_forward]
            ids_1S = torch.tensor([ids], device=handle.device)
            first = cache.seen_tokens
            positions_S = torch.arange(first, first + len(ids), device=handle.device)
            handle.encode(ids_1S, positions_S[None], cache, request.rope_length)
        means.append(mass_of_all_ranks(request, cache) / len(part))
    return means[-len(parts) :]
