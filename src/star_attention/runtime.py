"""`Runtime`: a model, its tokenizer, settings and ranks, for everything above the phases."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import nn

from star_attention import methods
from star_attention._version import __version__
from star_attention.config import StarConfig
from star_attention.distributed.comm import Comm
from star_attention.distributed.environment import from_environment
from star_attention.errors import InvalidInputError, RankError, UnsupportedModelError
from star_attention.hf.execution.handle import ModelHandle
from star_attention.hf.execution.timing import Clock
from star_attention.hf.loading import identity, tensor_parallel
from star_attention.hf.loading.identities import Identities
from star_attention.hf.shape import model_shape
from star_attention.hf.text.checks import check_tokenizer
from star_attention.methods import Method
from star_attention.planning.advice import small_blocks
from star_attention.planning.calibration import ModelFacts
from star_attention.planning.lookback import layer_numbers
from star_attention.planning.plan import BlockPlan
from star_attention.planning.positions import Positions
from star_attention.planning.short import chosen_plan
from star_attention.planning.sizes import parse_size
from star_attention.storage.context import EncodedContext, RankStats, check_place
from star_attention.storage.transient import Transient


class Runtime(Transient):
    """A loaded model on its ranks, with the settings of one engine.

    Attributes:
        handle: the model as the two phases see it.
        tokenizer: its tokenizer, or None.
        config: the settings.
        comm: the ranks that share the work.
        source: how the model was named to `StarLLM.from_pretrained`; None if it was not.
        key: names the model to the other ranks.
        identities: what contexts depend on.
    """

    source: dict[str, Any] | None = None
    key: int = 0
    _base: Runtime | None = None

    _instead_of_deepcopy = "share it, or take one with other settings from with_config()"

    def __init__(self, handle: ModelHandle, tokenizer: Any, config: StarConfig, comm: Comm) -> None:
        self.handle, self.tokenizer, self.config, self.comm = handle, tokenizer, config, comm
        self.identities = Identities(handle.model, handle.outer)
        # Shared with the engines of `with_config`, so that one of them warns.
        self._warned: set[str] = set()

    @classmethod
    def start(
        cls,
        model: nn.Module,
        tokenizer: Any,
        *,
        config: StarConfig | None,
        settings: dict[str, Any],
        compile: bool | None,
        comm: Comm | str | None,
    ) -> Runtime:
        """Set up a model on its ranks and verify that they agree. Collective.

        Raises:
            UnsupportedModelError: the model cannot run, with the reasons.
            SizeError, InvalidInputError: settings that cannot work.
            RankError: ranks differ in what must be the same everywhere.
        """
        shard = tensor_parallel.model_shard(model)
        own = from_environment(comm) if shard is None else shard.comm
        started: list[Runtime] = []
        failure: Exception | None = None
        try:
            resolved = StarConfig.of(config, **settings)
            check_tokenizer(tokenizer)
            handle = ModelHandle(model, compile=compile)
            _check_lookback(resolved, handle)
            if shard is not None:
                _check_sharded_model(handle, shard, comm)
            started.append(cls(handle, tokenizer, resolved, own))
        except Exception as error:
            failure = error
        with own.collective("startup"):
            own.raise_if_any_failed(failure)
            (runtime,) = started
            if own.size > 1:
                runtime._join_ranks(is_sharded=shard is not None)
            runtime.key = own.engines.add(runtime)
        return runtime

    def _join_ranks(self, *, is_sharded: bool) -> None:
        """Verify that all ranks agree, and choose how tensors travel."""
        self._verify_ranks_agree()
        if not is_sharded:
            self.comm = self.comm.on(self.device)
        if self.comm.size > 1:
            # Probe the layers now: it takes a forward, which is not to count as work of a call, and
            # which tp ranks run together.
            self.handle.layer_shapes  # noqa: B018

    def _verify_ranks_agree(self) -> None:
        """Raise `RankError` on all ranks, naming what differs between them."""
        essentials = {
            "star_attention": __version__,
            "torch": torch.__version__.partition("+")[0],
            "transformers": transformers.__version__,
            "settings": asdict(self.config),
        } | self.identity
        first, *others = self.comm.gather(essentials)
        for rank, other in enumerate(others, start=1):
            difference = identity.difference(other, first)
            if difference is not None:
                field, value, first_value = difference
                message = (
                    f"it differs in {field}: {value}, but {first_value} on rank 0; all ranks need"
                    " the same"
                )
                raise self.comm.mark_collective(RankError(rank, "startup", message))

    def with_config(self, **changes: Any) -> Runtime:
        """Return the same model on the same ranks with other settings."""
        other = copy.copy(self)
        # The other ranks find this engine by that one's key.
        other._base = self._base or self
        other.config = StarConfig.of(self.config, **changes)
        _check_lookback(other.config, self.handle)
        return other

    def collective(self, where: str) -> AbstractContextManager[None]:
        """Run a call of this engine on all ranks; see `Control.collective`."""
        return self.comm.collective(where, about=(self.key, self.config))

    def warn_of_small_blocks(self, context_tokens: int) -> None:
        """Warn of many blocks of a few tokens, once for all engines over the same model."""
        if not self.method.shares_anchor or "small blocks" in self._warned:
            return
        if warning := small_blocks(self.config.block_size, context_tokens):
            self._warned.add("small blocks")
            warnings.warn(warning, stacklevel=4)

    # ------------------------------------------------------------------------------ sizes

    @property
    def method(self) -> Method:
        """The attention method that contexts are encoded with."""
        return methods.get(self.config.method)

    @property
    def device(self) -> torch.device:
        """Device of the token ids."""
        return self.handle.device

    @property
    def tokens_per_forward(self) -> int:
        """Most context tokens in one forward."""
        return self.config.forward_size(self.device.type, self.comm.cp_size)

    def plan_for(self, context_tokens: int) -> BlockPlan:
        """Return the block plan of a context of that length."""
        plan = self.method.plan(self.config, context_tokens, self.comm.cp_size)
        return chosen_plan(plan, self.config, self.device.type, lambda: self._shape)

    _shape = cached_property(lambda self: model_shape(self.handle.model.config))

    def rope_length(self, context_tokens: int, needed: int | None = None) -> int | None:
        """Return the length that rotary frequencies are computed for; None if independent of it."""
        return self.handle.rope_length(context_tokens + self.config.reserve_tokens, needed)

    # --------------------------------------------------------------------------- identity

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that an encoded context depends on: model, precision and tokenizer.

        Weights are read again where they show signs of a change (`hf.loading.fingerprint`).
        """
        return self.identities.of(self.tokenizer)

    def identity_within(self, seconds: float) -> dict[str, Any]:
        """Return `identity`, with all weights read again if that takes no longer than `seconds`."""
        return self.identities.of(self.tokenizer, within_s=seconds)

    def check_context(self, context: EncodedContext) -> None:
        """Raise an error unless this model, or an equal one, encoded the context.

        Raises:
            InvalidInputError: another type, or a context on another mesh.
            ContextMismatchError: another model, precision, tokenizer or set of adapters.
        """
        check_place(context, self.comm)
        self.identities.check(context, self.tokenizer)

    @property
    def positions(self) -> Positions:
        """The positions that a context, its query and its answer share."""
        handle, kwargs = self.handle, (self.source or {}).get("model_kwargs", {})
        return Positions(
            handle.max_positions,
            self.config.reserve_tokens,
            handle.short_length,
            # Who gives the scaling knows.
            doubt=None if kwargs.get("rope_scaling") else handle.doubt,
            warned=self._warned,
        )

    def need_tokenizer(self, purpose: str) -> Any:
        """Return the tokenizer.

        Raises:
            InvalidInputError: there is none; `purpose` says what needs it.
        """
        if self.tokenizer is None:
            raise InvalidInputError(
                f"{purpose} needs a tokenizer; give one to StarLLM, or use token ids"
            )
        return self.tokenizer

    # -------------------------------------------------------------------------- measuring

    @contextmanager
    def measured(self) -> Iterator[list[RankStats]]:
        """Fill the yielded list with what each context-parallel rank spent. Collective.

        All ranks leave the block together.
        """
        comm = self.comm
        clock = Clock(self.device)
        before, within_before = copy.copy(comm.cp_traffic), copy.copy(comm.tp_traffic)
        stats: list[RankStats] = []
        yield stats
        wires = comm.cp_traffic.since(before), comm.tp_traffic.since(within_before)
        spent = (*clock.stop(), *wires)
        everyone = comm.gather(spent)
        # Rank 0 takes part in every exchange, an idle rank in none.
        wire = everyone[0][2]
        for first in range(0, comm.size, comm.tp_size):
            seconds, peaks, _, within = zip(*everyone[first : first + comm.tp_size], strict=True)
            stats.append(
                RankStats(
                    busy_s=max(seconds),
                    peak_bytes=None if None in peaks else max(peaks),
                    wire=wire,
                    wire_within=within[0],
                )
            )


