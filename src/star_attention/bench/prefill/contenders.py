"""The methods that `bench prefill` compares: the work timed for each, and its predicted cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend

from star_attention.bench.benchmark import Target
from star_attention.bench.models import weight_bytes
from star_attention.engine import StarLLM
from star_attention.planning import cost
from star_attention.planning.cost import Flops
from star_attention.planning.model_shape import ModelShape
from star_attention.planning.plan import BlockPlan
from star_attention.tools.baselines import STOCK_BACKENDS, official_encode, stock_prefill


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of this library's engine; `StarLLM` explains them."""

    tokens_per_forward: str | None = None
    compile: bool | None = None
    kv_dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A function to time, and its cost.

    Attributes:
        encode: encodes the context.
        warm_up: encodes a short context, which compiles layers; None if none are compiled.
        flops: operations that the method needs.
        fixed_bytes: weights, and keys and values of the context.
        kv_dtype: precision of the stored keys and values, if it is not the model's.
    """

    encode: Callable[[], Any]
    warm_up: Callable[[], Any] | None = None
    flops: Flops
    fixed_bytes: int
    kv_dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class Contender(ABC):
    """A way to encode a context.

    Attributes:
        takes_block: True if each block size has its own row; False for dense attention.
        needs_cuda: True if it runs on CUDA devices only.
        featured: True if the picture of speed-ups shows it.
    """

    takes_block: bool
    needs_cuda: bool = False
    featured: bool = False

    @abstractmethod
    def prepare(
        self, target: Target, ids_L: Tensor, block: int | None, settings: EngineSettings
    ) -> Workload:
        """Prepare to encode the token ids `[L]`, without using the device."""


@dataclass(frozen=True, kw_only=True)
class Stock(Contender):
    """transformers' own prefill; `backend` pins torch's attention kernel."""

    backend: SDPBackend | None
    takes_block: bool = False

    def prepare(
        self, target: Target, ids_L: Tensor, block: int | None, settings: EngineSettings
    ) -> Workload:
        plan = BlockPlan.dense(len(ids_L))
        return Workload(
            encode=partial(stock_prefill, target.model, ids_L, self.backend),
            flops=dense_flops(target.shape, len(ids_L)),
            fixed_bytes=weight_bytes(target.model) + _kv_bytes(target.shape, plan, None),
        )


@dataclass(frozen=True, kw_only=True)
class Engine(Contender):
    """`StarLLM.encode` with one of the library's methods."""

    method: str

    def prepare(
        self, target: Target, ids_L: Tensor, block: int | None, settings: EngineSettings
    ) -> Workload:
        star = self.engine(target.model, block, settings)
        plan = star.runtime.plan_for(len(ids_L))
        return Workload(
            encode=partial(star.encode, ids_L),
            warm_up=_warm_up(star, ids_L),
            flops=self.flops(target.shape, plan, star.tokens_per_forward),
            fixed_bytes=weight_bytes(target.model)
            + self.kv_bytes(target.shape, plan, settings.kv_dtype),
            kv_dtype=settings.kv_dtype,
        )

    def engine(self, model: Any, block: int | None, settings: EngineSettings) -> StarLLM:
        return StarLLM(
            model,
            block_size=block,
            method=self.method,
            tokens_per_forward=settings.tokens_per_forward,
            compile=settings.compile,
            comm="solo",
            kv_dtype=settings.kv_dtype,
        )

    def flops(self, shape: ModelShape, plan: BlockPlan, tokens_per_forward: int) -> Flops:
        return cost.phase1(shape, plan, tokens_per_forward=tokens_per_forward)

    def kv_bytes(self, shape: ModelShape, plan: BlockPlan, kv_dtype: str | None) -> int:
        return _kv_bytes(shape, plan, kv_dtype)


@dataclass(frozen=True, kw_only=True)
class Window(Engine):
    """The same for StreamingLLM, whose block is its window."""

    def flops(self, shape: ModelShape, plan: BlockPlan, tokens_per_forward: int) -> Flops:
        return cost.phase1_streaming(shape, plan)

    def kv_bytes(self, shape: ModelShape, plan: BlockPlan, kv_dtype: str | None) -> int:
        stored = min(plan.context_tokens, plan.anchor_size + plan.block_size)
        return stored * shape.stored_bytes_per_token(kv_dtype)


@dataclass(frozen=True, kw_only=True)
class Official(Engine):
    """The official implementation's scheme, on this library's kernels."""

    def prepare(
        self, target: Target, ids_L: Tensor, block: int | None, settings: EngineSettings
    ) -> Workload:
        star = self.engine(target.model, block, settings)
        plan = star.runtime.plan_for(len(ids_L))
        return Workload(
            encode=partial(
                official_encode, star.runtime.handle, ids_L, plan, star.tokens_per_forward
            ),
            warm_up=_warm_up(star, ids_L),
            flops=cost.phase1_official(target.shape, plan),
            fixed_bytes=weight_bytes(target.model) + _kv_bytes(target.shape, plan, None),
        )


CONTENDERS: dict[str, Contender] = {
    **{
        name: Stock(backend=backend, needs_cuda=backend is not None)
        for name, backend in STOCK_BACKENDS.items()
    },
    "dense": Engine(method="dense", takes_block=False),
    "official": Official(method="star", takes_block=True),
    "streaming_llm": Window(method="streaming_llm", takes_block=True),
    "star": Engine(method="star", takes_block=True, featured=True),
}
"""By name, in the order of measurement: baselines first."""

BASELINES = tuple(name for name, contender in CONTENDERS.items() if not contender.takes_block)
"""Dense attention, which speed-ups are relative to."""
OURS_FIRST = ("dense", *STOCK_BACKENDS)
"""The same, this library's first."""


def dense_flops(shape: ModelShape, tokens: int) -> Flops:
    """Count the operations of dense attention in one forward."""
    return cost.phase1(shape, BlockPlan.dense(tokens), tokens_per_forward=tokens)


def _kv_bytes(shape: ModelShape, plan: BlockPlan, kv_dtype: str | None) -> int:
    memory = cost.memory_per_rank(shape, plan, tokens_per_forward=1, kv_dtype=kv_dtype)
    return memory.kv + memory.anchor


def _warm_up(star: StarLLM, ids_L: Tensor) -> Callable[[], Any]:
    return partial(star.encode, ids_L[: 2 * star.tokens_per_forward])
