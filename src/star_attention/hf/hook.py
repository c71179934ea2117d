"""Our attention function and mask function inside transformers, active only within our own forwards.

Nothing stays installed: for the length of one forward, behind a lock per model, the model's config names our function. The
function looks at a context variable for the cache it works for. In any other thread, or outside our forwards, it finds
none and calls the implementation that the model had before, so that a plain `model.generate` elsewhere never notices.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from star_attention.attention.attend import Rule
from star_attention.attention.state import add_sink
from star_attention.errors import UnsupportedModelError
from star_attention.hf import rope
from star_attention.hf.cache import StarCache

_ACTIVE: ContextVar[StarCache | None] = ContextVar("star_attention_cache", default=None)
_PREFIX = "star_attention_over_"

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def lock_of(model: nn.Module) -> threading.RLock:
    """The lock under which a model runs our forwards; the same for every engine around that model."""
    with _locks_guard:
        return _locks.setdefault(model, threading.RLock())


def _star_attention(
    cache: StarCache,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention; `query` is `[B, H, Q, D]`, `key` and `value` `[B, G, K, D]`, the result `[B, Q, H, D]`."""
    why = []
    if attention_mask is not None:
        why.append("it brings an attention mask of its own")
    if position_bias is not None:
        why.append("it adds a position bias to the scores")
    if is_causal is False:
        why.append("it attends in both directions")
    if why:
        raise UnsupportedModelError(type(module).__name__, why)
    rule = Rule(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        dtype=query.dtype if s_aux is None and cache.comm.hosts == 1 else None,
    )
    state = cache.attend(module, query.transpose(1, 2), key, value, rule)
    if s_aux is not None:
        state = add_sink(state, s_aux)
    return state.out_BQHD.to(query.dtype).contiguous(), None


def _stock_attention(stock: str, module: nn.Module) -> Callable[..., Any]:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(stock, eager)  # type: ignore[no-any-return]


def implementation(stock: str) -> str:
    """The name, registered with transformers, of our function in front of the implementation `stock`."""
    name = _PREFIX + stock.replace("/", "_").replace("|", "_")
    if name in AttentionInterface._global_mapping:
        return name

    @torch.compiler.disable  # layers are compiled around it
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        cache = _ACTIVE.get()
        if cache is None:
            return _stock_attention(stock, module)(module, query, key, value, attention_mask, **kwargs)
        return _star_attention(cache, module, query, key, value, attention_mask, **kwargs)

    def mask(*args: Any, **kwargs: Any) -> Any:
        # Our cache knows every mask by position, so none is built. (A name that is missing from the mask interface would
        # drop padding for plain forwards without a word.)
        return None if _ACTIVE.get() is not None else ALL_MASK_ATTENTION_FUNCTIONS[stock](*args, **kwargs)

    if stock in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, mask)
    AttentionInterface.register(name, attention)
    return name


def is_ours() -> bool:
    """Whether this thread is inside one of our forwards."""
    return _ACTIVE.get() is not None


@contextmanager
def running(
    model: nn.Module, configs: list[Any], rotaries: list[nn.Module], cache: StarCache, rope_length: int | None
) -> Iterator[None]:
    """Make the forwards of this thread go through `cache`; everything is as before when the block ends."""
    with lock_of(model):
        before = [config._attn_implementation for config in configs]
        token = _ACTIVE.set(cache)
        try:
            for config, stock in zip(configs, before, strict=True):
                # Not the public setter: that one would reach into the configs of vision towers as well.
                config._attn_implementation_internal = implementation(stock or "eager")
            with rope.pinned(rotaries, rope_length, active=lambda: _ACTIVE.get() is cache):
                yield
        finally:
            for config, stock in zip(configs, before, strict=True):
                config._attn_implementation_internal = stock
            _ACTIVE.reset(token)
