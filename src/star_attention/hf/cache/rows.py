"""The cache of decode steps whose rows belong to different contexts and queries.

A row is one answer under way. It has a tail of its own in every layer, and reads the shard of its
context, which it may share with other rows. Rows come and go between forwards: each membership is a
`RowSet` of its own. The tokens of a query may take part as rows that share a tail.

Axes: R rows, G KV heads, H query heads, K keys, D head size. A forward has one new token per row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from star_attention.attention.attend import Rule, attend
from star_attention.attention.blocks import shard_attention
from star_attention.attention.latent import as_one_head, compressed_shard_attention
from star_attention.attention.state import State, empty_state, join_batches, merge
from star_attention.distributed.comm import Comm
from star_attention.errors import UnsupportedModelError
from star_attention.hf.cache.base import ForwardPosition, StarCache, StarLayer, by_token
from star_attention.hf.cache.decode import AnswerCache, own_heads, recent_rule, segment_rule
from star_attention.hf.cache.latent import Latents
from star_attention.hf.cache.packed_tails import Lengths, PackedTails
from star_attention.storage.kv import ContextKV, Feeder, LayerKV
from star_attention.storage.tail import Tail

_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True, eq=False)
class RowKV:
    """The keys and values of one row.

    Attributes:
        shard: those of its context.
        context_tokens: tokens of the whole context.
        tails: those of its query and answer, `[1, G, length, D]`, one tail for each cache layer. A
            layer that reads another layer's keys has an empty one.
        feeds: what brings the shard's layers from host memory, as long as it is kept.
        ahead: tokens between the tails' end and this row's token, those of rows before it. Only
            CUDA graphs serve such rows.
    """

    shard: ContextKV
    context_tokens: int
    tails: list[Tail]
    feeds: list[Feeder]
    ahead: int = 0

    @classmethod
    def of(cls, cache: AnswerCache, shard: ContextKV, number: int, rows: int) -> RowKV:
        """Take over a row of a cache, which is not to be used afterwards.

        Args:
            cache: the cache of a request that has read its queries.
            shard: the shard of that request.
            number: the row.
            rows: all rows of the cache.
        """
        padding = cache.row_padding(rows)[number]
        tails = [layer.tail.row(number, padding) for layer in cache.layers]
        return cls(shard=shard, context_tokens=cache.context_tokens, tails=tails, feeds=cache.feeds)

    @classmethod
    def of_all(
        cls, cache: AnswerCache, shard: ContextKV, numbers: list[int], rows: int, room: int
    ) -> list[RowKV]:
        """Take over rows of a cache, which is not to be used afterwards.

        Args:
            cache: the cache of a request that has read its queries.
            shard: the shard of that request.
            numbers: the rows; one may be taken over several times.
            rows: all rows of the cache.
            room: tokens that may follow before a row's tails move.
        """
        if numbers == [0] and rows == 1:
            return [cls.of(cache, shard, 0, 1)]
        padding = cache.row_padding(rows)
        tails = [layer.tail.rows(numbers, padding, room) for layer in cache.layers]
        return [
            cls(
                shard=shard,
                context_tokens=cache.context_tokens,
                tails=list(own),
                feeds=cache.feeds,
            )
            for own in zip(*tails, strict=True)
        ]

    @classmethod
    def of_whole(cls, cache: AnswerCache, shard: ContextKV) -> RowKV:
        """Return the only row of a cache, which goes on using it."""
        return cls(
            shard=shard,
            context_tokens=cache.context_tokens,
            tails=cache.tails,
            feeds=cache.feeds,
        )

    def of_next(self, tokens: int) -> list[RowKV]:
        """Return a row for each of the next tokens, which join these tails in one forward."""
        return [replace(self, ahead=ahead) if ahead else self for ahead in range(tokens)]

    def rewind(self, tail_tokens: int) -> None:
        """Drop what a forward that failed has stored: the tails keep this many tokens."""
        for tail in self.tails:
            # A layer that reads another layer's keys has no tail.
            tail.crop(max(0, tail.length - tail_tokens))

    @property
    def tail_tokens(self) -> int:
        """Tokens after the context."""
        return self.tails[0].length

    @property
    def position(self) -> int:
        """The position of the row's token."""
        return self.context_tokens + self.tails[0].length + self.ahead


