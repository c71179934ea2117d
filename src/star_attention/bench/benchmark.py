"""Common parts of all benchmarks: a target, settings, rows, a table, a record and pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch

from star_attention.bench.models import model_name, weight_bytes
from star_attention.distributed import Comm, SoloComm
from star_attention.engine import StarLLM
from star_attention.errors import OutOfMemoryError
from star_attention.hf.loading import fp8
from star_attention.hf.shape import model_shape
from star_attention.planning.model_shape import ModelShape
from star_attention.planning.segments import Segments
from star_attention.planning.stored import segments_bytes
from star_attention.tools import machine
from star_attention.tools.machine import Ceilings, Progress

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RowT = TypeVar("RowT", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class Target:
    """The model that is measured, on its device and its ranks.

    Attributes:
        model: a transformers model in evaluation mode, or this rank's shard of one.
        shape: what the whole model's cost depends on.
        ceilings: of rank 0's device, in the model's precision.
        progress: called with a line before each measurement.
        comm: the ranks.
        tensor_parallel: ranks that share the weights of one model.
    """

    model: Any
    shape: ModelShape
    ceilings: Ceilings
    progress: Progress
    comm: Comm = field(default_factory=SoloComm)
    tensor_parallel: int = 1
    _engines: dict[tuple[bool, bool | None], StarLLM] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: Any,
        progress: Progress,
        comm: Comm | None = None,
        tensor_parallel: int = 1,
    ) -> Target:
        """Measure the ceilings of a model's device. Collective."""
        comm = comm or SoloComm()
        weight = next(model.parameters())
        ceilings = machine.measure_ceilings(weight.device, weight.dtype)
        with comm.collective("a benchmark"):
            ceilings = comm.run_on_rank_0(lambda: ceilings)
        return cls(
            model=model,
            shape=_shape(model, _dtype_name(weight.dtype)),
            ceilings=ceilings,
            progress=progress,
            comm=comm,
            tensor_parallel=tensor_parallel,
        )

    def engine(
        self, *, alone: bool = False, compile: bool | None = None, **settings: Any
    ) -> StarLLM:
        """Return an engine over the model; what it compiles and captures is shared. Collective.

        Args:
            alone: on this rank only.
            compile: as for `StarLLM`.
            settings: fields of `StarConfig`.
        """
        base = self._engines.get((alone, compile))
        if base is None:
            base = StarLLM(self.model, compile=compile, comm="solo" if alone else self.comm)
            self._engines[alone, compile] = base
        return base.with_config(**settings)

    def comm_of(self, *, alone: bool) -> Comm:
        """Return all ranks, or this one alone."""
        return SoloComm() if alone else self.comm

    def check_memory(
        self, star: StarLLM, context_tokens: int, layout: Sequence[Segments] | None = None
    ) -> None:
        """Refuse a context that does not fit, before minutes are spent on it.

        Args:
            star: the engine to encode with.
            context_tokens: length of the context.
            layout: the tokens of each context-parallel rank, if not those of the blocks.

        Raises:
            OutOfMemoryError: weights, keys and values are more than a GPU's memory.
        """
        if self.device.type != "cuda" or star.config.kv_device is not None:
            return
        plan, comm = star.runtime.plan_for(context_tokens), star.runtime.comm
        tokens = (layout or plan.layout)[comm.cp_rank]
        kv = segments_bytes(
            self.shape, tokens, context_tokens, star.config.kv_dtype, star.config.kv_windows
        )
        needed = weight_bytes(self.model) + kv // comm.tp_size
        memory = torch.cuda.get_device_properties(self.device).total_memory
        if needed > memory:
            raise OutOfMemoryError(
                f"{needed:,} bytes of weights, keys and values are more than the device's"
                f" {memory:,}; use more ranks, or a shorter context"
            )

    @property
    def ranks(self) -> int:
        return self.comm.size

    @property
    def is_first(self) -> bool:
        """True on the rank that measures alone and prints."""
        return self.comm.rank == 0

    @property
    def name(self) -> str:
        return model_name(self.model)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def dtype_name(self) -> str:
        return _dtype_name(self.dtype)

    @property
    def weights(self) -> str | None:
        """Precision of the linear layers, if it is not that of the model."""
        return self.shape.weights


class Benchmark(ABC, Generic[RowT]):
    """A benchmark: a frozen dataclass of its settings.

    `name` is its command and the name of its JSON file. `RowT` is a frozen dataclass whose fields
    are the fields of a row of the JSON.
    """

    name: ClassVar[str]

    @property
    def longest_input(self) -> int:
        """Number of positions that the model needs."""
        return 0

    @abstractmethod
    def run(self, target: Target) -> Iterator[RowT]:
        """Measure everything, in order; yield each row when it is measured. Collective.

        A row of rank 0 alone has no numbers on the other ranks.
        """

    @abstractmethod
    def table(self, rows: list[RowT]) -> list[tuple[str, ...]]:
        """Return the cells of a table for people, its header first."""

    def comparison(self, rows: list[RowT]) -> list[tuple[str, ...]]:
        """Return the cells of a second table, such as published numbers next to ours; or none."""
        return []

    def draw(self, rows: list[RowT], ceilings: Ceilings, folder: Path) -> list[Path]:
        """Draw the pictures into an existing folder; return the files written."""
        return []

    def record(self, target: Target, rows: Sequence[RowT]) -> dict[str, Any]:
        """Return the contents of the JSON."""
        return {
            "benchmark": self.name,
            "model": target.name,
            "dtype": target.dtype_name,
            "weights": target.weights,
            "ranks": target.ranks,
            "tensor_parallel": target.tensor_parallel,
            **machine.record(target.device, target.ceilings),
            "rows": [asdict(row) for row in rows],
        }


def _shape(model: Any, dtype: str) -> ModelShape:
    shape = model_shape(model.config, dtype)
    return shape if fp8.precision(model) == fp8.AS_LOADED else shape.in_fp8()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
