"""The first forward of rows: their queries, in groups that read one context.

Axes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from star_attention.generation.batching.leading import Lead, Read
from star_attention.generation.batching.task import RowTask
from star_attention.hf.cache.decode import AnswerCache
from star_attention.hf.cache.rows import RowKV
from star_attention.hf.execution import second_look
from star_attention.hf.execution.graphs import BUCKETS
from star_attention.hf.execution.request import Program, Request
from star_attention.hf.execution.rows import kind_of
from star_attention.storage.oom import translate_oom
from star_attention.storage.transfers import send

_LEAST_TOKENS = BUCKETS[1]
"""Least tokens of a query that a CUDA graph reads. Steps of rows have graphs of their own: that of
a single token would be captured for a query of which a conversation kept all but the last one."""
_MOST_ROOM = 256
"""Most tokens of an answer for which a row has room beside the others of its group: rows that go on
leave what they have in common, and with it the memory of those that have ended."""
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
        elif kind_of(request.handle, request.shard, request.rope_length) is None:
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


@dataclass(frozen=True, kw_only=True)
class ReadRow:
    """What a row has on one rank once its query has been read.

    Attributes:
        kv: its keys and values.
        cache: the cache that read it, for a row whose forwards nobody shares; None for others.
    """

    kv: RowKV
    cache: AnswerCache | None


@dataclass(frozen=True, kw_only=True)
class ReadQueries:
    """Queries that have been read on one rank.

    Attributes:
        request: the request, over the context or, after a second look, a copy of it.
        logits_BV: logits of each query's next token, fp32; None on ranks other than 0.
        rows: the rows that answer them.
    """

    request: Request
    logits_BV: Tensor | None
    rows: list[ReadRow]


def read(request: Request, program: Program, rows: list[int]) -> ReadQueries:
    """Read queries on one context. Collective.

    Args:
        request: the queries, on this rank.
        program: how they are read, as rank 0 decides.
        rows: of each row the query that it answers; several may answer one.

    Raises:
        OutOfMemoryError: there is too little memory.
    """
    with translate_oom(lambda: _out_of_memory(request)):
        if program.second_look:
            request = second_look.look(request)
        cache = request.cache(program.padded_tokens, program.kept_tokens, program.max_new_tokens)
        logits_BV = None
        for ids_BS, positions_BS in request.forwards(cache):
            logits_BV = request.forward(ids_BS, positions_BS, cache)
        own = _taken(request, cache, rows, program.max_new_tokens)
    return ReadQueries(request=request, logits_BV=logits_BV, rows=own)


def _taken(
    request: Request, cache: AnswerCache, queries: list[int], max_new_tokens: int
) -> list[ReadRow]:
    """Return each row's part of what its group has read.

    Args:
        request: the group's request.
        cache: the group's cache.
        queries: each row's query.
        max_new_tokens: most tokens of an answer.
    """
    if kind_of(request.handle, request.shard, request.rope_length) is None:
        # The only row of its group.
        kv = RowKV.of_whole(cache, request.shard)
        return [ReadRow(kv=kv, cache=cache)]
    # Steps without CUDA graphs collect the tails in buffers of their own.
    room = 0 if request.handle.graphs is None else min(max_new_tokens, _MOST_ROOM)
    rows = RowKV.of_all(cache, request.shard, queries, len(request.queries), room)
    return [ReadRow(kv=kv, cache=None) for kv in rows]


@torch.no_grad()
def prefill(tasks: list[RowTask], lead: Lead) -> Tensor:
    """Read the queries of a group, and give each row its keys and values.

    Args:
        tasks: the rows.
        lead: tells the other ranks.

    Returns:
        The logits of each row's first token, fp32 `[R, V]`.

    Raises:
        OutOfMemoryError: there is too little memory.
    """
    # Several answers to a query read it once.
    queries: dict[int, int] = {}
    requests: list[Request] = []
    rows: list[int] = []
    for task in tasks:
        assert task.request is not None
        prompt = task.request.queries[0]
        if id(prompt) not in queries:
            queries[id(prompt)] = len(requests)
            requests.append(task.request)
        rows.append(queries[id(prompt)])
    request = replace(requests[0], queries=[each.queries[0] for each in requests])
    program = request.program(1, least_tokens=_LEAST_TOKENS)
    try:
        with lead.command(lambda: _command(tasks, program, rows)):
            done = read(request, program, rows)
    except BaseException:
        for task in tasks:
            # Other ranks may have them.
            lead.drop(task.number)
        raise
    with translate_oom(lambda: _out_of_memory(request)):
        for task, own in zip(tasks, done.rows, strict=True):
            task.answer.kept_tokens = program.kept_tokens
            _take_over(task, done.request, own)
        assert done.logits_BV is not None, "rank 0 has logits"
        return done.logits_BV[send(rows, done.logits_BV.device)]


def _command(tasks: list[RowTask], program: Program, rows: list[int]) -> Read:
    context, request = tasks[0].context, tasks[0].request
    assert context is not None and request is not None, "they have not ended"
    return Read(
        context=context.key,
        program=program,
        rows=[(task.number, query) for task, query in zip(tasks, rows, strict=True)],
        kept=None if request.kept is None else request.kept.key,
    )


def _take_over(task: RowTask, request: Request, own: ReadRow) -> None:
    """Give a row its part of what its group has read."""
    task.kv, task.cache = own.kv, own.cache
    task.kind = kind_of(request.handle, request.shard, request.rope_length)
    task.answer.looked = request.looked
    assert task.request is not None
    task.begin_text()
    task.request = replace(
        task.request, shard=request.shard, second_look=0.0, kept=None, kept_tokens=0
    )


def _out_of_memory(request: Request) -> str:
    context = len(request.context_ids_L)
    return (
        f"out of memory while reading a query of {request.query_tokens:,} tokens after"
        f" {context:,} context tokens: run fewer rows at once (max_rows), or lower"
        f" tokens_per_forward (now {request.tokens_per_forward:,})"
    )