def by_shard(rows: Sequence[RowKV]) -> list[int]:
    """Return the order in which rows of one shard are neighbors, and otherwise stay."""
    ranks: dict[ContextKV, int] = {}
    for row in rows:
        ranks.setdefault(row.shard, len(ranks))
    return sorted(range(len(rows)), key=lambda index: ranks[rows[index].shard])


class RowSet:
    """Rows that share decode forwards. A change of membership makes a new set.

    Args:
        rows: the rows, those of one shard next to each other.

    Attributes:
        groups: first row and the one after the last of each run of rows that read one shard.
    """

    def __init__(self, rows: Sequence[RowKV]) -> None:
        self.rows = list(rows)
        starts = [
            index
            for index, row in enumerate(self.rows)
            if index == 0 or row.shard is not self.rows[index - 1].shard
        ]
        self.groups = list(itertools.pairwise([*starts, len(self.rows)]))
        assert len({id(self.rows[start].shard) for start in starts}) == len(starts), (
            "rows of one shard are neighbors"
        )
        self._number = next(_numbers)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def version(self) -> tuple[int, int]:
        """A value that no other membership has, and that changes whenever a tail's buffers move."""
        # All tails of a row grow and move together; the first stands for them.
        return self._number, sum(row.tails[0].version for row in self.rows)


class RowsPosition(ForwardPosition):
    """Where each row's next token stands, and the ranks that share its context.

    With `by_heads` each rank computes queries, keys and values of its own heads alone.
    """

    def __init__(
        self, rows: RowSet, comm: Comm, *, by_heads: bool, latents: Latents | None
    ) -> None:
        super().__init__()
        self.rows, self.comm, self.by_heads, self.latents = rows, comm, by_heads, latents
        self.lengths = Lengths()

    @property
    def seen_tokens(self) -> int:
        # Of the longest row. Models take each row's position from the ids of positions.
        return max(row.position for row in self.rows.rows)


