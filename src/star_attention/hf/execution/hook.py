"""Our attention and mask functions inside transformers, active only within our own forwards.

Nothing stays installed: for one forward, under a lock per model, the model's config names our
function. The function finds its cache in a context variable. In another thread, or outside our
forwards, there is none, and it calls the implementation that the model had before, so that a plain
`model.generate` elsewhere is not affected.

Axes: B batch, Q queries, K keys, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from star_attention.attention.attend import Rule
from star_attention.attention.rotation import HeadNorms, Rotation
from star_attention.attention.state import add_sink
from star_attention.distributed.comm import Comm
from star_attention.errors import InvalidInputError, UnsupportedModelError
from star_attention.hf.cache.base import StarCache
from star_attention.hf.loading import rope

_ACTIVE: ContextVar[StarCache | None] = ContextVar("star_attention_cache", default=None)

OVER, WITHIN, COMPRESSED = (f"star_attention_{way}_" for way in ("over", "within", "compressed"))
"""Three functions are registered over each implementation of transformers, under these prefixes:
"within" is one operation of a compiled layer, "compressed" is one, too, whose keys and values are
what the layer stores, not what it expands that to (MLA), and "over" runs outside of compiled code.
"""


class _Stored:
    """While a layer is traced, what it passed to its cache."""

    pair: tuple[Tensor, Tensor] | None = None


_stored = _Stored()

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def lock_of(model: nn.Module) -> threading.RLock:
    """The lock under which a model runs our forwards; the same for every engine of that model."""
    with _locks_guard:
        return _locks.setdefault(model, threading.RLock())


def _refuse_unknown_arguments(
    module: nn.Module | None,
    attention_mask: Tensor | None,
    *,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> None:
    reasons = []
    if attention_mask is not None:
        reasons.append("it brings an attention mask of its own")
    if position_bias is not None:
        reasons.append("it adds a position bias to the scores")
    if is_causal is False:
        reasons.append("it attends in both directions")
    if reasons:
        raise UnsupportedModelError(type(module).__name__, reasons)


def attention_of(
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
    rotation: Rotation | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention of one layer, with the parameters of transformers' attention functions.

    Args:
        cache: the cache of the forward.
        query: `[B, H, Q, D]`.
        key: `[B, G, K, D]`; `value` likewise.
        s_aux: learned sinks, `[H]`.
        rotation: `Rule.rotation`.

    Returns:
        The output, `[B, Q, H, D]`, and None for the attention weights.
    """
    _refuse_unknown_arguments(
        module, attention_mask, is_causal=is_causal, position_bias=position_bias
    )
    rule = Rule(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        dtype=query.dtype if s_aux is None and not cache.merges_ranks else None,
        sink_H=s_aux,
        rotation=rotation,
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
    value_size: int,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Store a layer's new keys and values and attend, as one operation of a compiled layer.

    Shapes as in `attention_of`; the result has `value_size` elements for each head, to which MLA
    expands values. `enter_layer` names the layer beforehand: as an argument, its index would be a
    constant of the compiled code, or make all of it dynamic.
    """
    cache = _ACTIVE.get()
    if cache is None:
        raise RuntimeError(
            "a layer compiled for Star Attention ran outside of its forward, in another thread"
        )
    key, value = cache.update(key, value, cache.entered)
    rule: dict[str, Any] = dict(
        scaling=scaling, sliding_window=sliding_window, softcap=softcap, s_aux=s_aux
    )
    return attention_of(cache, None, query, key, value, None, **rule)[0]


@_layer_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, value_size: int, *_: Any) -> Tensor:
    B, H, Q, _D = query.shape
    return query.new_empty(B, Q, H, value_size)


@torch.library.custom_op("star_attention::rotary_layer", mutates_args=())
def _rotary_layer_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    value_size: int,
    cos: Tensor,
    sin: Tensor,
    pairs: bool,
    norms: Sequence[Tensor],
    norm_numbers: Sequence[float],
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Do as `_layer_op` does with queries and keys that are still to be rotated.

    `rotary` puts it in its place. `cos`, `sin` and `pairs` are those of `Rotation`; `norms` are
    weights of `HeadNorms`, if there are any, and `norm_numbers` its offset and epsilon.
    """
    cache = _ACTIVE.get()
    head_norms = None
    if norms:
        offset, eps = norm_numbers
        head_norms = HeadNorms(query=norms[0], key=norms[1], offset=offset, eps=eps)
    rotation = Rotation(cos_RQE=cos, sin_RQE=sin, pairs=pairs, norms=head_norms)
    if cache is None or not cache.rotates:
        both = rotation.both(query.transpose(1, 2), key.transpose(1, 2))
        query, key = (t.transpose(1, 2) for t in both)
        out: Tensor = _layer_op(
            query, key, value, value_size, scaling, sliding_window, softcap, s_aux
        )
        return out
    # Not `update`: the layer stores the keys when it attends, since only then it has the rotation.
    cache.layers[cache.entered].expect(key, value)
    rule: dict[str, Any] = dict(
        scaling=scaling, sliding_window=sliding_window, softcap=softcap, s_aux=s_aux
    )
    return attention_of(cache, None, query, key, value, None, rotation=rotation, **rule)[0]


@_rotary_layer_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, value_size: int, *_: Any) -> Tensor:
    B, H, Q, _D = query.shape
    return query.new_empty(B, Q, H, value_size)


