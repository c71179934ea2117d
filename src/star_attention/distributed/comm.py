"""The interface to the other ranks: three protocols, and `Comm`, which combines them.

Ranks form a mesh. `cp_rank` of `cp_size` (context parallel) says which shard of the context a rank
holds, `tp_rank` of `tp_size` (tensor parallel) which share of the heads and weights. Rank r has
`cp_rank` r // tp_size and `tp_rank` r % tp_size. Without tensor parallelism each rank is a cp rank.

`SoloComm` (solo.py) implements them for one process, `MeshComm` (collectives.py) over
torch.distributed for several.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from star_attention.distributed.registry import Registry
from star_attention.distributed.streams import Streams, Suspendable
from star_attention.planning.traffic import Traffic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from star_attention.attention.kernels.triton_new import Tails
    from star_attention.attention.rotation import Rotation
    from star_attention.attention.runs import Runs
    from star_attention.attention.state import State
    from star_attention.linear.triton_few import Product
    from star_attention.linear.triton_norm import RowNorms


class Pending:
    """A collective in progress; its tensors are complete when `wait` returns."""

    def __init__(self, wait: Callable[[], None] | None = None) -> None:
        self._wait = wait

    def wait(self) -> None:
        if self._wait is not None:
            wait, self._wait = self._wait, None
            wait()


class Recording:
    """Collectives that were captured in a CUDA graph, to be counted with each of its replays.

    Attributes:
        release: destroys the graph. It is called after a fault, when graphs keep NCCL from ending.
    """

    def __init__(self) -> None:
        self.count: Callable[[], None] = lambda: None
        self.release: Callable[[], None] = lambda: None

    def replayed(self) -> None:
        """Count one replay."""
        self.count()


class Control(Protocol):
    """Rank 0 decides and sends the others what to do, as small Python objects.

    `messages.WorldControl` documents the methods. Messages: `messages.py`, `hf/cache/mirrored.py`.
    """

    def collective(self, where: str, *, about: Any = None) -> AbstractContextManager[None]: ...
    def following(self) -> AbstractContextManager[None]: ...
    def next_call(self) -> tuple[str, Any] | None: ...
    def dismiss(self) -> None: ...
    def streaming(
        self, stream: Suspendable, *, closing: bool = False
    ) -> AbstractContextManager[None]: ...
    def waiting(self) -> AbstractContextManager[None]: ...
    def broadcast_object(self, message: Any) -> None: ...
    def receive_object(self) -> Any: ...
    def receive_about(self, number: int) -> Any: ...
    def push_back(self, message: Any) -> None: ...
    def gather(self, value: Any) -> list[Any]: ...
    def run_on_rank_0(self, decision: Callable[[], Any]) -> Any: ...
    def raise_if_any_failed(self, failure: Exception | None) -> None: ...
    def mark_collective(self, error: Exception) -> Exception: ...


class Collectives(Protocol):
    """Tensors that ranks exchange: between cp ranks with the same heads, or between tp ranks.

    `collectives.MeshComm` documents the methods. Uses:

    broadcast: the anchor (`phase1`).
    exchange: ring attention, blocks that are looked back to, what an extension needs.
    merge: attention states of phase 2.
    cp_sum, cp_gather: sums after sliced layers, slices of logits, what a query attends to.
    broadcast_step: the tokens of a step of phase 2.
    tp_sum, tp_gather: sums after row-parallel layers, heads of saved contexts; what they attend to.
    sum_row, sum_product: one of these sums with what is around it, in compiled layers.
    rehearsal, recording: warm-up and replays of CUDA graphs.
    """

    def broadcast(self, tensor: Tensor, ranks: int) -> Pending: ...
    def exchange(
        self,
        tensor: Tensor,
        received: Tensor,
        *,
        sent: dict[int, int],
        arriving: dict[int, int],
        total: int,
        ranks: int | None = None,
        narrow: bool = False,
    ) -> Pending: ...
    def merge(
        self, part: State | Runs, heads: slice | None = None, *, dtype: torch.dtype | None = None
    ) -> State: ...
    def cp_sum(self, tensor: Tensor) -> Tensor: ...
    def cp_gather(self, tensor: Tensor) -> Tensor: ...
    def gather_heads(self, *own_BSHD: Tensor) -> list[Tensor]: ...
    def gather_new(
        self,
        q_RQHD: Tensor,
        k_RQGD: Tensor,
        v_RQGD: Tensor,
        tails: Tails,
        rotation: Rotation | None = None,
    ) -> Tensor: ...
    def broadcast_step(self, packet: Tensor) -> Pending: ...
    def tp_sum(self, tensor: Tensor, *, in_place: bool = True) -> Tensor: ...
    def sum_row(self, part: Tensor, over: str, norms: RowNorms) -> list[Tensor]: ...
    def sum_product(
        self, x: Tensor, product: Product, over: str, norms: RowNorms
    ) -> list[Tensor]: ...
    def tp_gather(self, tensor: Tensor) -> list[Tensor]: ...
    def rehearsal(self) -> AbstractContextManager[None]: ...
    def recording(self) -> AbstractContextManager[Recording]: ...


class Progress(Protocol):
    """Progress reports of a rank, for other ranks' watchdogs and for progress bars.

    `mesh.Mesh` documents the methods.
    """

    def tick(self, where: str | None = None) -> None: ...
    def progress(self, done: int, total: int) -> None: ...
    def working(self, what: str) -> AbstractContextManager[None]: ...
    def rank_status(self) -> list[dict[str, Any]]: ...
    def watch_others(self, change: int) -> None: ...
    def check(self) -> None: ...


class Comm(Control, Collectives, Progress, Protocol):
    """The ranks that share a context, as one of them sees them.

    Attributes:
        contexts: the contexts of all engines over these ranks.
        engines: these engines.
        streams: the streams of their answers.
        cp_traffic: what crossed the wire between cp ranks, of all ranks together.
        tp_traffic: what this rank's tp ranks exchanged.
        transport_version: changes when groups are made again; graphs captured before are void.
        one_host: True if all ranks are of one host, each with a GPU of its own or sockets to the
            others.
        is_asynchronous: True if collectives run on the device, without waiting for Python.
        shared_error: an exception of this call that all ranks raise in the same place.
    """

    rank: int
    size: int
    cp_rank: int
    cp_size: int
    tp_rank: int
    tp_size: int
    contexts: Registry
    engines: Registry
    streams: Streams
    cp_traffic: Traffic
    tp_traffic: Traffic
    is_asynchronous: bool

    @property
    def shared_error(self) -> BaseException | None: ...

    @property
    def one_host(self) -> bool: ...

    @property
    def transport_version(self) -> int: ...

    def on(self, device: torch.device, tp_size: int = 1) -> Comm: ...
    def has_same_ranks(self, comm: Any) -> bool: ...
