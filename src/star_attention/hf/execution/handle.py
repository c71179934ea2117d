"""A transformers model as the two phases use it: decoder, windows, limits and forwards.

Axes: B batch, S tokens of a forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from star_attention.attention.kernels import triton_works
from star_attention.errors import InvalidInputError, UnsupportedModelError
from star_attention.hf.cache.base import KeysAreStored, StarCache
from star_attention.hf.cache.probe import LayerKVShape, ProbeResult, probe_layers
from star_attention.hf.execution import graphs, hook
from star_attention.hf.execution.compiled import CompiledLayers
from star_attention.hf.execution.graphs import Graphs
from star_attention.hf.execution.last_layer import has_other_forwards, last_kv_layer
from star_attention.hf.loading import fingerprint, rope, support
from star_attention.hf.loading.positions import doubt, max_positions
from star_attention.storage.transient import Transient

# The name of the cache in transformers since 5.24, and before.
_CACHE_ARGUMENTS = ("cache", "past_key_values")


def cache_argument(function: Any) -> str:
    """The name of the argument by which a forward, or a part of `generate`, takes the cache."""
    parameters = inspect.signature(function).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in parameters), _CACHE_ARGUMENTS[-1])


def layer_windows(config: Any, cache_layers: int) -> list[int | None]:
    """Sliding window of each cache layer in tokens, None for full attention.

    The rule is that of transformers' own caches.
    """
    window: int | None = getattr(config, "sliding_window", None) or None
    types = getattr(config, "layer_types", None)
    if types is None:
        return [window] * cache_layers
    windows = [window if layer_type == "sliding_attention" else None for layer_type in types]
    # Some decoder layers hold several attentions, each with a cache layer of its own.
    return [windows[index * len(windows) // cache_layers] for index in range(cache_layers)]


def count_cache_layers(decoder: nn.Module, config: Any) -> int:
    """Layers that a cache of this decoder needs: one for every index of its attention modules."""
    indices: list[int] = [
        index
        for module in decoder.modules()
        if isinstance(index := getattr(module, "layer_idx", None), int)
    ]
    layers: int = config.num_hidden_layers
    return max([layers, *(index + 1 for index in indices)])


class ModelHandle(Transient):
    """A model, wrapped or plain, and its forwards through our caches.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        compile: run layers through torch.compile; None where Triton works.

    Raises:
        UnsupportedModelError: the model cannot run with Star Attention.
        InvalidInputError: the model is in training mode.
    """

    _instead_of_deepcopy = "share it, or make one of a copy of the model"

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
        _finish_loading(self.model)
        self.decoder: Any = self.model.get_decoder()
        self.config: Any = self.decoder.config
        self.windows = layer_windows(self.config, count_cache_layers(self.decoder, self.config))
        rope.check_built_from_config(self.decoder)
        self.rotaries = rope.length_dependent(self.decoder)
        self.unscaled_length = rope.unscaled_length(self.rotaries)
        self.short_length = rope.unscaled_length(self.rotaries, longrope_only=True)
        configs = {
            id(config): config
            for module in self.decoder.modules()
            if hasattr(config := getattr(module, "config", None), "_attn_implementation")
        }
        self.configs = list(configs.values())
        self._read_config(fingerprint.config(self.config))
        # Frozen in a server, where nothing changes the model: no question looks at its weights.
        self._compile, self.is_frozen = compile, False
        self.kept_slices: Any = None  # What `hf.execution.slices` knows of the model.
        self.vocab_size: int = self.model.get_input_embeddings().weight.shape[0]
        self._decoder_cache, self._model_cache = (
            cache_argument(self.decoder.forward),
            cache_argument(self.model.forward),
        )
        self._decoder_takes_logits_to_keep, self._takes_logits_to_keep = (
            "logits_to_keep" in inspect.signature(module.forward).parameters
            for module in (self.decoder, self.model)
        )

    def check_config(self) -> None:
        """Check that edits of the config do not contradict the model, and take its new limit.

        Raises:
            InvalidInputError: settings were edited that the model or this handle was made with.
        """
        state = fingerprint.config(self.config)
        if state == self._config_state:
            return
        rope.check_built_from_config(self.decoder)
        if layer_windows(self.config, len(self.windows)) != self.windows:
            raise InvalidInputError(
                "the config's sliding windows were edited after the engine was made; make a new"
                " one: StarLLM(model)"
            )
        self._read_config(state)

    def _read_config(self, state: int) -> None:
        """Take what the config says of positions; `state` is its fingerprint."""
        self._config_state = state
        self.max_positions = max_positions(self.config)
        self.doubt = doubt(self.config)

    def rope_length(self, reserved: int, needed: int | None) -> int | None:
        """Return the length that rotary frequencies are computed for; None if independent of it.

        Args:
            reserved: tokens of the context and of what is reserved for query and answer.
            needed: tokens of context, query and answer, where known: if they do without the
                frequencies for long texts, so does the context.
        """
        if self.unscaled_length is None:
            return None
        is_short = needed is not None and needed <= self.unscaled_length
        return min(reserved, self.unscaled_length) if is_short else reserved

    @property
    def device(self) -> torch.device:
        """Device of the token ids: the embeddings', if layers are spread over several devices."""
        return _device(self.model.get_input_embeddings()) or torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Precision of attention: the embeddings', since quantized weights have another."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    def layer_device(self, index: int) -> torch.device:
        """Device of a cache layer's keys and values."""
        # Not from the decoder's list of layers: some hold several attentions, each with a cache
        # layer of its own.
        devices = (
            _device(module)
            for module in self.decoder.modules()
            if getattr(module, "layer_idx", None) == index
        )
        return next((device for device in devices if device is not None), self.device)

    @cached_property
    def probe_result(self) -> ProbeResult:
        """Properties of the layers, observed in a forward of a few tokens."""
        return probe_layers(self)

    @property
    def layer_shapes(self) -> list[LayerKVShape | None]:
        """Shape of each cache layer's entries, None for layers that read another layer's keys."""
        return self.probe_result.layer_shapes

    @cached_property
    def compiled(self) -> CompiledLayers | None:
        """The layers through torch.compile, None if they run as they are."""
        with hook.lock_of(self.model):
            # Forwards that others have installed stay: accelerate's bring each module's weights.
            wanted = triton_works(self.device) if self._compile is None else self._compile
            return CompiledLayers(self) if wanted and not has_other_forwards(self.decoder) else None

    @cached_property
    def graphs(self) -> Graphs | None:
        """Forwards of few tokens as CUDA graphs, None if the model cannot run in them."""
        return Graphs(self) if self.compiled is not None and graphs.can_capture(self) else None

    @contextmanager
    def running(
        self, cache: StarCache, rope_length: int | None, compiled_for: str | None = None
    ) -> Iterator[None]:
        """Send the forwards of this thread inside the block through `cache`.

        Args:
            cache: the cache that stores and attends.
            rope_length: tokens for which length-dependent rotary frequencies are taken.
            compiled_for: mode of the compiled layers (`hf.execution.compiled`), None for layers as
                they are.
        """
        compiled = None if compiled_for is None else self.compiled
        way = hook.OVER if compiled is None else compiled.way(cache)
        model = (self.model, self.configs, self.rotaries)
        with ExitStack() as entered:
            entered.enter_context(hook.running(*model, cache, rope_length, way))
            if cache.slices is not None:
                entered.enter_context(cache.slices.active())
            if compiled_for is not None and compiled is not None:
                entered.enter_context(compiled.active(compiled_for))
            if cache.part is not None:
                entered.enter_context(cache.part.active())
            yield

    @torch.no_grad()
    def encode(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor,
        cache: StarCache,
        rope_length: int | None,
        *,
        logits_to_keep: int = 0,
        compiled_for: str | None = None,
        keys_only: bool = False,
    ) -> None:
        """Run one forward of the decoder alone, for its keys and values: no logits.

        Args:
            ids_BS: token ids.
            positions_BS: their positions, `[B, S]` or `[1, S]`.
            cache: the cache that stores and attends.
            rope_length: tokens for which length-dependent rotary frequencies are taken.
            logits_to_keep: last tokens whose logits another rank computes, 0 for all: some decoders
                send only these through their last layers.
            compiled_for: mode of the compiled layers, None for layers as they are.
            keys_only: end the forward with the last layer's keys, where it may (`last_layer`).
        """
        extra = {"logits_to_keep": logits_to_keep} if self._decoder_takes_logits_to_keep else {}
        cache.last_wanted = last_kv_layer(self) if keys_only else None
        with suppress(KeysAreStored), self.running(cache, rope_length, compiled_for):
            self.decoder(
                input_ids=ids_BS,
                position_ids=positions_BS.expand(ids_BS.shape[0], -1),
                use_cache=True,
                **{self._decoder_cache: _UniformCacheView(cache, self.config)},
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
        logits_to_keep: int = 1,
        compiled_for: str | None = None,
    ) -> Tensor:
        """Run one forward of the whole model.

        Args:
            ids_BS: token ids.
            positions_BS: their positions.
            cache: the cache that stores and attends.
            rope_length: tokens for which length-dependent rotary frequencies are taken.
            logits_to_keep: last tokens whose logits are computed, 0 for all.
            compiled_for: mode of the compiled layers, None for layers as they are.

        Returns:
            Logits, `[B, logits_to_keep, vocabulary]`, on the device of `ids_BS`.
        """
        extra: dict[str, Any] = {self._model_cache: _UniformCacheView(cache, self.config)}
        if self._takes_logits_to_keep:
            extra["logits_to_keep"] = logits_to_keep
        cache.begin(ids_BS, positions_BS, logits_to_keep)
        with self.running(cache, rope_length, compiled_for):
            logits: Tensor = self.model(
                input_ids=ids_BS,
                position_ids=positions_BS,
                use_cache=True,
                return_dict=True,
                **extra,
            ).logits
        return (logits[:, -logits_to_keep:] if logits_to_keep else logits).to(ids_BS.device)

    @contextmanager
    def generating(
        self, cache: StarCache, rope_length: int | None, whole_tokens: int | None
    ) -> Iterator[Any]:
        """A stand-in for the model whose every forward goes through `cache`, for stock `generate`.

        It shares everything with the model but its class, so nothing is installed in the model.

        Args:
            cache: the cache that stores and attends.
            rope_length: tokens for which length-dependent rotary frequencies are taken.
            whole_tokens: length of the prompt if it includes the tokens of the cache, else None.
        """
        stock: Any = type(self.model)
        running = self.running
        # A class is in reference cycles with itself. The list is emptied afterwards, so that a
        # context's memory does not wait for the garbage collector.
        holder = [cache]

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not holder or all(kwargs.get(name) is not holder[0] for name in _CACHE_ARGUMENTS):
                # A forward next to the answer's own: classifier-free guidance.
                return stock.__call__(self, *args, **kwargs)
            (cache,) = holder
            if whole_tokens is not None and kwargs["input_ids"].shape[1] >= whole_tokens:
                # Assisted decoding assumes an empty cache at its start, and passes the context
                # again.
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


