"""A second look: what a query attends to most is computed again, with the rest of it in sight.

The context that others ask stays as it is: the tokens are replaced in a copy of it, over which this
query alone is answered.

Axes: L context tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from star_attention.hf.cache.second_look import MassCache, RenewCache
from star_attention.hf.execution.request import Request
from star_attention.hf.execution.sampling import AsyncCopy
from star_attention.hf.execution.timing import Lap
from star_attention.planning.second_look import NEIGHBORS, chosen_tokens
from star_attention.storage.kv import ContextKV
from star_attention.storage.oom import translate_oom


def look(request: Request) -> Request:
    """Return a request for the same answers over a copy of its context. Collective.

    In the copy the share `request.second_look` of the context's tokens is computed again: those
    that the query attends to most.

    Args:
        request: a request with one query.

    Raises:
        OutOfMemoryError: there is no room for the copy.
    """
    lap = Lap(request.handle.device)
    with translate_oom(lambda: _out_of_memory(request)):
        request.comm.tick("phase 2, choosing tokens for a second look")
        positions = _chosen(request, _mass(request))
        shard = request.shard.copied(request.shard.segments, request.shard.segments)
        _renew(request, shard, positions)
    lap.stop()
    return replace(request, shard=shard, second_look=0.0, looked=lap)


def _out_of_memory(request: Request) -> str:
    return (
        f"out of memory with second_look {request.second_look}, which takes one more copy of the"
        f" context ({request.shard.nbytes:,} bytes on rank {request.comm.rank}): leave it out, keep"
        " the context in fp8 (kv_dtype) or in host memory (kv_device), or lower tokens_per_forward"
        f" (now {request.tokens_per_forward:,})"
    )


def _renew(request: Request, shard: ContextKV, positions: list[int]) -> None:
    """Compute tokens again, and replace their keys and values in a rank's shard."""
    handle, comm, size = request.handle, request.comm, request.tokens_per_forward
    cache = RenewCache(shard, request.plan, positions, handle.windows, comm, handle.device)
    for start in range(0, len(positions), size):
        part = positions[start : start + size]
        place = f"{start:,} to {start + len(part):,} of {len(positions):,} tokens"
        comm.tick(f"phase 2, second look, {place}")
        positions_S = torch.tensor(cache.choose(part), device="cpu")
        ids_1S = request.context_ids_L[positions_S][None].to(handle.device)
        handle.encode(ids_1S, positions_S[None].to(handle.device), cache, request.rope_length)


def _mass(request: Request) -> Tensor:
    """Return the attention that each context token gets from the query, fp32 `[L]`.

    It is summed over the query's tokens, all heads and all layers: the same bits on every rank.
    """
    handle, comm, context_tokens = request.handle, request.comm, len(request.context_ids_L)
    assert len(request.queries) == 1, "each query has its own choice"
    cache = MassCache(request.shard, handle.windows, context_tokens, comm, handle.device)
    for ids_1S, positions_1S in request.query_forwards([0]):
        handle.encode(ids_1S, positions_1S, cache, request.rope_length)
    return mass_of_all_ranks(request, cache)


def mass_of_all_ranks(request: Request, cache: MassCache) -> Tensor:
    """Return the attention that each context token has got through each rank's cache, fp32 `[L]`.

    All ranks have the same bits. Collective.
    """
    comm, context_tokens = request.comm, len(request.context_ids_L)
    mass_K = comm.tp_sum(cache.position.mass_K)
    if comm.cp_size == 1 and len(mass_K) == context_tokens:
        return mass_K
    mass_L = mass_K.new_zeros(context_tokens)
    lengths = [stop - start for start, stop in request.shard.segments]
    for (start, stop), part in zip(request.shard.segments, mass_K.split(lengths), strict=True):
        mass_L[start:stop] = part
    return mass_L if comm.cp_size == 1 else comm.cp_sum(mass_L)


def _chosen(request: Request, mass_L: Tensor) -> list[int]:
    """Return the positions of the tokens with most attention around them, in increasing order."""
    count = chosen_tokens(request.second_look, len(mass_L))
    smooth_L = avg_pool1d(mass_L[None, None], NEIGHBORS, 1, NEIGHBORS // 2)[0, 0]
    # Stable: of equals the first ones.
    order_L = smooth_L.sort(descending=True, stable=True).indices
    copied = AsyncCopy(order_L[:count].sort().values)
    with request.comm.waiting():
        return copied.wait()
