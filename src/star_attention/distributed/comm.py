"""Who shares a context: `SoloComm` for one process, `TorchComm` over torch.distributed for several.

Ranks stand in a mesh of ranks (the paper's word for what holds a shard of the context) and, within a host, of the ranks
that share its heads and weights. Without tensor parallelism each rank is a host. Rank r belongs to host
`r // tp_size`. What ranks exchange goes between ranks with the same heads (a lane).

Axes: B batch, Q query rows, H query heads, D head size.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import os
import socket
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from star_attention.attention.state import State, merge
from star_attention.config import STALL_S
from star_attention.distributed.world import Pending, World, dist
from star_attention.errors import InvalidInputError, release_frames_on_oom
from star_attention.planning import traffic
from star_attention.planning.traffic import Traffic


class Comm(Protocol):
    """What the phases need of the other ranks."""

    rank: int
    size: int
    cp_rank: int
    cp_size: int
    tp_rank: int
    tp_size: int
    traffic: Traffic
    traffic_within: Traffic

    def register(self, context: Any) -> int: ...
    def held(self, key: int | None) -> Any: ...
    def on(self, device: torch.device, tp_size: int = 1) -> Comm: ...
    def broadcast_object(self, message: Any) -> None: ...
    def receive_object(self) -> Any: ...
    def push_back(self, message: Any) -> None: ...
    def gather(self, value: Any) -> list[Any]: ...
    def run_on_rank_0(self, decision: Callable[[], Any]) -> Any: ...
    def raise_if_any_failed(self, failure: Exception | None) -> None: ...
    def mark_collective(self, error: Exception) -> Exception: ...
    def collective(
        self, where: str, *, check_in: bool = True
    ) -> contextlib.AbstractContextManager[None]: ...
    def tick(self, where: str | None = None) -> None: ...
    def progress(self, done: int, total: int) -> None: ...
    def rank_status(self) -> list[dict[str, Any]]: ...
    def merge(self, state: State) -> State: ...
    def broadcast(self, tensor: Tensor, ranks: int) -> Pending: ...
    def exchange(
        self, tensor: Tensor, received: Tensor, *, target: int, source: int, total: int
    ) -> Pending: ...
    def tp_sum(self, tensor: Tensor) -> Tensor: ...
    def tp_gather(self, tensor: Tensor) -> list[Tensor]: ...
    def has_same_ranks(self, comm: Any) -> bool: ...


class SoloComm:
    """One process: nothing to say to anybody."""

    rank, size = 0, 1
    cp_rank, cp_size = 0, 1
    tp_rank, tp_size = 0, 1

    def __init__(self) -> None:
        self.traffic, self.traffic_within = Traffic(), Traffic()

    def register(self, context: Any) -> int:
        return 0

    def held(self, key: int | None) -> Any:
        raise AssertionError("a single process is given its contexts")

    def on(self, device: torch.device, tp_size: int = 1) -> Comm:
        assert tp_size == 1
        return self

    def broadcast_object(self, message: Any) -> None:
        return

    def receive_object(self) -> Any:
        raise AssertionError("a single process leads")

    def push_back(self, message: Any) -> None:
        raise AssertionError("a single process leads")

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def run_on_rank_0(self, decision: Callable[[], Any]) -> Any:
        return decision()

    def raise_if_any_failed(self, failure: Exception | None) -> None:
        if failure is not None:
            raise failure

    def mark_collective(self, error: Exception) -> Exception:
        return error

    def collective(
        self, where: str, *, check_in: bool = True
    ) -> contextlib.AbstractContextManager[None]:
        return release_frames_on_oom()

    def tick(self, where: str | None = None) -> None:
        return

    def progress(self, done: int, total: int) -> None:
        return

    def rank_status(self) -> list[dict[str, Any]]:
        return []

    def merge(self, state: State) -> State:
        return state

    def broadcast(self, tensor: Tensor, ranks: int) -> Pending:
        return Pending()

    def exchange(
        self, tensor: Tensor, received: Tensor, *, target: int, source: int, total: int
    ) -> Pending:
        raise AssertionError("there is no other rank")

    def tp_sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def tp_gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def has_same_ranks(self, comm: Any) -> bool:
        return comm is self


class TorchComm(World):
    """Ranks over torch.distributed's transports, and the tensors that they exchange.

    merge_collective: "gather" or "reduce" instead of the one that moves fewer bytes; the other settings are `World`'s.
    """

    def __init__(self, *place: Any, merge_collective: str | None = None, **settings: Any) -> None:
        if merge_collective not in (None, "gather", "reduce"):
            raise InvalidInputError(
                f"merge_collective {merge_collective!r} is unknown; use None, 'gather' or 'reduce'"
            )
        super().__init__(*place, **settings)
        self.merge_collective = merge_collective
        self.traffic, self.traffic_within = Traffic(), Traffic()  # between ranks, and within them
        self.backend, self._device = "gloo", torch.device("cpu")
        self._arrange(1)

    @classmethod
    def wanted(cls) -> bool:
        """Whether the environment says that this process is one of several."""
        return (os.environ.get("WORLD_SIZE") or "1") != "1"

    # ------------------------------------------------------------------ the mesh

    def _arrange(self, tp_size: int) -> None:
        self.tp_size = tp_size
        self.cp_rank, self.tp_rank = divmod(self.rank, tp_size)
        self.cp_size = self.size // tp_size

    def on(self, device: torch.device, tp_size: int = 1) -> TorchComm:
        """The same ranks in a mesh, exchanging tensors of that device. Collective.

        Tensors go by NCCL where every rank has a GPU of its own, by gloo otherwise.
        """
        mine = None
        if device.type == "cuda":
            # (By its own number: where each rank is shown one GPU only, all call theirs 0.)
            mine = (socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid))
        everyone = self.gather(mine)
        own_gpu = None not in everyone and len(set(everyone)) == self.size
        mesh = copy.copy(self)
        mesh._arrange(tp_size)
        mesh.backend, mesh._device = "gloo", torch.device("cpu")
        if own_gpu and dist.is_nccl_available():
            torch.cuda.set_device(device)
            mesh.backend, mesh._device = "nccl", torch.device("cuda", torch.cuda.current_device())
        return mesh

    def has_same_ranks(self, comm: Any) -> bool:
        """Whether these are the ranks of `comm`, in whatever mesh."""
        return isinstance(comm, TorchComm) and comm._now is self._now

    def _lane(self, ranks: int | None = None) -> Any:
        """The ranks with this one's heads, of the first `hosts` ranks or of all."""
        stop = self.tp_rank + self.tp_size * ((ranks or self.cp_size) - 1) + 1
        return self.group(self.backend, range(self.tp_rank, stop, self.tp_size))

    def _row(self) -> Any:
        """The ranks of this one's host."""
        first = self.cp_rank * self.tp_size
        return self.group(self.backend, range(first, first + self.tp_size))

    # ------------------------------------------------------------------ tensors

    def broadcast(self, tensor: Tensor, ranks: int) -> Pending:
        """The first host's contiguous tensor, or room for it, to the first `hosts` ranks, of which this is one."""
        assert tensor.is_contiguous() and self.cp_rank < ranks <= self.cp_size
        self._count(traffic.broadcast_bytes(tensor.numel() * tensor.element_size(), ranks))
        staged = self._staged(tensor, fill=self.cp_rank == 0)
        pending = self.issue(self._lane(ranks), lambda group: group.broadcast(staged, 0))
        return Pending(lambda: self._unstage(pending, staged, tensor if self.cp_rank else staged))

    def exchange(
        self, tensor: Tensor, received: Tensor, *, target: int, source: int, total: int
    ) -> Pending:
        """Send a flat tensor to one host and receive one from another; either may be empty. Collective.

        total: numbers that move between all ranks together.
        """
        assert (
            tensor.dim() == received.dim() == 1
            and tensor.is_contiguous()
            and received.is_contiguous()
        )
        self._count(total * received.element_size())
        out, into = self._staged(tensor, fill=True), self._staged(received, fill=False)
        # (Not send and recv: gloo's cannot be waited for a while without breaking the connection.)
        sent, got = [0] * self.cp_size, [0] * self.cp_size
        sent[target], got[source] = out.numel(), into.numel()
        pending = self.issue(self._lane(), lambda group: group.alltoall_base(into, out, got, sent))
        return Pending(lambda: self._unstage(pending, into, received))

    def merge(self, state: State) -> State:
        """The state over all hosts' keys, the same bits on every host (paper, Algorithm 2)."""
        out_BQHD, lse_BQH = state.out_BQHD.float(), state.lse_BQH.contiguous()
        rows, size = lse_BQH.numel(), out_BQHD.shape[-1]
        how = self.merge_collective or traffic.merge_choice(self.cp_size, rows, size)
        if how == "gather":
            packed = torch.cat([out_BQHD, lse_BQH[..., None]], -1).contiguous()
            self._count(traffic.gather_bytes(packed.numel() * packed.element_size(), self.cp_size))
            parts = [
                part.to(packed.device)
                for part in self.collect(self._staged(packed, fill=True), self._lane())
            ]
            return merge([State(part[..., :-1], part[..., -1]) for part in parts])
        top_BQH = self._reduced(lse_BQH.clone(), dist.ReduceOp.MAX)
        # Rows that no host has keys for: -inf - -inf is NaN, and any weight is right for a zero row.
        weight_BQH = (lse_BQH - top_BQH).exp().nan_to_num(0.0)
        packed = torch.cat(
            [out_BQHD * weight_BQH[..., None], weight_BQH[..., None]], -1
        ).contiguous()
        packed = self._reduced(packed, dist.ReduceOp.SUM)
        sum_BQH = packed[..., -1]
        out_BQHD = packed[..., :-1] / sum_BQH.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        return State(out_BQHD, top_BQH + sum_BQH.log())

    def _reduced(self, tensor: Tensor, op: Any) -> Tensor:
        staged = self._staged(tensor, fill=True)
        self._count(traffic.reduce_bytes(tensor.numel() * tensor.element_size(), self.cp_size))
        self.issue(self._lane(), lambda group: group.allreduce(staged, op)).wait()
        return staged.to(tensor.device)

    def tp_sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks of this host, in the tensor's own precision and, where it can be, in its place."""
        if self.tp_size == 1:
            return tensor
        staged = self._staged(tensor.contiguous(), fill=True)
        self.traffic_within.add(
            traffic.reduce_bytes(staged.numel() * staged.element_size(), self.tp_size)
        )
        self.issue(self._row(), lambda group: group.allreduce(staged, dist.ReduceOp.SUM)).wait()
        return staged.to(tensor.device)

    def tp_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks of this host, which have one shape, in the order of ranks; on the CPU with gloo."""
        if self.tp_size == 1:
            return [tensor]
        part = self._staged(tensor.contiguous(), fill=True)
        self.traffic_within.add(
            traffic.gather_bytes(part.numel() * part.element_size(), self.tp_size)
        )
        return self.collect(part, self._row())

    def _count(self, bytes: int) -> None:
        """All lanes do the same at the same time."""
        self.traffic.add(bytes * self.tp_size, self.tp_size)

    def _staged(self, tensor: Tensor, *, fill: bool) -> Tensor:
        """The tensor where the transport can reach it: in the host's memory with gloo, on the rank's own GPU with NCCL."""
        if tensor.device == self._device:
            return tensor
        return tensor.to(self._device) if fill else torch.empty_like(tensor, device=self._device)

    @staticmethod
    def _unstage(pending: Pending, staged: Tensor, tensor: Tensor) -> None:
        pending.wait()
        if staged is not tensor:
            tensor.copy_(staged)


def from_environment(comm: Any, *, stall_s: float = STALL_S) -> Comm:
    """The communicator that `StarLLM(comm=...)` means: None takes torchrun's environment if there is one.

    stall_s: the longest silence of a rank; counts when the first engine of a process is made.
    """
    if isinstance(comm, (SoloComm, TorchComm)):
        return comm
    if comm not in (None, "solo"):
        raise InvalidInputError(
            f"comm {comm!r} is unknown; use None, 'solo' for one process, or a TorchComm"
        )
    if comm == "solo" or not (
        TorchComm.wanted() or (dist.is_initialized() and dist.get_world_size() > 1)
    ):
        return SoloComm()
    if not _OWN:
        _OWN.append(TorchComm.from_environment(stall_s=stall_s))
        atexit.register(_OWN[0].close)
    return _OWN[0]


_OWN: list[TorchComm] = []  # one for all engines of a process


def own() -> TorchComm | None:
    """The communicator that this process made from torchrun's environment, if it has."""
    return _OWN[0] if _OWN else None
