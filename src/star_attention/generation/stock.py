"""Decoding by transformers' own loops (beams, assisted): rank 0 runs them, the others repeat.

Axes: B queries, S tokens of a forward.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from star_attention.distributed.messages import END, SOURCES
from star_attention.hf.cache.decode import AnswerCache
from star_attention.hf.cache.mirrored import Mirror
from star_attention.hf.execution import second_look, sources
from star_attention.hf.execution.finite import FiniteCheck
from star_attention.hf.execution.processing import CACHE_ARGUMENT
from star_attention.hf.execution.request import Request, follow_forward

LOOK = "look"
"""Kind of the message with which rank 0 begins a second look."""


def look(request: Request) -> Request:
    """Return a request after its second look, in which the other ranks take part."""
    if request.comm.size > 1:
        decided = request.queries, request.tokens_per_forward, request.second_look
        request.comm.broadcast_object((LOOK, *decided))
    return second_look.look(request)


def stock(request: Request) -> list[list[int]]:
    """Answer by transformers' own decoding loop (beams, assisted).

    Queries of different lengths run one after another: padding would lie inside the text that
    penalties look at. So do queries that are sampled with a seed, which is for each of them.

    Returns:
        The new tokens of each row.
    """
    options, defaults = request.generation_kwargs, request.handle.model.generation_config
    # transformers drafts for one row only, and draws from one generator.
    is_drafted = options.get("prompt_lookup_num_tokens") is not None
    is_seeded = request.seed is not None and options.get("do_sample", defaults.do_sample)
    is_alone = is_drafted or is_seeded
    groups: dict[Any, list[int]] = {}
    for index, query in enumerate(request.queries):
        groups.setdefault(index if is_alone else len(query), []).append(index)
    rows: dict[int, list[list[int]]] = {}
    for indices in groups.values():
        new_rows = _stock(replace(request, queries=[request.queries[index] for index in indices]))
        answers = len(new_rows) // len(indices)
        for i, index in enumerate(indices):
            rows[index] = new_rows[i * answers : (i + 1) * answers]
    return [row for index in range(len(request.queries)) for row in rows[index]]


def _stock(request: Request) -> list[list[int]]:
    cache = request.mirrored_cache()
    # All queries have one length here, so there is no filler.
    ids_BS = request.text()
    mask_BS = torch.ones_like(ids_BS)
    # Where rotary frequencies depend on the length, some models drop the cache by the ids' length:
    # they get the query alone.
    ids_BS = ids_BS[:, -request.prompt_tokens :]
    criteria = list(request.stopping_criteria or [])
    if request.stop_after is not None:
        criteria.append(request.stop_after(request.prompt_tokens))
    processors = [FiniteCheck(request.handle), *(request.logits_processor or [])]
    devices = [ids_BS.device] if ids_BS.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=request.seed is not None):
        if request.seed is not None:
            torch.manual_seed(request.seed)
        whole = request.prompt_tokens if request.rope_length is None else None
        with request.handle.generating(cache, request.rope_length, whole) as model:
            sequences: Tensor = model.generate(
                ids_BS,
                attention_mask=mask_BS,
                **{CACHE_ARGUMENT: cache},
                **request.generation_kwargs,
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=StoppingCriteriaList(criteria),
            )
    rows: list[list[int]] = sequences[:, request.prompt_tokens :].tolist()
    config = request.handle.model.generation_config
    pad = request.generation_kwargs.get("pad_token_id", config.pad_token_id)
    eos = request.generation_kwargs.get("eos_token_id", config.eos_token_id)
    ends = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    return [_without_fill(row, {-1, pad} - ends) for row in rows]


def _without_fill(row: list[int], fill: set[int | None]) -> list[int]:
    """Cut a row where it ended: transformers pads rows that a criterion ends before the others."""
    length = len(row)
    while length > 1 and row[length - 1] in fill:
        length -= 1
    return row[:length]


def follow(request: Request) -> Any:
    """Repeat rank 0's forwards and its changes of the cache until the end of the call.

    Args:
        request: the context on this rank; rank 0 sends the queries.

    Returns:
        The answers, from rank 0's last message.
    """

    def new_cache(padding: list[int], sliced: tuple[str, ...]) -> AnswerCache:
        return replace(request, sliced=sliced).cache_for(padding)

    def forward(
        cache: AnswerCache, ids_BS: Tensor, positions_BS: Tensor, logits_to_keep: int
    ) -> None:
        handle = request.handle
        ids_BS, positions_BS = ids_BS.to(handle.device), positions_BS.to(handle.device)
        rope_length = request.rope_length
        follow_forward(handle, ids_BS, positions_BS, cache, rope_length, logits_to_keep)

    mirror = Mirror(new_cache, forward)
    while True:
        kind, *arguments = request.comm.receive_object()
        if kind == END:
            return arguments[1]
        if kind == SOURCES:
            sources.attention_of(request, arguments[1])
        elif kind == LOOK:
            queries, tokens, share = arguments
            request = second_look.look(
                replace(request, queries=queries, tokens_per_forward=tokens, second_look=share)
            )
        else:
            mirror.run(kind, *arguments)
