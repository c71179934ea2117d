"""transformers caches over our store: `EncodeCache` writes a context (phase 1), `AnswerCache` reads it (phase 2).

transformers calls `update` on a layer and then the attention function with, as a rule, the very tensors that `update`
returned. So a cache here knows which of its layers an attention call belongs to, and computes it.

Axes: B batch, G KV heads, S new tokens, Q queries, H query heads, D head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from star_attention.attention.attend import Rule
from star_attention.attention.blocks import KV, block_attention, shard_attention, tail_attention
from star_attention.attention.state import State, empty_state, merge
from star_attention.distributed.comm import Comm
from star_attention.errors import UnsupportedModelError
from star_attention.planning.plan import BlockPlan, Span
from star_attention.storage.kv import ContextKV, KVFormat, LayerKV, Tail, VisibleRange


def _by_token(pair: tuple[Tensor, Tensor]) -> KV:
    """`[B, G, L, D]` as `[B, L, G, D]`, without a copy."""
    return pair[0].transpose(1, 2), pair[1].transpose(1, 2)


class _Place:
    """Where the current forward stands: shared by a cache and its layers.

    (Layers do not know their cache: a cycle would keep a context's memory until the garbage collector comes by.)
    """

    last: int | None = None  # index of the layer whose `update` ran last

    @property
    def seen_tokens(self) -> int:
        """Tokens before the current forward: where its first position stands."""
        raise NotImplementedError


class _StarLayer(CacheLayerMixin):
    is_compileable = False
    is_croppable = True
    is_sliding = False  # windows are our own business: the store keeps absolute positions
    supports_early_init = False

    def __init__(self, index: int, place: _Place, window: int | None) -> None:
        super().__init__()
        self.index = index
        self.place: Any = place
        self.window = window
        # Weak, so that a forward's keys do not outlive the attention that reads them.
        self._returned: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None
        self.returned_tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        k_BGKD, v_BGKD = self.keep(key_states, value_states)
        self._returned = weakref.ref(k_BGKD), weakref.ref(v_BGKD)
        self.returned_tokens = k_BGKD.shape[2]
        self.place.last = self.index
        return k_BGKD, v_BGKD

    def handed_out(self, key: Tensor, value: Tensor) -> bool:
        """Whether these are the very tensors that the last `update` returned."""
        return (
            self._returned is not None
            and key is self._returned[0]()
            and value is self._returned[1]()
        )

    def keep(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keep new keys and values, and return what the model's attention is to be called with."""
        raise NotImplementedError

    def attend(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        """Attention of the forward's queries, given the keys that `keep` returned (or their expansion)."""
        raise NotImplementedError

    @property
    def kv(self) -> LayerKV:
        raise NotImplementedError

    def learn(self, *, expands: bool) -> None:
        """Note whether this layer's attention computes its keys and values from what is kept."""
        self.kv.expands = expands

    def get_seq_length(self) -> int:
        seen: int = self.place.seen_tokens
        return seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class StarCache(Cache):
    """What both phases share: finding the layer that an attention call belongs to."""

    layers: list[Any]

    # (Where layers are compiled, kv_format and attending stay outside.)
    update = torch.compiler.disable(Cache.update)

    def __init__(self, layers: list[Any], place: _Place, comm: Comm) -> None:
        super().__init__(layers=layers)
        self.place: Any = place
        self.comm = comm
        self.calls = 0
        self.entered = 0  # the layer that runs, where layers are compiled whole

    def begin(self, ids_BS: Tensor, positions_BS: Tensor, keep: int) -> None:
        """Called in front of each forward of the whole model; `keep` as in `ModelHandle.logits`."""

    @property
    def seen_tokens(self) -> int:
        """Tokens before the current forward."""
        seen: int = self.place.seen_tokens
        return seen

    def attend(self, module: Any, q_BQHD: Tensor, key: Tensor, value: Tensor, rule: Rule) -> State:
        """Attention of one layer; `key` and `value` are `[B, G, K, D]` as the model handed them over."""
        layer = self._layer_of(module, key, value)
        self.calls += 1
        self.comm.tick()
        rule = rule if rule.window is not None else replace(rule, window=layer.window)
        return layer.attend(q_BQHD, *_by_token((key, value)), rule)

    def _layer_of(self, module: Any, key: Tensor, value: Tensor) -> _StarLayer:
        assert self.place.last is not None, "attention before any update of the cache"
        last: _StarLayer = self.layers[self.place.last]
        if last.handed_out(key, value):
            if last.kv.expands is None:
                last.learn(expands=False)
            return last
        for layer in self.layers:  # KV sharing: a later layer attends to what an earlier one kept
            if layer.handed_out(key, value):
                return layer  # type: ignore[no-any-return]
        # Neither: the layer computed its keys or values from what the cache keeps (MLA).
        index = getattr(module, "layer_idx", None)
        if index not in (None, last.index) or key.shape[2] != last.returned_tokens:
            raise UnsupportedModelError(
                type(module).__name__,
                [
                    f"layer {index} attends to keys that did not come from its cache layer ({tuple(key.shape)})"
                ],
            )
        last.learn(expands=True)
        return last


def _together(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Those of all contexts of a batch."""
    keys, values = zip(*pairs, strict=True)
    return (keys[0], values[0]) if len(keys) == 1 else (torch.cat(keys), torch.cat(values))


class AnchorLink:
    """How the anchor's keys and values come from rank 0 to ranks whose shard does not hold them (phase 1)."""

    def kept(self, layer: int, span: Span, k_BGSD: Tensor, v_BGSD: Tensor) -> None:
        """A layer has kept what a forward computed."""

    def needed(self, layer: int) -> None:
        """A layer is about to read the anchor; returns when it is there."""


class SpanPlace(_Place):
    """Of a cache that encodes a plan's context one span after another."""

    def __init__(self, plan: BlockPlan) -> None:
        self.plan = plan
        self.span = Span(start=0, stop=0, block_start=0)

    @property
    def seen_tokens(self) -> int:
        return self.span.start


class SpanCache(StarCache):
    """Phase 1, one `span` a forward; its layers write into `stores`, one for each context of a batch."""

    place: SpanPlace

    @property
    def span(self) -> Span:
        """What the current forward encodes."""
        return self.place.span

    @span.setter
    def span(self, span: Span) -> None:
        self.place.span = span

    @property
    def bytes_per_token(self) -> int:
        """Bytes of what is kept so far, for each token of all contexts."""
        stores = [store for layer in self.layers for store in layer.stores]
        held: int = self.layers[0].kv.tokens
        return sum(int(store.nbytes) for store in stores) // max(1, held)


class _EncodePlace(SpanPlace):
    def __init__(self, plan: BlockPlan, link: AnchorLink) -> None:
        super().__init__(plan)
        self.link = link


class EncodeLayer(_StarLayer):
    place: _EncodePlace

    def __init__(
        self,
        index: int,
        place: _EncodePlace,
        window: int | None,
        stores: list[LayerKV],
        anchors: list[LayerKV],
    ) -> None:
        super().__init__(index, place, window)
        self.stores = stores  # one per context of the batch
        self.anchors = anchors  # the same, or where the anchor is when the shard does not hold it

    @property
    def kv(self) -> LayerKV:
        return self.stores[0]

    def learn(self, *, expands: bool) -> None:
        for store in (*self.stores, *self.anchors):
            store.expands = expands

    def _home(self, position: int) -> list[LayerKV]:
        return self.stores if self.stores[0].holds(position) else self.anchors

    def _stored(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return _together(store.slice(start, stop) for store in self._home(start))

    def _anchor(self) -> tuple[Tensor, Tensor]:
        self.place.link.needed(self.index)
        return _together(store.slice(0, self.place.plan.anchor_size) for store in self.anchors)

    def keep(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        span, plan = self.place.span, self.place.plan
        home = self._home(span.start)
        for store, k_GSD, v_GSD in zip(home, k_BGSD, v_BGSD, strict=True):
            store.write(span.start, k_GSD, v_GSD)
        tokens = min(span.stop, plan.anchor_size) - span.start
        if home is self.stores and self.anchors is not self.stores and tokens > 0:
            for store, k_GSD, v_GSD in zip(self.anchors, k_BGSD, v_BGSD, strict=True):
                store.write(span.start, k_GSD[:, :tokens], v_GSD[:, :tokens])
        self.place.link.kept(self.index, span, k_BGSD, v_BGSD)
        if not self.kv.expands or span.start == 0:
            return k_BGSD, v_BGSD
        parts = [(k_BGSD, v_BGSD)]
        if span.start > span.block_start:
            parts.insert(0, self._stored(span.block_start, span.start))
        if span.block_start > 0 and plan.anchor_size:
            parts.insert(0, self._anchor())
        return torch.cat([k for k, _ in parts], 2), torch.cat([v for _, v in parts], 2)

    def attend(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        span, plan = self.place.span, self.place.plan
        anchor = earlier = None
        needs_anchor = span.block_start > 0 and plan.anchor_size > 0
        needs_earlier = span.start > span.block_start
        if self.kv.expands and span.start > 0:
            a = plan.anchor_size if needs_anchor else 0
            e = a + span.start - span.block_start
            anchor = (k_BKGD[:, :a], v_BKGD[:, :a]) if needs_anchor else None
            earlier = (k_BKGD[:, a:e], v_BKGD[:, a:e]) if needs_earlier else None
            k_BKGD, v_BKGD = k_BKGD[:, e:], v_BKGD[:, e:]
        else:
            anchor = _by_token(self._anchor()) if needs_anchor else None
            earlier = (
                _by_token(self._stored(span.block_start, span.start)) if needs_earlier else None
            )
        return block_attention(
            q_BQHD,
            (k_BKGD, v_BKGD),
            anchor=anchor,
            earlier=earlier,
            start=span.start,
            block_start=span.block_start,
            block_size=plan.block_size,
            anchor_size=plan.anchor_size,
            rule=rule,
        )


class EncodeCache(SpanCache):
    """Phase 1: each forward is one `span` of the plan, for one context or several of equal length.

    anchors: where the anchor is kept on ranks whose shard does not hold it, or not as it was computed; link: how it gets there.
    """

    def __init__(
        self,
        plan: BlockPlan,
        stores: list[ContextKV],
        windows: list[int | None],
        comm: Comm,
        *,
        anchors: list[ContextKV] | None = None,
        link: AnchorLink | None = None,
    ) -> None:
        place = _EncodePlace(plan, link or AnchorLink())
        layers = [
            EncodeLayer(
                index,
                place,
                window,
                own := [store.layers[index] for store in stores],
                own if anchors is None else [store.layers[index] for store in anchors],
            )
            for index, window in enumerate(windows)
        ]
        super().__init__(layers, place, comm)


class _AnswerPlace(_Place):
    def __init__(
        self, context_tokens: int, padding: list[int], comm: Comm, visible: VisibleRange | None
    ) -> None:
        self.context_tokens = context_tokens
        self.visible = visible
        self.padding = padding
        self.comm = comm
        self.tail = Tail()  # the first layer's, for its length

    @property
    def seen_tokens(self) -> int:
        return self.context_tokens + self.tail.length

    def row_padding(self, rows: int) -> list[int]:
        """Padding by batch row; beams and several answers put the rows of one query next to each other."""
        repeats = rows // len(self.padding)
        return [pad for pad in self.padding for _ in range(repeats)]


class AnswerLayer(_StarLayer):
    place: _AnswerPlace

    def __init__(self, index: int, place: _AnswerPlace, window: int | None, shard: LayerKV) -> None:
        super().__init__(index, place, window)
        self.shard = shard
        self.tail = place.tail if index == 0 else Tail()

    @property
    def kv(self) -> LayerKV:
        return self.shard

    def keep(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        self.tail.append(k_BGSD, v_BGSD)
        k_BGTD, v_BGTD = self.tail.pair()
        if not self.shard.expands or not self.shard.tokens:
            return k_BGTD, v_BGTD
        batch = k_BGTD.shape[0]
        k_1GLD, v_1GLD = self.shard.pair()
        k_BGLD, v_BGLD = (t.expand(batch, -1, -1, -1) for t in (k_1GLD, v_1GLD))
        return torch.cat([k_BGLD, k_BGTD], 2), torch.cat([v_BGLD, v_BGTD], 2)

    def attend(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        """Over this host's shard, on the last host over the tail too; merged over all hosts."""
        B, Q, H, _ = q_BQHD.shape
        comm = self.place.comm
        padding = self.place.row_padding(B)
        positions = [
            self.place.context_tokens + self.tail.length - Q - pad for pad in padding
        ]  # of the first queries
        held = self.shard.tokens
        # What is not kept but computed for this call comes first in what the model hands over.
        shard = (
            _by_token(self.shard.pair())
            if held and not self.shard.expands
            else (k_BKGD[:, :held], v_BKGD[:, :held])
        )
        if self.shard.expands:
            k_BKGD, v_BKGD = k_BKGD[:, held:], v_BKGD[:, held:]
        states, at = [], 0
        visible = self.place.visible
        near = (
            rule
            if visible is None
            else replace(rule, window=min(visible.recent, rule.window or visible.recent))
        )
        for start, stop in self.shard.segments:
            part = slice(at, at + stop - start)
            offsets = [position - start for position in positions]
            seen = rule if visible is not None and start < visible.first else near
            states.append(
                shard_attention(
                    q_BQHD, (shard[0][:, part], shard[1][:, part]), rule=seen, offsets=offsets
                )
            )
            at = part.stop
        if comm.cp_rank == comm.cp_size - 1:
            states.append(tail_attention(q_BQHD, k_BKGD, v_BKGD, rule=near, padding=padding))
        state = (
            merge(states, dtype=rule.dtype)
            if states
            else empty_state(B, Q, H, v_BKGD.shape[3], q_BQHD.device)
        )
        return state if comm.cp_size == 1 else comm.merge(state)

    # What beam search, several answers and assisted decoding ask of a cache: only the tail differs between rows.
    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.tail.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.tail.length:
            rows = self.tail.pair()[0].shape[0]
            self.tail.select(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.tail.select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        if not self.tail.length:  # reads another layer's keys
            return
        # 5.17 counts down from a length or takes a negative number to remove; later releases the latter only.
        if tokens_to_remove > 0:
            tokens_to_remove -= self.shard.tokens + self.tail.length
        self.tail.crop(-tokens_to_remove)


class AnswerCache(StarCache):
    """Phase 2: a frozen shard that every batch row shares, and a tail of their own.

    On several ranks, rank 0's cache tells the others what is done to it, and theirs does the same (`follow`).

    context_tokens: of the whole context. padding: left padding of each query of the batch, in tokens.
    """

    def __init__(
        self,
        shard: ContextKV,
        windows: list[int | None],
        context_tokens: int,
        padding: list[int],
        comm: Comm,
    ) -> None:
        place = _AnswerPlace(context_tokens, padding, comm, shard.visible)
        super().__init__(
            [AnswerLayer(i, place, w, shard.layers[i]) for i, w in enumerate(windows)], place, comm
        )

    @property
    def context_tokens(self) -> int:
        tokens: int = self.place.context_tokens
        return tokens

    # For graphs, which write into the tails by themselves (`hf.graphs`).

    def _kept(self) -> list[AnswerLayer]:
        """Layers that keep keys of their own."""
        return [layer for layer in self.layers if not layer.shard.is_empty]

    def reserve(self, rows: int, tokens: int) -> None:
        """Room in all tails for new tokens."""
        for layer in self._kept():
            start = layer.shard.segments[0][0]
            k_1G1D, v_1G1D = layer.shard.slice(start, start + 1)
            layer.tail.reserve(*(t.expand(rows, -1, tokens, -1) for t in (k_1G1D, v_1G1D)))

    def appended(self, tokens: int) -> None:
        for layer in self._kept():
            layer.tail.length += tokens

    @property
    def version(self) -> int:
        """Changes whenever tails lie elsewhere (all do at once)."""
        version: int = self.place.tail.version
        return version

    @property
    def tail_tokens(self) -> int:
        tokens: int = self.place.tail.length
        return tokens

    def tail_capacity(self, rows: int) -> int:
        """Tokens for which the tails of so many rows have room."""
        capacity: int = self.place.tail.capacity(rows)
        return capacity

    def held(self) -> list[tuple[Tensor, ...]]:
        """Each layer's context and tail, keys and values each, and scales in fp8; nothing of a layer that reads another one's."""
        layers: list[tuple[Tensor, ...]] = []
        for layer in self.layers:
            if layer.shard.is_empty:
                layers.append(())
                continue
            k, v, *scales = layer.shard.stored()
            layers.append((k, v, *layer.tail.buffers(), *scales))
        return layers

    @property
    def kv_format(self) -> KVFormat:
        """How the context is stored."""
        kv_format: KVFormat = self.layers[0].shard.kv_format
        return kv_format

    def row_padding(self, rows: int) -> list[int]:
        """Padding of each of `rows` batch rows, in tokens."""
        padding: list[int] = self.place.row_padding(rows)
        return padding

    def _lead(self, what: str, *arguments: Any) -> None:
        if self.comm.size > 1 and self.comm.rank == 0:
            told = [
                argument.tolist() if isinstance(argument, Tensor) else argument
                for argument in arguments
            ]
            self.comm.broadcast_object((what, *told))

    def begin(self, ids_BS: Tensor, positions_BS: Tensor, keep: int) -> None:
        self._lead("forward", ids_BS, positions_BS, keep)
        self.report()

    def report(self) -> None:
        """Say where this rank is, for the others to name should it fail."""
        self.comm.tick(f"phase 2, {self.place.tail.length:,} tokens behind the context")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._lead("select", beam_idx)
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._lead("repeat", repeats)
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._lead("select", indices)
        super().batch_select_indices(indices)

    def crop(self, tokens: int) -> None:
        self._lead("crop", tokens)
        super().crop(tokens)

    def follow(self, what: str, argument: Any) -> None:
        """Do what rank 0's cache was told."""
        if what == "select":
            super().batch_select_indices(torch.tensor(argument))
        elif what == "repeat":
            super().batch_repeat_interleave(argument)
        else:
            assert what == "crop"
            super().crop(argument)
