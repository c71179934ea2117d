"""The methods that `bench prefill` compares: the work timed for each, and its predicted cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend

from star_attention.bench.benchmark import Target
from star_attention.bench.models import weight_bytes
from star_attention.distributed import Comm
from star_attention.engine import StarLLM
from star_attention.planning import cost
from star_attention.planning.cost import Flops
from star_attention.planning.helping import Help, helps_of_shape
from star_attention.planning.model_shape import ModelShape
from star_attention.planning.plan import BlockPlan
from star_attention.planning.quality import QUALITIES
from star_attention.planning.ring import ring_layout
from star_attention.planning.segments import Segments
from star_attention.planning.stored import segments_bytes
from star_attention.planning.windows import ALL, LAST
from star_attention.tools.baselines import STOCK_BACKENDS, official_encode, stock_prefill


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of this library's engine; `StarLLM` explains them."""

    anchor_size: str | None = None
    tokens_per_forward: str | None = None
    compile: bool | None = None
    kv_dtype: str | None = None
    balance_ranks: bool = True


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to encode, and on which ranks.

    Attributes:
        target: the model.
        ids_L: token ids `[L]`.
        block: block size in tokens; None for dense attention.
        settings: of the engine.
        alone: on rank 0 only.
    """

    target: Target
    ids_L: Tensor
    block: int | None
    settings: EngineSettings
    alone: bool = True

    @property
    def comm(self) -> Comm:
        """The ranks that encode."""
        return self.target.comm_of(alone=self.alone)

    @property
    def cp_ranks(self) -> int:
        """Ranks that share the context."""
        return self.comm.size // self.tensor_parallel

    @property
    def tensor_parallel(self) -> int:
        return 1 if self.alone else self.target.tensor_parallel


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A function to time, and its cost.

    Attributes:
        encode: encodes the context.
        warm_up: encodes a short context, which compiles layers; None if none are compiled.
        comm: counts what the ranks exchange.
        flops: operations that the method needs, on all ranks together.
        busiest_flops: operations of the busiest device.
        helped_layers: layers that rank 0 computes for each of the other ranks that it helps.
        fixed_bytes: weights, and keys and values of the context, of each context-parallel rank.
        kv_dtype: precision of the stored keys and values, if it is not the model's.
    """

    encode: Callable[[], Any]
    warm_up: Callable[[], Any] | None = None
    comm: Comm
    flops: Flops
    busiest_flops: int
    helped_layers: tuple[int, ...] = ()
    fixed_bytes: list[int]
    kv_dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class Contender(ABC):
    """A way to encode a context.

    Attributes:
        takes_block: True if each block size has its own row; False for dense attention.
        by_rule: True if the engine chooses the block size.
        needs_cuda: True if it runs on CUDA devices only.
        needs_ranks: True if it shares the work of one context over several ranks only.
        needs_solitude: True if it runs on one rank only.
        featured: True if the picture of speed-ups shows it.
    """

    takes_block: bool
    by_rule: bool = False
    needs_cuda: bool = False
    needs_ranks: bool = False
    needs_solitude: bool = False
    featured: bool = False

    @abstractmethod
    def prepare(self, job: Job) -> Workload:
        """Prepare to encode, without using the device. Collective among the job's ranks."""


@dataclass(frozen=True, kw_only=True)
class Stock(Contender):
    """transformers' own prefill; `backend` pins torch's attention kernel."""

    backend: SDPBackend | None
    takes_block: bool = False
    needs_solitude: bool = True

    def prepare(self, job: Job) -> Workload:
        model, tokens = job.target.model, len(job.ids_L)
        plan, flops = BlockPlan.dense(tokens), dense_flops(job.target.shape, tokens)
        return Workload(
            encode=partial(stock_prefill, model, job.ids_L, self.backend),
            comm=job.comm,
            flops=flops,
            busiest_flops=flops.total,
            fixed_bytes=[weight_bytes(model) + _kv_bytes(job, plan, None, 0)],
        )


