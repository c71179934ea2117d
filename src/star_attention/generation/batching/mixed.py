"""Decode steps that read queries, too: each token of a query is a row of the forward.

Rows of a query share its tail: every row appends its key, and then sees the tail up to its own
place. So a query that joins others costs no forward of its own, which would read all weights for
it.

Axes: R rows of the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from star_attention.generation.batching.task import RowTask
from star_attention.hf.cache.rows import RowKV, RowSet, by_shard
from star_attention.hf.execution.row_graphs import BUCKETS
from star_attention.hf.execution.rows import kind_of
from star_attention.storage.transfers import send

MOST_TOKENS = 128
"""Most query tokens of a step. Up to about as many rows a forward takes the time of reading the
weights; with more, the answers under way would wait for products that a forward of the query alone
computes as fast."""

MOST_ROWS = BUCKETS[-1]
"""Most rows of a forward: answers under way, and tokens of queries."""


def tokens_of(tasks: Sequence[RowTask]) -> int:
    """Return the tokens that are to be read for queries."""
    return sum(task.unread_tokens for task in tasks)


def may_join(tasks: Sequence[RowTask]) -> bool:
    """True if a step may read the queries of a group, as far as they are concerned."""
    requests = [task.request for task in tasks if task.request is not None]
    return (
        # Several answers to a query read it once, by themselves.
        len({id(request.queries[0]) for request in requests}) == len(tasks)
        and not any(request.second_look for request in requests)
        and not any(task.reads_alone for task in tasks)
        and tokens_of(tasks) <= MOST_TOKENS
    )


@dataclass(frozen=True, kw_only=True)
class MixedStep:
    """A forward of the newest tokens of rows, and of whole queries.

    Attributes:
        tasks: rows under way and those that begin, those of one context next to each other.
        kvs: their keys and values.
        rows: the rows of the forward.
        tokens_R: their tokens.
        wanted: of each task the row with its next logits.
    """

    tasks: list[RowTask]
    kvs: list[RowKV]
    rows: RowSet
    tokens_R: Tensor
    wanted: list[int]

    @classmethod
    def of(
        cls, tasks: Sequence[RowTask], tokens_R: Tensor, queries: Sequence[RowTask]
    ) -> MixedStep:
        """Arrange a forward; nothing has changed but the texts that the queries' rows begin with.

        Args:
            tasks: the rows under way.
            tokens_R: their newest tokens.
            queries: rows whose queries are to be read.
        """
        kvs = [task.kv for task in tasks if task.kv is not None]
        # Of each task, where its tokens are among those of the rows and then those of queries.
        places = [[at] for at in range(len(tasks))]
        new_tokens: list[int] = []
        for task in queries:
            first = len(tasks) + len(new_tokens)
            kv, tokens = _begun(task)
            kvs.append(kv)
            places.append(list(range(first, first + len(tokens))))
            new_tokens += tokens
        order = by_shard(kvs)
        rows: list[RowKV] = []
        wanted: list[int] = []
        for at in order:
            rows += kvs[at].of_next(len(places[at]))
            wanted.append(len(rows) - 1)
        device = tokens_R.device
        all_tokens = torch.cat([tokens_R, send(new_tokens, device)])
        every = [*tasks, *queries]
        return cls(
            tasks=[every[at] for at in order],
            kvs=[kvs[at] for at in order],
            rows=RowSet(rows),
            tokens_R=all_tokens[send([place for at in order for place in places[at]], device)],
            wanted=wanted,
        )

    def finish(self) -> None:
        """Give the rows that have begun their keys and values, after the forward."""
        for task, kv in zip(self.tasks, self.kvs, strict=True):
            request = task.request
            assert request is not None, "rows that have ended are not in a forward"
            if task.kv is None:
                task.answer.kept_tokens = request.kept_tokens
                task.request = replace(request, kept=None, kept_tokens=0)
                task.kind = kind_of(request.handle, request.shard, request.rope_length)
                task.kv = kv


def _begun(task: RowTask) -> tuple[RowKV, list[int]]:
    """Return keys and values for a row that begins, and the tokens of its query to be read."""
    request = task.request
    assert request is not None
    task.begin_text()
    cache = request.cache(task.query_tokens, request.kept_tokens, task.max_new_tokens)
    kv = RowKV.of_whole(cache, request.shard)
    return kv, request.queries[0][request.kept_tokens :]
