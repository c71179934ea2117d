"""The caches of a second look: one finds what a query attends to, one computes tokens again.

Axes: B batch (1 here), G KV heads, S tokens computed again, Q queries, K keys of the shard, F keys
that are seen from afar, H query heads, D head size.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import torch
from torch import Tensor

from star_attention.attention.attend import Rule
from star_attention.attention.mass import attention_mass
from star_attention.attention.scattered import Rows, attend_rows
from star_attention.attention.state import State, add_sink, empty_state, join_rows, merge
from star_attention.distributed.comm import Comm
from star_attention.hf.cache.base import (
    ForwardPosition,
    StarCache,
    StarLayer,
    build_layers,
    by_token,
)
from star_attention.hf.cache.decode import AnswerLayer, AnswerPosition, segment_rule
from star_attention.planning.plan import BlockPlan
from star_attention.planning.segments import Segments
from star_attention.storage.host.feed import feeds_of
from star_attention.storage.kv import ContextKV


@dataclass(kw_only=True)
class MassPosition(AnswerPosition):
    """The query, and the attention that each context token of the shard has got so far, `[K]`."""

    mass_K: Tensor


class MassLayer(AnswerLayer):
    """Attends as an answer does, and adds up the attention to each context token."""

    position: MassPosition

    def attend(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        state = super().attend(q_BQHD, k_BKGD, v_BKGD, rule)
        lse_BQH = (state if rule.sink_H is None else add_sink(state, rule.sink_H)).lse_BQH
        segments, _ = self.split(k_BKGD, v_BKGD)
        first_query, mass_K = self.first_query(q_BQHD.shape[1]), self.position.mass_K
        masses = [
            attention_mass(
                q_BQHD,
                keys,
                lse_BQH,
                rule=segment_rule(rule, self.position.visible, start),
                offset=first_query - start,
            )
            for (start, _), (keys, _) in zip(self.shard.segments, segments, strict=True)
        ]
        if masses:
            # A layer with a window may keep the last tokens of the shard alone.
            mass_K[-self.shard.tokens :] += torch.cat(masses).to(mass_K.device)
        return state


class MassCache(StarCache):
    """The cache of a query's forward that also finds what the query attends to.

    Args:
        shard: this rank's keys and values of the context.
        windows: sliding window of each layer in tokens, None for full attention.
        context_tokens: tokens of the whole context.
        comm: merges the attention of all ranks.
        device: where the mass is added up.
    """

    position: MassPosition

    def __init__(
        self,
        shard: ContextKV,
        windows: list[int | None],
        context_tokens: int,
        comm: Comm,
        device: torch.device,
    ) -> None:
        position = MassPosition(
            context_tokens=context_tokens,
            padding=[0],
            visible=shard.visible,
            comm=comm,
            mass_K=torch.zeros(shard.tokens, dtype=torch.float32, device=device),
        )
        self.feeds = feeds_of(shard)
        super().__init__(build_layers(MassLayer, windows, position, [shard]), position, comm)


def _stored(positions: list[int], segments: Segments) -> tuple[list[int], list[int]]:
    """Return the numbers of those positions that a rank stores, and their places in its buffers."""
    numbers: list[int] = []
    places: list[int] = []
    offsets = accumulate((stop - start for start, stop in segments), initial=0)
    for (start, stop), offset in zip(segments, offsets, strict=False):
        inside = range(bisect_left(positions, start), bisect_left(positions, stop))
        numbers += inside
        places += [positions[number] - start + offset for number in inside]
    return numbers, places


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Context tokens that one forward computes again, in increasing order.

    Each rank sends an equal number of them through the model, and gets the keys, values and queries
    of all.

    Attributes:
        rows: positions of the tokens.
        share: numbers of those of this rank's forward; the last one repeats where they run out.
        stored_S: numbers of those that are in this rank's shard; None for all.
        places_S: places of these in the buffers.
    """

    rows: Rows
    share: list[int]
    stored_S: Tensor | None
    places_S: Tensor

    @classmethod
    def of(
        cls, positions: list[int], segments: Segments, comm: Comm, device: torch.device
    ) -> Chosen:
        """Return tokens at these positions, as a rank with a shard of these segments sees them."""
        stored, places = _stored(positions, segments)
        stored_S, places_S = (
            torch.tensor(numbers, dtype=torch.int64, device=device) for numbers in (stored, places)
        )
        size, last = -(-len(positions) // comm.cp_size), len(positions) - 1
        first = comm.cp_rank * size
        return cls(
            rows=Rows(positions, device),
            share=[min(number, last) for number in range(first, first + size)],
            stored_S=None if len(stored) == len(positions) else stored_S,
            places_S=places_S,
        )


@dataclass(frozen=True, kw_only=True)
class Far:
    """Keys of a rank that tokens see from afar: the anchor's, and those of all chosen tokens.

    Attributes:
        positions: where they stand in the context, in increasing order.
        places_F: their places in the buffers.
    """

    positions: list[int]
    places_F: Tensor

    @classmethod
    def of(
        cls, chosen: list[int], anchor_size: int, segments: Segments, device: torch.device
    ) -> Far:
        """Return those of a rank with a shard of these segments."""
        seen = [*range(anchor_size), *chosen[bisect_left(chosen, anchor_size) :]]
        numbers, places = _stored(seen, segments)
        places_F = torch.tensor(places, dtype=torch.int64, device=device)
        return cls(positions=[seen[number] for number in numbers], places_F=places_F)


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What the tokens of a forward see in layers that do not look back, while others do.

    It is what they saw in phase 1, and all chosen tokens before them.

    Attributes:
        blocks: tokens of one block: which rows they are, their positions, and the block's start.
        limits: for each row the number of the last far key before its block, -1 for none.
    """

    blocks: list[tuple[slice, Rows, int]]
    limits: Rows

    @classmethod
    def of(cls, rows: Rows, block_size: int, far: Far) -> Sight:
        """Return what rows see."""
        starts = [at // block_size * block_size for at in rows.positions]
        blocks, first = [], 0
        for start, group in groupby(starts):
            part = slice(first, first + len(list(group)))
            blocks.append((part, Rows(rows.positions[part], rows.device), start))
            first = part.stop
        limits = [bisect_left(far.positions, start) - 1 for start in starts]
        return cls(blocks=blocks, limits=Rows(limits, rows.device))


@dataclass(kw_only=True)
class RenewPosition(ForwardPosition):
    """The tokens that the current forward computes again.

    Attributes:
        comm: the ranks.
        chosen: the tokens.
        last_index: number of the last layer.
        sees_all: for each layer, whether they see everything before them.
        far: keys of this rank that they see from afar in the others; None if there are no others.
        sight: what they see there, likewise; None before the first forward, too.
    """

    comm: Comm
    chosen: Chosen
    last_index: int
    sees_all: list[bool]
    far: Far | None
    sight: Sight | None = None

    def of_all(self, *own_BSHD: Tensor) -> list[Tensor]:
        """Return rows of all ranks, from tensors with those of each rank's share."""
        if self.comm.cp_size == 1:
            return list(own_BSHD)
        widths = [own.shape[2] * own.shape[3] for own in own_BSHD]
        parts = self.comm.cp_gather(torch.cat([own[0].flatten(1) for own in own_BSHD], 1))
        rows = parts.flatten(0, 1)[: len(self.chosen.rows.positions)].split(widths, 1)
        return [
            part.unflatten(1, own.shape[2:])[None] for part, own in zip(rows, own_BSHD, strict=True)
        ]

    def of_share(self, state: State) -> State:
        """Return the state of this rank's share, from that of all rows."""
        if self.comm.cp_size == 1:
            return state
        share_S = torch.tensor(self.chosen.share, device=state.lse_BQH.device)
        return State(state.out_BQHD[:, share_S], state.lse_BQH[:, share_S])


class RenewLayer(StarLayer[RenewPosition]):
    """Replaces keys and values of the tokens, which then attend to those before them."""

    def append(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        position, chosen = self.position, self.position.chosen
        k_BSGD, v_BSGD = position.of_all(*by_token((k_BGSD, v_BGSD)))
        if not self.kv.tokens:
            return k_BGSD, v_BGSD
        if chosen.stored_S is not None:
            stored_S = chosen.stored_S.to(k_BSGD.device)
            k_BSGD, v_BSGD = k_BSGD.index_select(1, stored_S), v_BSGD.index_select(1, stored_S)
        self.kv.replace(chosen.places_S, *(t[0].transpose(0, 1) for t in (k_BSGD, v_BSGD)))
        return self.kv.pair() if self.kv.expands else (k_BGSD, v_BGSD)

    def attend(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        position = self.position
        if self.index == position.last_index:
            # Nothing reads what the last layer returns: its keys and values are what counts.
            B, Q, H, _ = q_BQHD.shape
            return empty_state(B, Q, H, v_BKGD.shape[3], q_BQHD.device)
        (q_BQHD,) = position.of_all(q_BQHD)
        if self.kv.tokens and not self.kv.expands:
            k_BKGD, v_BKGD = by_token(self.kv.pair())
        if not self.kv.tokens:
            B, Q, H, _ = q_BQHD.shape
            state = empty_state(B, Q, H, v_BKGD.shape[3], q_BQHD.device)
        elif position.sees_all[self.index] or rule.window is not None:
            state = self._run(q_BQHD, k_BKGD, v_BKGD, rule, position.chosen.rows, 0)
        else:
            state = self._see(q_BQHD, k_BKGD, v_BKGD, rule)
        if position.comm.cp_size == 1:
            return state
        return position.of_share(position.comm.merge(state))

    def _see(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        """Attend to what `Sight` says, as far as it is in this rank's shard."""
        sight, far = self.position.sight, self.position.far
        assert sight is not None and far is not None
        exact = replace(rule, dtype=None)
        state = join_rows(
            [
                self._run(q_BQHD[:, part], k_BKGD, v_BKGD, exact, rows, first)
                for part, rows, first in sight.blocks
            ]
        )
        if sight.limits.positions[-1] < 0:
            return state
        keys, values = (t.index_select(1, far.places_F.to(t.device)) for t in (k_BKGD, v_BKGD))
        from_afar = attend_rows(q_BQHD, keys, values, rule=exact, rows=sight.limits, first_key=0)
        return merge([state, from_afar], dtype=rule.dtype)

    def _run(
        self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule, rows: Rows, first: int
    ) -> State:
        """Attend to the tokens of the shard from `first` up to each row's own position."""
        segments, states = self.kv.segments, []
        for start, stop in segments.within(first, rows.positions[-1] + 1):
            at = segments.offset(start)
            part = slice(at, at + stop - start)
            states.append(
                attend_rows(
                    q_BQHD, k_BKGD[:, part], v_BKGD[:, part], rule=rule, rows=rows, first_key=start
                )
            )
        if not states:
            B, Q, H, _ = q_BQHD.shape
            return empty_state(B, Q, H, v_BKGD.shape[3], q_BQHD.device)
        return merge(states, dtype=rule.dtype)


class RenewCache(StarCache):
    """The cache of forwards that compute some context tokens again.

    Args:
        shard: this rank's keys and values, which change.
        plan: blocks and anchor of the context.
        positions: positions of all tokens to compute again, in increasing order.
        windows: sliding window of each layer in tokens, None for full attention.
        comm: merges the attention of all ranks.
        device: where the tokens are.
    """

    position: RenewPosition

    def __init__(
        self,
        shard: ContextKV,
        plan: BlockPlan,
        positions: list[int],
        windows: list[int | None],
        comm: Comm,
        device: torch.device,
    ) -> None:
        self._segments, self._device = shard.segments, device
        self._block_size = plan.block_size
        # Where models combine what is far apart, and so in all layers if none looks back.
        sees_all = [not plan.lookback or lookback > 0 for lookback in plan.lookbacks(len(windows))]
        far = None
        if not all(sees_all):
            far = Far.of(positions, plan.anchor_size, shard.segments, device)
        position = RenewPosition(
            comm=comm,
            chosen=Chosen.of([], self._segments, comm, device),
            last_index=len(windows) - 1,
            far=far,
            sees_all=sees_all,
        )
        super().__init__(build_layers(RenewLayer, windows, position, [shard]), position, comm)

    def choose(self, positions: list[int]) -> list[int]:
        """Set the tokens of the next forward; return the positions of this rank's share."""
        chosen = Chosen.of(positions, self._segments, self.comm, self._device)
        self.position.chosen = chosen
        if self.position.far is not None:
            self.position.sight = Sight.of(chosen.rows, self._block_size, self.position.far)
        return [positions[number] for number in chosen.share]
