"""The transformers cache that every forward of ours goes through: layers that store and attend.

transformers calls `update` on a cache layer and then the attention function, as a rule with the
very tensors that `update` returned. So a cache here can tell which of its layers an attention call
belongs to, and lets that layer compute the attention.

Subclasses: `encode` (phase 1), `decode` and `mirrored` (phase 2), `ring` and `window` (phase 1 of
other methods), `probe` (a model's layers), `graph` (phase 2 inside CUDA graphs).

Axes: B batch, G KV heads, S new tokens, K keys, Q queries, H query heads, D head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from star_attention.attention.attend import Rule
from star_attention.attention.blocks import KV
from star_attention.attention.state import State
from star_attention.distributed.comm import Comm
from star_attention.errors import UnsupportedModelError
from star_attention.storage.kv import ContextKV, LayerKV


@dataclass(kw_only=True)
class ForwardPosition:
    """The position of the current forward, shared by a cache and its layers.

    Layers do not refer to their cache: the cycle would keep a context's memory until the garbage
    collector runs.
    """

    last_layer: int | None = None
    """Index of the layer whose `update` ran last."""

    @property
    def seen_tokens(self) -> int:
        """Tokens before the current forward: the position of its first token."""
        return 0


class KeysAreStored(BaseException):
    """Ends a forward of which nothing but its keys and values is wanted, once all are stored.

    It is no error: transformers' own code, which it passes through, is not to catch it.
    """


P = TypeVar("P", bound=ForwardPosition)
L = TypeVar("L", bound="StarLayer[Any]")


class StarLayer(CacheLayerMixin, Generic[P]):
    """One cache layer: `append` stores keys and values, `attend` computes attention.

    Args:
        index: index of the layer in its cache.
        window: sliding window of the layer in tokens, None for full attention.
        position: where the forward stands, shared with the other layers.
        stores: the layer's keys and values, one store for each context of a batch.
    """

    is_compileable = False
    is_croppable = True
    # The rule applies windows. Stores keep every token, at its absolute position.
    is_sliding = False
    supports_early_init = False

    def __init__(self, index: int, window: int | None, position: P, stores: list[LayerKV]) -> None:
        super().__init__()
        self.index = index
        self.window = window
        self.position = position
        self.stores = stores
        # Weak, so that a forward's keys do not outlive the attention that reads them.
        self._returned: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None
        self.returned_tokens = 0

    def append(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values.

        Returns:
            The keys and values that the model passes to its attention.
        """
        raise NotImplementedError

    def attend(self, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, rule: Rule) -> State:
        """Compute attention of the forward's queries.

        Args:
            q_BQHD: queries.
            k_BKGD: keys that `append` returned, or their expansion (MLA).
            v_BKGD: values, likewise.
            rule: scale, window and softcap.
        """
        raise NotImplementedError

    def leave_out(self) -> None:
        """Do in place of `attend` what others wait for, where nobody reads its result."""

    @property
    def kv(self) -> LayerKV:
        return self.stores[0]

    def set_expands(self, expands: bool) -> None:
        """Record whether attention computes keys and values from the stored ones (MLA)."""
        for store in self.stores:
            store.expands = expands

    def owns(self, key: Tensor, value: Tensor) -> bool:
        """True if these are the very tensors that the last `update` returned."""
        return (
            self._returned is not None
            and key is self._returned[0]()
            and value is self._returned[1]()
        )

    # The interface of transformers' cache layers.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        k_BGKD, v_BGKD = self.append(key_states, value_states)
        self.expect(k_BGKD, v_BGKD)
        return k_BGKD, v_BGKD

    def expect(self, k_BGKD: Tensor, v_BGKD: Tensor) -> None:
        """Know these keys and values as the layer's when they come to its attention."""
        self._returned = weakref.ref(k_BGKD), weakref.ref(v_BGKD)
        self.returned_tokens = k_BGKD.shape[2]
        self.position.last_layer = self.index

    def get_seq_length(self) -> int:
        return self.position.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def build_layers(
    kind: Callable[[int, int | None, P, list[LayerKV]], L],
    windows: list[int | None],
    position: P,
    stores: list[ContextKV],
) -> list[L]:
    """Make a cache's layers.

    Args:
        kind: class of the layers.
        windows: sliding window of each layer in tokens, None for full attention.
        position: where the forward stands, shared by all layers.
        stores: keys and values, one store for each context of a batch.
    """
    return [
        kind(index, window, position, [store.layers[index] for store in stores])
        for index, window in enumerate(windows)
    ]


