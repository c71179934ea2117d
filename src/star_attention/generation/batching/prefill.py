"""The first forward of rows: their queries, in groups that read one context.

Axes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from star_attention.generation.batching.task import RowTask
from star_attention.hf.cache.decode import AnswerCache
from star_attention.hf.cache.rows import RowKV
from star_attention.hf.execution import second_look
from star_attention.hf.execution.request import Request
from star_attention.hf.execution.rows import kind_of
from star_attention.storage.oom import translate_oom
from star_attention.storage.transfers import send

_MOST_PADDED = 1.5
"""Most tokens of a group, filler included, as a multiple of those of its queries."""


def groups_of(tasks: list[RowTask]) -> list[list[RowTask]]:
    """Group rows whose queries are read together: on one context, of about the same length."""
    same: dict[object, list[RowTask]] = {}
    for task in tasks:
        request = task.request
        assert request is not None
        key: object = id(request.shard), request.rope_length
        if request.second_look:
            # Its choice of tokens is for one query.
            key = id(request.queries[0])
        elif request.kept is not None:
            # What was kept begins one query.
            key = task.number
        elif kind_of(request.shard, request.rope_length) is None:
            key = task.number
        same.setdefault(key, []).append(task)
    return [group for each in same.values() for group in _by_length(each)]


def _by_length(tasks: list[RowTask]) -> Iterator[list[RowTask]]:
    group: list[RowTask] = []
    tokens = 0
    for task in sorted(tasks, key=lambda task: task.query_tokens):
        length = task.query_tokens
        if group and (len(group) + 1) * length > _MOST_PADDED * (tokens + length):
            yield group
            group, tokens = [], 0
        group.append(task)
        tokens += length
    if group:
        yield group


@torch.no_grad()
def prefill(tasks: list[RowTask]) -> Tensor:
    """Read the queries of a group, and give each row its keys and values.

    Returns:
        The logits of each row's first token, fp32 `[R, V]`.

    Raises:
        OutOfMemoryError: there is too little memory.
    """
    # Several answers to a query read it once.
    numbers: dict[int, int] = {}
    requests: list[Request] = []
    for task in tasks:
        assert task.request is not None
        if id(task.request.queries[0]) not in numbers:
            numbers[id(task.request.queries[0])] = len(requests)
            requests.append(task.request)
    request = replace(requests[0], queries=[each.queries[0] for each in requests])
    with translate_oom(lambda: _out_of_memory(request)):
        if request.second_look:
            request = second_look.look(request)
        program = request.program(1)
        cache = request.cache(program.padded_tokens, program.kept_tokens, program.max_new_tokens)
        for ids_BS, positions_BS in request.forwards(cache):
            logits_BV = request.forward(ids_BS, positions_BS, cache)
        assert logits_BV is not None
        rows = [numbers[id(query)] for query in _queries(tasks)]
        for number, task in zip(rows, tasks, strict=True):
            task.answer.kept_tokens = program.kept_tokens
            _take_over(task, request, cache, number, shares=rows.count(number) > 1)
    return logits_BV[send(rows, logits_BV.device)]


def _queries(tasks: list[RowTask]) -> list[list[int]]:
    return [task.request.queries[0] for task in tasks if task.request is not None]


def _take_over(
    task: RowTask, request: Request, cache: AnswerCache, number: int, *, shares: bool
) -> None:
    """Give a row its part of what its group has read.

    Args:
        task: the row.
        request: the group's request.
        cache: the group's cache.
        number: the row's query in it.
        shares: True if other rows answer the same query.
    """
    own = task.request
    assert own is not None
    task.begin_text()
    task.answer.looked = request.looked
    task.request = replace(own, shard=request.shard, second_look=0.0, kept=None, kept_tokens=0)
    task.kind = kind_of(request.shard, request.rope_length)
    if task.kind is None:
        # The only row of its group.
        task.cache = cache
        tails = [layer.tail for layer in cache.layers]
        task.kv = RowKV(shard=request.shard, context_tokens=cache.context_tokens, tails=tails)
    else:
        rows = len(request.queries)
        task.kv = RowKV.of(cache, request.shard, number, rows, shares=shares)


def _out_of_memory(request: Request) -> str:
    context = len(request.context_ids_L)
    return (
        f"out of memory while reading a query of {request.query_tokens:,} tokens after"
        f" {context:,} context tokens: run fewer rows at once (max_rows), or lower"
        f" tokens_per_forward (now {request.tokens_per_forward:,})"
    )