@dataclass(frozen=True, kw_only=True)
class Engine(Contender):
    """`StarLLM.encode` with one of the library's methods, and a preset of look-back."""

    method: str
    quality: str | None = None

    def prepare(self, job: Job) -> Workload:
        star = self.engine(job)
        plan = star.runtime.plan_for(len(job.ids_L))
        job.target.check_memory(star, len(job.ids_L), self.stored(plan))
        forward, kv_dtype = star.tokens_per_forward, job.settings.kv_dtype
        return Workload(
            encode=self.work(star, job, plan),
            warm_up=partial(star.encode, job.ids_L[: 2 * forward * job.cp_ranks]),
            comm=star.runtime.comm,
            flops=_sum(self.flops(job, plan, forward, rank) for rank in range(job.cp_ranks)),
            busiest_flops=max(
                self.flops(job, plan, forward, rank).total for rank in range(job.cp_ranks)
            )
            // job.tensor_parallel,
            helped_layers=tuple(given.layers for given in self.helps(job, plan, forward)),
            fixed_bytes=[
                weight_bytes(job.target.model) + self.kv_bytes(job, plan, rank)
                for rank in range(job.cp_ranks)
            ],
            kv_dtype=kv_dtype,
        )

    def stored(self, plan: BlockPlan) -> Sequence[Segments]:
        """Return the tokens that each context-parallel rank keeps."""
        return plan.layout

    def engine(self, job: Job) -> StarLLM:
        return job.target.engine(
            alone=job.alone,
            compile=job.settings.compile,
            block_size=job.block,
            method=self.method,
            quality=self.quality,
            anchor_size=job.settings.anchor_size if self.takes_block else None,
            tokens_per_forward=job.settings.tokens_per_forward,
            kv_dtype=job.settings.kv_dtype,
            balance_ranks=job.settings.balance_ranks,
        )

    def work(self, star: StarLLM, job: Job, plan: BlockPlan) -> Callable[[], Any]:
        return partial(star.encode, job.ids_L)

    def flops(self, job: Job, plan: BlockPlan, forward: int, rank: int) -> Flops:
        shape, helps = job.target.shape, self.helps(job, plan, forward)
        return cost.phase1(shape, plan, tokens_per_forward=forward, rank=rank, helps=helps)

    def helps(self, job: Job, plan: BlockPlan, forward: int) -> list[Help]:
        """Return what rank 0 computes for others."""
        balance_ranks = job.settings.balance_ranks
        return helps_of_shape(
            job.target.shape, plan, tokens_per_forward=forward, balance_ranks=balance_ranks
        )

    def kv_bytes(self, job: Job, plan: BlockPlan, rank: int) -> int:
        return _kv_bytes(job, plan, job.settings.kv_dtype, rank)


@dataclass(frozen=True, kw_only=True)
class Window(Engine):
    """The same for StreamingLLM, whose block is its window."""

    needs_solitude: bool = True

    def stored(self, plan: BlockPlan) -> Sequence[Segments]:
        return [Segments.prefix(min(plan.context_tokens, plan.anchor_size + plan.block_size))]

    def flops(self, job: Job, plan: BlockPlan, forward: int, rank: int) -> Flops:
        return cost.phase1_streaming(job.target.shape, plan)

    def kv_bytes(self, job: Job, plan: BlockPlan, rank: int) -> int:
        stored = min(plan.context_tokens, plan.anchor_size + plan.block_size)
        return stored * job.target.shape.stored_bytes_per_token(job.settings.kv_dtype)


