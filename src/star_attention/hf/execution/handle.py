"""A transformers model as the two phases see it: its decoder, its layers' windows, its limits, and how to run it.

Axes: B batch, S tokens of a forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from star_attention.attention.kernels import triton_works
from star_attention.errors import InvalidInputError, UnsupportedModelError
from star_attention.hf.cache import probe
from star_attention.hf.cache.base import StarCache
from star_attention.hf.cache.probe import LayerKVShape, Seen
from star_attention.hf.execution import graphs, hook
from star_attention.hf.execution.compiled import CompiledLayers
from star_attention.hf.execution.graphs import Graphs
from star_attention.hf.loading import rope, support

_CACHE_WORDS = (
    "cache",
    "past_key_values",
)  # what transformers calls the cache since 5.24, and before


def cache_word(function: Any) -> str:
    """The name under which a forward, or a part of `generate`, takes the cache."""
    parameters = inspect.signature(function).parameters
    return next((word for word in _CACHE_WORDS if word in parameters), _CACHE_WORDS[-1])


def layer_windows(config: Any, cache_layers: int) -> list[int | None]:
    """Sliding window of each cache layer in tokens, None for full attention; the rule of transformers' own caches."""
    window: int | None = getattr(config, "sliding_window", None) or None
    types = getattr(config, "layer_types", None)
    if types is None:
        return [window] * cache_layers
    windows = [window if kind == "sliding_attention" else None for kind in types]
    # Some decoder layers hold several attentions, each with a cache layer of its own.
    return [windows[index * len(windows) // cache_layers] for index in range(cache_layers)]


def count_cache_layers(decoder: nn.Module, config: Any) -> int:
    """Layers that a cache of this decoder needs: one for every index that its attention modules carry."""
    indices: list[int] = [
        i for m in decoder.modules() if isinstance(i := getattr(m, "layer_idx", None), int)
    ]
    layers: int = config.num_hidden_layers
    return max([layers, *(index + 1 for index in indices)])


class ModelHandle:
    """Raises `UnsupportedModelError` for a model that cannot run, and `InvalidInputError` for one in training mode."""

    def __init__(self, model: Any, *, compile: bool | None = None) -> None:
        reasons = support.reasons(model)
        if reasons:
            raise UnsupportedModelError(type(model).__name__, reasons)
        if model.training:
            raise InvalidInputError(
                f"{type(model).__name__} is in training mode; call model.eval() first"
            )
        self.model: Any = support.unwrap(model)
        self.outer: Any = model
        self.decoder: Any = self.model.get_decoder()
        self.config: Any = self.decoder.config
        self.windows = layer_windows(self.config, count_cache_layers(self.decoder, self.config))
        self.rotaries = rope.length_dependent(self.decoder)
        configs = {
            id(c): c
            for m in self.decoder.modules()
            if (c := getattr(m, "config", None)) is not None
        }
        self.configs = [c for c in configs.values() if hasattr(c, "_attn_implementation")]
        self.max_positions = rope.max_positions(self.config)
        self._compile = compile
        self.vocab_size: int = self.model.get_input_embeddings().weight.shape[0]
        self._decoder_cache, self._model_cache = (
            cache_word(self.decoder.forward),
            cache_word(self.model.forward),
        )
        self._decoder_takes_logits_to_keep, self._takes_logits_to_keep = (
            "logits_to_keep" in inspect.signature(module.forward).parameters
            for module in (self.decoder, self.model)
        )

    @property
    def device(self) -> torch.device:
        """Where token ids go in (the embeddings' device, when layers are spread over several)."""
        return _device(self.model.get_input_embeddings()) or torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """With which attention computes: the embeddings' (quantized weights have another)."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    def layer_device(self, index: int) -> torch.device:
        """Where a layer's keys and values belong."""
        # (Not by the decoder's list of layers: some hold several attentions, each with a cache layer of its own.)
        own = (_device(m) for m in self.decoder.modules() if getattr(m, "layer_idx", None) == index)
        return next((device for device in own if device is not None), self.device)

    @cached_property
    def seen(self) -> Seen:
        """What a forward of a few tokens shows about the layers."""
        return probe.look(self)

    @property
    def kept(self) -> list[LayerKVShape | None]:
        """What each cache layer keeps."""
        return self.seen.kept

    @cached_property
    def compiled(self) -> CompiledLayers | None:
        """The layers through torch.compile, None where they are not to be."""
        with hook.lock_of(self.model):
            # Somebody else's forwards (accelerate's, which bring weights for each module) stay.
            replaced = any("forward" in vars(module) for module in self.decoder.modules())
            wanted = triton_works(self.device) if self._compile is None else self._compile
            return CompiledLayers(self) if wanted and not replaced else None

    @cached_property
    def graphs(self) -> Graphs | None:
        """Forwards of few tokens as CUDA graphs, None where there are none."""
        return Graphs(self) if self.compiled is not None and graphs.usable(self) else None

    @contextmanager
    def running(
        self, cache: StarCache, rope_length: int | None, what: str | None = None
    ) -> Iterator[None]:
        """Our attention for the forwards of this thread inside the block; `what` they are compiled for, if they are."""
        compiled = None if what is None else self.compiled
        within = compiled is not None and compiled.whole
        with hook.running(
            self.model, self.configs, self.rotaries, cache, rope_length, within=within
        ):
            if what is None or compiled is None:
                yield
            else:
                with compiled.active(what):
                    yield

    @torch.no_grad()
    def encode(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor,
        cache: StarCache,
        rope_length: int | None,
        *,
        keep: int = 0,
        what: str | None = None,
    ) -> None:
        """One forward of the decoder alone, for its keys and values: no logits.

        keep: tokens whose logits are computed elsewhere (0: all): some decoders send only these through their last layers.
        what: its layers are compiled for, if they are (`hf.compiled`).
        """
        extra = {"logits_to_keep": keep} if self._decoder_takes_logits_to_keep else {}
        with self.running(cache, rope_length, what):
            self.decoder(
                input_ids=ids_BS,
                position_ids=positions_BS.expand(ids_BS.shape[0], -1),
                use_cache=True,
                **{self._decoder_cache: _Alike(cache, self.config)},
                **extra,
            )
        if not cache.calls:
            raise UnsupportedModelError(
                type(self.model).__name__,
                ["its attention does not go through transformers' interface"],
            )

    @torch.no_grad()
    def logits(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor,
        cache: StarCache,
        rope_length: int | None,
        *,
        keep: int = 1,
        what: str | None = None,
    ) -> Tensor:
        """One forward of the whole model; the logits of the last `keep` tokens, `[B, keep, vocabulary]` (0: of all).

        what: its layers are compiled for, if they are.
        """
        extra: dict[str, Any] = {self._model_cache: _Alike(cache, self.config)}
        if self._takes_logits_to_keep:
            extra["logits_to_keep"] = keep
        cache.begin(ids_BS, positions_BS, keep)
        with self.running(cache, rope_length, what):
            logits: Tensor = self.model(
                input_ids=ids_BS,
                position_ids=positions_BS,
                use_cache=True,
                return_dict=True,
                **extra,
            ).logits
        return (logits[:, -keep:] if keep else logits).to(ids_BS.device)

    @contextmanager
    def generating(
        self, cache: StarCache, rope_length: int | None, whole_tokens: int | None
    ) -> Iterator[Any]:
        """The model as an object whose every forward goes through `cache`, for transformers' own `generate`.

        whole_tokens: length of the prompt where it includes the tokens that the cache holds, None where it does not.

        It shares everything with the model but its class, so nothing is installed in the model.
        """
        stock: Any = type(self.model)
        running = self.running
        # A class is in cycles with itself: emptied afterwards, so that a context's memory does not wait for the collector.
        holder = [cache]

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not holder or all(kwargs.get(word) is not holder[0] for word in _CACHE_WORDS):
                return stock.__call__(
                    self, *args, **kwargs
                )  # beside the answer (classifier-free guidance)
            (cache,) = holder
            if whole_tokens is not None and kwargs["input_ids"].shape[1] >= whole_tokens:
                # Assisted decoding does not know that a cache may be filled when it begins, and gives the context again.
                for name in ("input_ids", "position_ids"):
                    if kwargs.get(name) is not None:
                        kwargs[name] = kwargs[name][:, cache.seen_tokens :]
            ids_BS = kwargs["input_ids"]
            cache.begin(ids_BS, _positions(cache, ids_BS, kwargs), kwargs.get("logits_to_keep", 0))
            with running(cache, rope_length):
                return stock.__call__(self, *args, **kwargs)

        kind = type(stock.__name__, (stock,), {"__call__": call, "__module__": stock.__module__})
        proxy: Any = object.__new__(kind)
        object.__setattr__(proxy, "__dict__", self.model.__dict__)
        try:
            yield proxy
        finally:
            holder.clear()


class _Alike(Cache):
    """The cache as the model's code is to see it: of one class in both phases, so that what is compiled serves both."""

    def __init__(self, cache: StarCache, config: Any) -> None:
        super().__init__(layers=cache.layers)
        self._config = config

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() and hook.is_within(self._config):
            return key_states, value_states  # attention keeps them
        return self._keep(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]

    @torch.compiler.disable
    def _keep(self, *args: Any, **kwargs: Any) -> Any:
        return super().update(*args, **kwargs)


def _device(module: nn.Module) -> torch.device | None:
    """Where a module computes; None for one without weights."""
    first = next(module.parameters(), None)
    if first is None or first.device.type != "meta":
        return None if first is None else first.device
    # accelerate keeps the weights elsewhere and brings them for each forward.
    hooks = (
        getattr(getattr(m, "_hf_hook", None), "execution_device", None) for m in module.modules()
    )
    place = next((place for place in hooks if place is not None), "meta")
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def _positions(cache: StarCache, ids_BS: Tensor, words: dict[str, Any]) -> Tensor:
    """Positions of a forward's tokens, as transformers' generation gives them or leaves them to the model."""
    positions_BS: Tensor | None = words.get("position_ids")
    if positions_BS is not None:
        return positions_BS
    tokens, mask_BL = ids_BS.shape[1], words.get("attention_mask")
    if isinstance(mask_BL, Tensor) and mask_BL.dim() == 2:
        return (mask_BL.cumsum(-1) - 1).clamp_(min=0)[:, -tokens:]
    return (cache.seen_tokens + torch.arange(tokens, device=ids_BS.device)).expand_as(ids_BS)