class StarCache(Cache):
    """A cache that finds the layer to which an attention call belongs, and lets it attend."""

    layers: list[Any]
    position: ForwardPosition

    # Where layers are compiled in pieces, storing and attending stay outside of compiled code.
    update = torch.compiler.disable(Cache.update)

    def __init__(self, layers: list[Any], position: ForwardPosition, comm: Comm) -> None:
        super().__init__(layers=layers)
        self.position = position
        self.comm = comm
        self.calls = 0
        """Attention calls so far."""
        self.after_layer: Callable[[], None] | None = None
        """Called after each of them."""
        self.last_wanted: int | None = None
        """Index of the layer that stores the last keys, if a forward ends with them."""
        self.entered = 0
        """Index of the layer that runs, where layers are compiled whole."""
        self.slices: Any = None
        """The slices of weights that forwards multiply (`hf.execution.slices`), None for all."""
        self.part: Any = None
        """The part of the layers that a forward runs (`hf.execution.layer_part`), None for all."""

    def begin(self, ids_BS: Tensor, positions_BS: Tensor, logits_to_keep: int) -> None:
        """Run before each forward of the whole model; arguments as in `ModelHandle.logits`."""

    @property
    def seen_tokens(self) -> int:
        """Tokens before the current forward."""
        return self.position.seen_tokens

    @property
    def attends_compressed(self) -> bool:
        """True if all layers attend to what they store, and nobody reads what the model expands it
        to (MLA)."""
        return False

    @property
    def rotates(self) -> bool:
        """True if layers compute rotary embeddings while they store new keys (`Rule.rotation`)."""
        return False

    @property
    def finishes_latents(self) -> bool:
        """True if layers compute the norm and the rotary embeddings of a single token's compressed
        key and of its query themselves (`GraphLayer.expect_latent`)."""
        return False

    @property
    def merges_ranks(self) -> bool:
        """True if a layer's states are merged with those of other ranks."""
        return self.comm.cp_size > 1

    def attend(self, module: Any, q_BQHD: Tensor, key: Tensor, value: Tensor, rule: Rule) -> State:
        """Compute the attention of one layer.

        Args:
            module: the attention module, None in compiled layers.
            q_BQHD: queries.
            key: keys, `[B, G, K, D]`, as the model passes them.
            value: values, likewise.
            rule: scale, window and softcap; the window of the layer is added to it.

        Raises:
            KeysAreStored: the layer is `last_wanted`.
        """
        layer = self._find_layer(module, key, value)
        self.calls += 1
        self.comm.tick()
        if layer.window is not None and (rule.window or 0) > layer.window:
            # What is further back may not be kept.
            raise UnsupportedModelError(
                type(module).__name__,
                [f"a layer sees {rule.window:,} tokens, and its config says {layer.window:,}"],
            )
        is_last = layer.index == self.last_wanted
        if is_last:
            layer.leave_out()
        else:
            if rule.window is None and layer.window is not None:
                rule = replace(rule, window=layer.window)
            state = layer.attend(q_BQHD, *by_token((key, value)), rule)
        if self.after_layer is not None:
            self.after_layer()
        if is_last:
            raise KeysAreStored
        return state

    def _find_layer(self, module: Any, key: Tensor, value: Tensor) -> StarLayer[Any]:
        assert self.position.last_layer is not None, "attention before any update of the cache"
        last: StarLayer[Any] = self.layers[self.position.last_layer]
        if last.owns(key, value):
            if last.kv.expands is None:
                last.set_expands(False)
            return last
        # KV sharing: a later layer attends to the keys of an earlier one.
        for layer in self.layers:
            if layer.owns(key, value):
                return layer  # type: ignore[no-any-return]
        # Neither: the layer computed its keys or values from the stored ones (MLA).
        index = getattr(module, "layer_idx", None)
        if index not in (None, last.index) or key.shape[2] != last.returned_tokens:
            raise UnsupportedModelError(
                type(module).__name__,
                [
                    f"layer {index} attends to keys that did not come from its cache layer"
                    f" ({tuple(key.shape)})"
                ],
            )
        last.set_expands(True)
        return last


def by_token(pair: tuple[Tensor, Tensor]) -> KV:
    """View keys and values `[B, G, K, D]` as `[B, K, G, D]`."""
    return pair[0].transpose(1, 2), pair[1].transpose(1, 2)