def implementation(stock: str, way: str = OVER) -> str:
    """Register our function over an attention implementation of transformers.

    Args:
        stock: name of the implementation that other threads and plain forwards keep using.
        way: which of our functions: `OVER`, `WITHIN` or `COMPRESSED`.

    Returns:
        The name under which transformers finds our function.
    """
    plain = stock.replace("/", "_").replace("|", "_")
    name = way + plain
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
        return attention_of(cache, module, query, key, value, attention_mask, **kwargs)

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
        _refuse_unknown_arguments(module, attention_mask, **kwargs)
        rule = (kwargs.get(field) for field in ("scaling", "sliding_window", "softcap", "s_aux"))
        value_size = value.shape[-1]
        if _stored.pair is not None:
            key, value = _stored.pair
            # It is no result of the compiled layer.
            _stored.pair = None
        return _layer_op(query, key, value, value_size, *rule), None

    def mask(*args: Any, **kwargs: Any) -> Any:
        # Our cache masks by position, so no mask is built. The name must be registered all the
        # same: without it, plain forwards would silently lose their padding.
        if _ACTIVE.get() is not None:
            return None
        return ALL_MASK_ATTENTION_FUNCTIONS[stock](*args, **kwargs)

    for prefix, attention in ((OVER, outside), (WITHIN, inside), (COMPRESSED, inside)):
        if stock in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(prefix + plain, mask)
        AttentionInterface.register(prefix + plain, attention)
    return name


def enter_layer(index: int) -> None:
    """Set the cache layer that the next operation of a compiled layer belongs to."""
    cache = _ACTIVE.get()
    assert cache is not None
    cache.entered = index


def is_within(config: Any) -> bool:
    """True while a model's attention is an operation of compiled layers."""
    return str(config._attn_implementation).startswith((WITHIN, COMPRESSED))


def note_stored(config: Any, key: Tensor, value: Tensor) -> None:
    """Note what a layer that is traced stores, where it attends to that."""
    if str(config._attn_implementation).startswith(COMPRESSED):
        _stored.pair = key, value


def step_outside(configs: list[Any]) -> None:
    """Take attention out of compiled layers for the rest of the current `running` block."""
    for config in configs:
        name = config._attn_implementation
        for prefix in (WITHIN, COMPRESSED):
            if name.startswith(prefix):
                config._attn_implementation_internal = OVER + name.removeprefix(prefix)


def in_our_forward() -> bool:
    """True if this thread is inside one of our forwards."""
    return _ACTIVE.get() is not None


def cache_of_forward() -> StarCache | None:
    """Return the cache of the forward of ours that this thread runs, if it runs one."""
    return _ACTIVE.get()


def comm_of_forward() -> Comm:
    """Return the ranks of the forward that this thread runs.

    Raises:
        RuntimeError: it runs none of ours.
    """
    cache = _ACTIVE.get()
    if cache is None:
        raise RuntimeError(
            "code compiled for Star Attention ran outside of its forward, in another thread"
        )
    return cache.comm


def is_slicing() -> bool:
    """True within our forward, if it runs with weights in slices.

    Layers that ask have a class for slices. Compiled, they run nowhere else.
    """
    # Not `is_compiling`, which since torch 2.13 is true for all threads while one compiles.
    if torch.compiler.is_dynamo_compiling():
        return True
    cache = _ACTIVE.get()
    return cache is not None and cache.slices is not None


def _without_autocast(model: Any) -> AbstractContextManager[Any]:
    """Return a block in which torch computes in the model's own precision.

    Keys and values are stored in it.

    Raises:
        InvalidInputError: autocast asks for another precision.
    """
    kind = model.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    wanted = torch.get_autocast_dtype(kind)
    if wanted != model.dtype:
        name = str(wanted).removeprefix("torch.")
        raise InvalidInputError(
            f"torch.autocast to {name} is on, but the model is in"
            f" {str(model.dtype).removeprefix('torch.')}: call this library outside of autocast, or"
            f" load the model in {name} (dtype='{name}')"
        )
    return torch.autocast(kind, enabled=False)


@contextmanager
def running(
    model: nn.Module,
    configs: list[Any],
    rotaries: list[nn.Module],
    cache: StarCache,
    rope_length: int | None,
    way: str = OVER,
) -> Iterator[None]:
    """Send this thread's forwards through `cache`, and restore everything when the block ends.

    Args:
        model: the model, whose lock is held for the block.
        configs: configs that name the attention of its modules.
        rotaries: its rotary modules whose frequencies depend on the length.
        cache: the cache that stores and attends.
        rope_length: tokens for which those frequencies are taken.
        way: which of our functions attends, until `step_outside`.

    Raises:
        InvalidInputError: torch.autocast is on, for another precision than the model's.
    """
    with _without_autocast(model), lock_of(model):
        before = [config._attn_implementation for config in configs]
        token = _ACTIVE.set(cache)
        try:
            for config, stock in zip(configs, before, strict=True):
                # Not the public setter, which would also change the configs of vision towers.
                config._attn_implementation_internal = implementation(stock or "eager", way)
            with rope.pinned(rotaries, rope_length, active=lambda: _ACTIVE.get() is cache):
                yield
        finally:
            for config, stock in zip(configs, before, strict=True):
                config._attn_implementation_internal = stock
            _ACTIVE.reset(token)