class _UniformCacheView(Cache):
    """A cache as the model's code sees it: one class in both phases, so that compiled code serves
    both."""

    def __init__(self, cache: StarCache, config: Any) -> None:
        super().__init__(layers=cache.layers)
        self._config = config

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() and hook.is_within(self._config):
            # The attention operation stores them.
            hook.note_stored(self._config, key_states, value_states)
            return key_states, value_states
        return self._store(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]

    @torch.compiler.disable
    def _store(self, *args: Any, **kwargs: Any) -> Any:
        return super().update(*args, **kwargs)


def _finish_loading(model: Any) -> None:
    """Run the first forward of a quantized model that waits for it to unpack its weights.

    Our own forwards begin at the decoder, and so pass by the hooks of the whole model.
    """
    if getattr(model, "hf_quantizer", None) is not None and model._forward_pre_hooks:
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)


def _device(module: nn.Module) -> torch.device | None:
    """Device on which a module computes, None for a module without weights."""
    first = next((each for each in vars(module)["_parameters"].values() if each is not None), None)
    first = next(module.parameters(), None) if first is None else first
    if first is None or first.device.type != "meta":
        return None if first is None else first.device
    # accelerate keeps the weights elsewhere and brings them for each forward.
    devices = (
        getattr(getattr(submodule, "_hf_hook", None), "execution_device", None)
        for submodule in module.modules()
    )
    device = next((device for device in devices if device is not None), "meta")
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _positions(cache: StarCache, ids_BS: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Positions of a forward's tokens, as `generate` passes them or as the model derives them."""
    positions_BS: Tensor | None = arguments.get("position_ids")
    if positions_BS is not None:
        return positions_BS
    tokens, mask_BL = ids_BS.shape[1], arguments.get("attention_mask")
    if isinstance(mask_BL, Tensor) and mask_BL.dim() == 2:
        return (mask_BL.cumsum(-1) - 1).clamp_(min=0)[:, -tokens:]
    return (cache.seen_tokens + torch.arange(tokens, device=ids_BS.device)).expand_as(ids_BS)