@dataclass(frozen=True, kw_only=True)
class Official(Engine):
    """The official implementation's scheme, on this library's kernels."""

    def work(self, star: StarLLM, job: Job, plan: BlockPlan) -> Callable[[], Any]:
        return partial(
            official_encode,
            star.runtime.handle,
            job.ids_L,
            plan,
            star.tokens_per_forward,
            cp_rank=star.runtime.comm.cp_rank,
        )

    def helps(self, job: Job, plan: BlockPlan, forward: int) -> list[Help]:
        return []

    def flops(self, job: Job, plan: BlockPlan, forward: int, rank: int) -> Flops:
        return cost.phase1_official(job.target.shape, plan, rank)

    def kv_bytes(self, job: Job, plan: BlockPlan, rank: int) -> int:
        # It drops nothing.
        return _kv_bytes(job, plan, job.settings.kv_dtype, rank, ALL)


@dataclass(frozen=True, kw_only=True)
class RingEngine(Engine):
    """Ring attention in one of its layouts."""

    layout: str
    takes_block: bool = False
    needs_ranks: bool = True

    def engine(self, job: Job) -> StarLLM:
        return super().engine(job).with_config(ring_layout=self.layout)

    def helps(self, job: Job, plan: BlockPlan, forward: int) -> list[Help]:
        return []

    def flops(self, job: Job, plan: BlockPlan, forward: int, rank: int) -> Flops:
        return cost.phase1_ring(job.target.shape, self.stored(plan)[rank])

    def stored(self, plan: BlockPlan) -> Sequence[Segments]:
        return ring_layout(plan.context_tokens, plan.ranks, self.layout)

    def kv_bytes(self, job: Job, plan: BlockPlan, rank: int) -> int:
        own, kv_dtype = self.stored(plan)[rank], job.settings.kv_dtype
        kv_bytes = segments_bytes(job.target.shape, own, plan.context_tokens, kv_dtype)
        return kv_bytes // job.tensor_parallel


CONTENDERS: dict[str, Contender] = {
    **{
        name: Stock(backend=backend, needs_cuda=backend is not None)
        for name, backend in STOCK_BACKENDS.items()
    },
    "dense": Engine(method="dense", takes_block=False, needs_solitude=True),
    "ring": RingEngine(method="ring", layout="zigzag"),
    "ring-contiguous": RingEngine(method="ring", layout="contiguous"),
    "official": Official(method="star", takes_block=True),
    "streaming_llm": Window(method="streaming_llm", takes_block=True),
    **{
        quality: Engine(method="star", quality=quality, takes_block=True)
        for quality in QUALITIES
        if quality != "paper"
    },
    "default": Engine(method="star", takes_block=False, by_rule=True),
    "star": Engine(method="star", takes_block=True, featured=True),
}
"""By name, in the order of measurement: baselines first."""

BASELINES = tuple(
    name
    for name, contender in CONTENDERS.items()
    if not (contender.takes_block or contender.by_rule)
)
"""Dense attention, which speed-ups are relative to."""
OURS_FIRST = ("dense", *STOCK_BACKENDS)
"""That of one rank, this library's first."""
DEFAULT_METHODS = ("stock", "dense", "official", "star")
DEFAULT_METHODS_ON_RANKS = ("ring", "ring-contiguous", "official", "star")


def dense_flops(shape: ModelShape, tokens: int) -> Flops:
    """Count the operations of dense attention in one forward."""
    return cost.phase1(shape, BlockPlan.dense(tokens), tokens_per_forward=tokens)


def _sum(parts: Iterable[Flops]) -> Flops:
    parts = list(parts)
    return Flops(
        linear=sum(part.linear for part in parts),
        attention=sum(part.attention for part in parts),
        expansion=sum(part.expansion for part in parts),
    )


def _kv_bytes(
    job: Job, plan: BlockPlan, kv_dtype: str | None, rank: int, kv_windows: str = LAST
) -> int:
    memory = cost.memory_per_rank(
        job.target.shape,
        plan,
        tokens_per_forward=1,
        kv_dtype=kv_dtype,
        kv_windows=kv_windows,
        rank=rank,
        tensor_parallel=job.tensor_parallel,
    )
    return memory.kv + memory.anchor
