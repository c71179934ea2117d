"""Common parts of all benchmarks: a target, settings, rows, a table, a record and pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch

from star_attention.bench.models import model_name
from star_attention.hf.shape import model_shape
from star_attention.planning.model_shape import ModelShape
from star_attention.tools import machine
from star_attention.tools.machine import Ceilings, Progress

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RowT = TypeVar("RowT", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class Target:
    """The model that is measured, on its device.

    Attributes:
        model: a transformers model in evaluation mode.
        shape: what its cost depends on.
        ceilings: of its device, in its precision.
        progress: called with a line before each measurement.
    """

    model: Any
    shape: ModelShape
    ceilings: Ceilings
    progress: Progress

    @classmethod
    def of(cls, model: Any, progress: Progress) -> Target:
        """Measure the ceilings of a model's device."""
        weight = next(model.parameters())
        return cls(
            model=model,
            shape=model_shape(model.config, _dtype_name(weight.dtype)),
            ceilings=machine.measure_ceilings(weight.device, weight.dtype),
            progress=progress,
        )

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
    def run(self, target: Target) -> list[RowT]:
        """Measure everything, in order."""

    @abstractmethod
    def table(self, rows: list[RowT]) -> list[tuple[str, ...]]:
        """Return the cells of a table for people, its header first."""

    def draw(self, rows: list[RowT], ceilings: Ceilings, folder: Path) -> list[Path]:
        """Draw the pictures into an existing folder; return the files written."""
        return []

    def record(self, target: Target, rows: Sequence[RowT]) -> dict[str, Any]:
        """Return the contents of the JSON."""
        return {
            "benchmark": self.name,
            "model": target.name,
            "dtype": target.dtype_name,
            **machine.record(target.device, target.ceilings),
            "rows": [asdict(row) for row in rows],
        }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