def model_facts(runtime: Runtime) -> ModelFacts:
    """Return what a calibration must share with this model."""
    return ModelFacts.of(runtime.identity, len(runtime.handle.windows))


class RuntimeView(Transient):
    """The public properties of an engine."""

    _instead_of_deepcopy = (
        "share it, take one with other settings from with_config(), or one with other weights from"
        " StarLLM(copy.deepcopy(star.model), star.tokenizer)"
    )

    runtime: Runtime

    @property
    def model(self) -> Any:
        """The model, as it was given."""
        return self.runtime.handle.outer

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; may be set."""
        return self.runtime.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.runtime.tokenizer = tokenizer

    @property
    def config(self) -> StarConfig:
        """The settings; `with_config` returns an engine with others."""
        return self.runtime.config

    @property
    def device(self) -> torch.device:
        """Device of the token ids."""
        return self.runtime.device

    @property
    def rank(self) -> int:
        """This process among all ranks; rank 0 leads."""
        return self.runtime.comm.rank

    @property
    def num_ranks(self) -> int:
        """Number of processes."""
        return self.runtime.comm.size

    @property
    def tensor_parallel(self) -> int:
        """Ranks that share the weights and heads of one model."""
        return self.runtime.comm.tp_size

    @property
    def tokens_per_forward(self) -> int:
        """Most context tokens in one forward."""
        return self.runtime.tokens_per_forward

    def context_bytes(self, context_tokens: int | str, kv_dtype: str | None = None) -> int:
        """Return the bytes of the keys and values of a context, on all ranks together.

        A context takes this much memory, and its saved file 8 bytes more per token, for its id.

        Args:
            context_tokens: length of the context, as a number or like "128k".
            kv_dtype: precision of keys and values, such as "fp8"; None for the engine's.
        """
        runtime = self.runtime
        config = runtime.config
        if kv_dtype is not None:
            config = StarConfig.of(config, kv_dtype=kv_dtype)
        plan = runtime.plan_for(parse_size(context_tokens, "context_tokens"))
        by_rank = methods.rank_bytes(runtime.method, config, plan, runtime.handle)
        return sum(by_rank) * runtime.comm.tp_size

    def rank_progress(self) -> list[tuple[int, int]]:
        """Return, for each context-parallel rank, tokens encoded so far and in all; [] on one."""
        status = self.runtime.comm.rank_status()[:: self.runtime.comm.tp_size]
        return [(rank.get("done", 0), rank.get("total", 0)) for rank in status]

    def __repr__(self) -> str:
        """Return e.g. `StarLLM(llama, star, block_size=1024, cpu, float32)`; no default sizes."""
        config, handle = self.config, self.runtime.handle
        sizes = [
            f"{name}={size}"
            for name in ("block_size", "anchor_size")
            if (size := getattr(config, name)) is not None
        ]
        if config.lookback:
            sizes += [f"lookback={config.lookback}", f"lookback_layers={config.lookback_layers}"]
        place = [str(self.device), str(handle.dtype).removeprefix("torch.")]
        ranks = [f"rank {self.rank} of {self.num_ranks}"] if self.num_ranks > 1 else []
        parts = [handle.config.model_type, config.method, *sizes, *place, *ranks]
        return f"{type(self).__name__}({', '.join(parts)})"


def _check_lookback(config: StarConfig, handle: ModelHandle) -> None:
    """Refuse look-back of methods without blocks, and in layers that the model does not have."""
    methods.check_lookback(config.method, config.lookback)
    if config.lookback:
        layer_numbers(config.lookback_layers, len(handle.windows))


def _check_sharded_model(
    handle: ModelHandle, shard: tensor_parallel.ModelShard, comm: Comm | str | None
) -> None:
    """Refuse settings that do not work with a sharded model."""
    if comm is not None and not shard.comm.has_same_ranks(comm):
        raise InvalidInputError(
            "comm names other ranks than this model was sharded over (tensor_parallel); leave comm"
            " out"
        )
    if handle.outer is not handle.model or identity.adapters(handle.outer):
        raise UnsupportedModelError(
            type(handle.outer).__name__,
            [
                "adapters do not work on a model sharded by tensor_parallel; merge or remove them,"
                " or load without tensor_parallel"
            ],
        )