class RowsLayer(StarLayer[RowsPosition]):
    """A layer of many contexts, each read once for all of its rows, and of each row's tail."""

    def __init__(
        self, index: int, window: int | None, position: RowsPosition, stores: list[LayerKV]
    ) -> None:
        super().__init__(index, window, position, stores)
        self._packed: PackedTails | None = None
        self._is_packed = False
        self._latent = None if position.latents is None else position.latents[index]

    def set_expands(self, expands: bool) -> None:
        if expands and self._latent is None:
            raise UnsupportedModelError(
                "a layer", ["it computes keys and values from the stored ones"]
            )

    def append(self, k_RG1D: Tensor, v_RG1D: Tensor) -> tuple[Tensor, Tensor]:
        if not self.position.by_heads:
            self._store(k_RG1D, v_RG1D)
        # Those of the other heads come with their queries, in `attend`.
        return k_RG1D, v_RG1D

    def _store(self, k_RG1D: Tensor, v_RG1D: Tensor) -> None:
        tails = [row.tails[self.index] for row in self.position.rows.rows]
        if not self._is_packed or (self._packed is not None and self._packed.is_full):
            # Rows whose buffers were common before may hold those of rows that have left.
            self._packed = PackedTails.of(tails, self.position.lengths)
            self._is_packed = True
        if self._packed is not None:
            self._packed.append(k_RG1D, v_RG1D)
        else:
            for tail, *new in zip(tails, k_RG1D.split(1), v_RG1D.split(1), strict=True):
                tail.append(*new)

    def attend(self, q_R1HD: Tensor, k_R1GD: Tensor, v_R1GD: Tensor, rule: Rule) -> State:
        """Attend to this rank's shard of each context for its rows; merge over all ranks.

        The last rank attends to the rows' tails, too. With weights in slices, queries, keys and
        values are of this rank's heads, and so is the result.
        """
        rows, comm, heads = self.position.rows, self.position.comm, None
        if self.position.by_heads:
            heads = own_heads(comm, q_R1HD)
            q_R1HD, *pair = comm.gather_heads(q_R1HD, k_R1GD, v_R1GD)
            k_RG1D, v_RG1D = (tensor.transpose(1, 2) for tensor in pair)
            self._store(k_RG1D, v_RG1D)
        expansion = None if self._latent is None else self._latent.expansion()
        value_size = v_R1GD.shape[3]
        if self._latent is not None and expansion is not None:
            q_R1HD, value_size = expansion.absorb(q_R1HD), self._latent.compressed_size
        shards = join_batches(
            [
                self._attend_to_shard(q_R1HD[start:stop], value_size, rows.rows[start:stop], rule)
                for start, stop in rows.groups
            ]
        )
        states = [shards]
        if comm.cp_rank == comm.cp_size - 1:
            states.append(self._attend_to_tails(q_R1HD, rule))
        if expansion is not None:
            state = expansion.expand(merge(states), rule.dtype)
        else:
            state = merge(states, dtype=rule.dtype)
        return state if comm.cp_size == 1 else comm.merge(state, heads)

    def _attend_to_shard(
        self, q_R1HD: Tensor, value_size: int, rows: list[RowKV], rule: Rule
    ) -> State:
        shard = rows[0].shard
        layer = shard.layers[self.index]
        if not layer.segments:
            # A short context has none on this rank, and a window may be on others.
            R, _, H, _ = q_R1HD.shape
            return empty_state(R, 1, H, value_size, q_R1HD.device)
        k_1KGD, v_1KGD = by_token(layer.pair())
        over_segment = shard_attention if self._latent is None else compressed_shard_attention
        states, at = [], 0
        for start, stop in layer.segments:
            segment = slice(at, at + stop - start)
            at = segment.stop
            states.append(
                over_segment(
                    q_R1HD,
                    (k_1KGD[:, segment], v_1KGD[:, segment]),
                    rule=segment_rule(rule, shard.visible, start),
                    # The token of the forward is in the tail already.
                    offsets=[row.context_tokens + self._length(row) - 1 - start for row in rows],
                )
            )
        return merge(states)

    def _length(self, row: RowKV) -> int:
        return row.tails[self.index].length

    def _attend_to_tails(self, q_R1HD: Tensor, rule: Rule) -> State:
        rows = self.position.rows.rows
        rules = [recent_rule(rule, row.shard.visible) for row in rows]
        if self._packed is not None:
            windows, compressed = [near.window for near in rules], self._latent is not None
            return self._packed.attend(q_R1HD, rule, windows, compressed=compressed)
        states = []
        for q_11HD, row, near in zip(q_R1HD.split(1), rows, rules, strict=True):
            pair = by_token(row.tails[self.index].pair())
            if self._latent is not None:
                pair = as_one_head(*pair)
            states.append(attend(q_11HD, *pair, rule=near, offset=self._length(row) - 1))
        return join_batches(states)


class RowsCache(StarCache):
    """The cache of eager decode steps of many rows.

    Args:
        rows: the rows; none of their layers needs its keys expanded.
        windows: sliding window of each layer in tokens, None for full attention.
        comm: merges the attention of all ranks.
        slices: slices of the weights that forwards multiply, None for all of them.
        latents: of each layer the attention that need not expand what it stores; None for others.
    """

    position: RowsPosition

    def __init__(
        self,
        rows: RowSet,
        windows: list[int | None],
        comm: Comm,
        slices: Any = None,
        latents: Latents | None = None,
    ) -> None:
        by_heads = slices is not None and slices.by_heads
        position = RowsPosition(rows, comm, by_heads=by_heads, latents=latents)
        layers = [
            RowsLayer(index, window, position, _stores(rows, index))
            for index, window in enumerate(windows)
        ]
        super().__init__(layers, position, comm)
        self.slices = slices

    def begin(self, ids_BS: Tensor, positions_BS: Tensor, logits_to_keep: int) -> None:
        """Report this rank's progress, which other ranks name if it fails."""
        self.comm.tick(f"phase 2, a step of {len(ids_BS):,} rows")


def _stores(rows: RowSet, layer: int) -> list[LayerKV]:
    return [rows.rows[start].shard.layers[layer] for start, _ in rows.groups]
