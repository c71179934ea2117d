"""The time of a decode step on a mesh: bytes that a rank reads, and collectives in between.

A step of one row reads weights, keys and values at the rate of the memory. Each layer adds a
constant for what its kernels take beyond reading. Collectives wait for each other and for
everything else. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from star_attention.planning import traffic
from star_attention.planning.hardware import Hardware
from star_attention.planning.model_shape import ModelShape
from star_attention.planning.traffic import Traffic

SLICED = ("attention", "mlp", "head")
"""Parts of a model whose weights ranks multiply in slices (`slice_weights`)."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Ranks that answer together.

    Attributes:
        ranks: context-parallel ranks.
        tensor_parallel: devices of each, which share the weights.
        sliced: True if context-parallel ranks multiply slices of the weights.
    """

    ranks: int = 1
    tensor_parallel: int = 1
    sliced: bool = False

    @property
    def devices(self) -> int:
        return self.ranks * self.tensor_parallel


def weight_bytes_read(shape: ModelShape, mesh: Mesh) -> int:
    """Return the bytes of weights that a device reads for a token.

    Tensor parallelism shards layers, and leaves the head whole. Slices share everything.
    """
    layers, head = shape.linear_parameters, shape.head_parameters
    sharded = min(shape.sharded_parameters, layers)
    layers -= sharded - sharded // mesh.tensor_parallel
    if mesh.sliced:
        layers, head = layers // mesh.ranks, head // mesh.ranks
    read = layers * shape.linear_bytes // max(1, shape.linear_parameters)
    return read + head * shape.bytes_per_element


def token_traffic(shape: ModelShape, mesh: Mesh) -> Traffic:
    """Count the collectives of a step of one row, and the bytes that they move on all devices."""
    forward: dict[str, Any] = dict(
        query_tokens=1,
        answer_tokens=1,
        tokens_per_forward=1,
        tensor_parallel=mesh.tensor_parallel,
    )
    sliced = SLICED if mesh.sliced and mesh.ranks > 1 else ()
    between = traffic.phase2_cp(shape, mesh.ranks, sliced=sliced, **forward)
    within = traffic.phase2_tp(shape, mesh.ranks, **forward)
    # Lanes and rows of the mesh work at the same time.
    calls = between.calls // mesh.tensor_parallel + within.calls // mesh.ranks
    return Traffic(calls, between.bytes + within.bytes)


def token_seconds(shape: ModelShape, on: Hardware, mesh: Mesh, stored_bytes: int) -> float:
    """Return the seconds of a step of one row.

    Args:
        shape: the model.
        on: the device and its link.
        mesh: the ranks.
        stored_bytes: keys and values of the fullest device.
    """
    read_s = (weight_bytes_read(shape, mesh) + stored_bytes) / on.bandwidth
    wire = token_traffic(shape, mesh)
    wire_s = wire.calls * on.exchange_s + wire.bytes / mesh.devices / on.link
    return read_s + shape.layers * on.gap + wire_s
