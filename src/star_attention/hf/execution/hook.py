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
from star_attention.hf.cache.base import StarCache
from star_attention.hf.loading import rope

_ACTIVE: ContextVar[StarCache | None] = ContextVar("star_attention_cache", default=None)
_OVER, _WITHIN = "star_attention_over_", "star_attention_within_"

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def lock_of(model: nn.Module) -> threading.RLock:
    """The lock under which a model runs our forwards; the same for every engine around that model."""
    with _locks_guard:
        return _locks.setdefault(model, threading.RLock())


def _refuse_what_is_unknown(
    module: nn.Module | None,
    attention_mask: Tensor | None,
    *,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> None:
    why = []
    if attention_mask is not None:
        why.append("it brings an attention mask of its own")
    if position_bias is not None:
        why.append("it adds a position bias to the scores")
    if is_causal is False:
        why.append("it attends in both directions")
    if why:
        raise UnsupportedModelError(type(module).__name__, why)


def _star_attention(
    cache: StarCache,
    module: nn.Module | None,
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
    _refuse_what_is_unknown(
        module, attention_mask, is_causal=is_causal, position_bias=position_bias
    )
    rule = Rule(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        dtype=query.dtype if s_aux is None and cache.comm.cp_size == 1 else None,
    )
    state = cache.attend(module, query.transpose(1, 2), key, value, rule)
    if s_aux is not None:
        state = add_sink(state, s_aux)
    return state.out_BQHD.to(query.dtype).contiguous(), None


def _stock_attention(stock: str, module: nn.Module) -> Callable[..., Any]:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(stock, eager)  # type: ignore[no-any-return]


@torch.library.custom_op("star_attention::layer", mutates_args=())
def _layer_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Keeps a layer's new keys and values and attends, as one operation of a compiled layer; shapes as in `_star_attention`.

    Of which layer, `enter` has said: as an argument it would be a constant of what is compiled, or make everything dynamic.
    """
    cache = _ACTIVE.get()
    if cache is None:
        raise RuntimeError(
            "a layer that was compiled for Star Attention ran outside of it, in another thread"
        )
    key, value = cache.update(key, value, cache.entered)
    rule: dict[str, Any] = dict(
        scaling=scaling, sliding_window=sliding_window, softcap=softcap, s_aux=s_aux
    )
    return _star_attention(cache, None, query, key, value, None, **rule)[0]


@_layer_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    B, H, Q, _D = query.shape
    return query.new_empty(B, Q, H, value.shape[-1])


def implementation(stock: str, *, within: bool = False) -> str:
    """The name, registered with transformers, of our function in front of the implementation `stock`.

    within: as one operation of a compiled layer, instead of outside of what is compiled.
    """
    plain = stock.replace("/", "_").replace("|", "_")
    name = (_WITHIN if within else _OVER) + plain
    if name in AttentionInterface._global_mapping:
        return name

    @torch.compiler.disable
    def outside(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        cache = _ACTIVE.get()
        if cache is None:
            return _stock_attention(stock, module)(
                module, query, key, value, attention_mask, **kwargs
            )
        return _star_attention(cache, module, query, key, value, attention_mask, **kwargs)

    def inside(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not torch.compiler.is_compiling():
            return outside(module, query, key, value, attention_mask, **kwargs)
        _refuse_what_is_unknown(module, attention_mask, **kwargs)
        words = (kwargs.get(word) for word in ("scaling", "sliding_window", "softcap", "s_aux"))
        return _layer_op(query, key, value, *words), None

    def mask(*args: Any, **kwargs: Any) -> Any:
        # Our cache knows every mask by position, so none is built. (A name that is missing from the mask interface would
        # drop padding for plain forwards without a word.)
        return (
            None
            if _ACTIVE.get() is not None
            else ALL_MASK_ATTENTION_FUNCTIONS[stock](*args, **kwargs)
        )

    for prefix, attention in ((_OVER, outside), (_WITHIN, inside)):
        if stock in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(prefix + plain, mask)
        AttentionInterface.register(prefix + plain, attention)
    return name


def enter(layer: int) -> None:
    """The next operation of compiled layers is that of cache layer `layer`."""
    cache = _ACTIVE.get()
    assert cache is not None
    cache.entered = layer


def is_within(config: Any) -> bool:
    """Whether a model's attention is an operation of compiled layers at present."""
    return str(config._attn_implementation).startswith(_WITHIN)


def step_outside(configs: list[Any]) -> None:
    """For the rest of what is `running`: attention outside of what is compiled."""
    for config in configs:
        name = config._attn_implementation
        if name.startswith(_WITHIN):
            config._attn_implementation_internal = _OVER + name.removeprefix(_WITHIN)


def is_ours() -> bool:
    """Whether this thread is inside one of our forwards."""
    return _ACTIVE.get() is not None


@contextmanager
def running(
    model: nn.Module,
    configs: list[Any],
    rotaries: list[nn.Module],
    cache: StarCache,
    rope_length: int | None,
    *,
    within: bool = False,
) -> Iterator[None]:
    """Make the forwards of this thread go through `cache`; everything is as before when the block ends.

    within: attention is one operation of layers that are compiled (`step_outside` takes it back).
    """
    with lock_of(model):
        before = [config._attn_implementation for config in configs]
        token = _ACTIVE.set(cache)
        try:
            for config, stock in zip(configs, before, strict=True):
                # Not the public setter: that one would reach into the configs of vision towers as well.
                config._attn_implementation_internal = implementation(
                    stock or "eager", within=within
                )
            with rope.pinned(rotaries, rope_length, active=lambda: _ACTIVE.get() is cache):
                yield
        finally:
            for config, stock in zip(configs, before, strict=True):
                config._attn_implementation_internal = stock
            _ACTIVE.reset(token)
