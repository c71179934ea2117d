"""One process: no other ranks to wait for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from star_attention.distributed.comm import Comm, Pending, Recording
from star_attention.distributed.registry import contexts_of, engines_of
from star_attention.distributed.streams import Streams, Suspendable
from star_attention.errors import release_frames_on_oom
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


class SoloControl:
    """`Control` of one process, which is rank 0."""

    def collective(self, where: str, *, about: Any = None) -> AbstractContextManager[None]:
        return release_frames_on_oom()

    def following(self) -> AbstractContextManager[None]:
        raise AssertionError("a single process is rank 0, which leads")

    def next_call(self) -> tuple[str, Any] | None:
        raise AssertionError("a single process is rank 0, which leads")

    def dismiss(self) -> None:
        return

    def streaming(
        self, stream: Suspendable, *, closing: bool = False
    ) -> AbstractContextManager[None]:
        return release_frames_on_oom()

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def broadcast_object(self, message: Any) -> None:
        return

    def receive_object(self) -> Any:
        raise AssertionError("a single process is rank 0, which sends")

    def receive_about(self, number: int) -> Any:
        raise AssertionError("a single process is rank 0, which sends")

    def push_back(self, message: Any) -> None:
        raise AssertionError("a single process is rank 0, which sends")

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def run_on_rank_0(self, decision: Callable[[], Any]) -> Any:
        return decision()

    def raise_if_any_failed(self, failure: Exception | None) -> None:
        if failure is not None:
            raise failure

    def mark_collective(self, error: Exception) -> Exception:
        return error


class SoloProgress:
    """`Progress` of one process, which nobody watches."""

    def tick(self, where: str | None = None) -> None:
        return

    def progress(self, done: int, total: int) -> None:
        return

    def working(self, what: str) -> AbstractContextManager[None]:
        return nullcontext()

    def rank_status(self) -> list[dict[str, Any]]:
        return []

    def watch_others(self, change: int) -> None:
        return

    def check(self) -> None:
        return


class SoloRowSums:
    """What is around the sum of a single row over ranks."""

    def sum_row(self, part: Tensor, over: str, norms: RowNorms) -> list[Tensor]:
        return norms.after(part)

    def sum_product(self, x: Tensor, product: Product, over: str, norms: RowNorms) -> list[Tensor]:
        from star_attention.linear import triton_row

        triton_row.launch(x.contiguous(), [product])
        return norms.after(product.out)


class SoloComm(SoloControl, SoloProgress, SoloRowSums):
    """One process that holds the whole context and the whole model."""

    rank, size = 0, 1
    cp_rank, cp_size = 0, 1
    tp_rank, tp_size = 0, 1
    transport_version = 0
    one_host = True
    is_asynchronous = False
    shared_error = None

    def __init__(self) -> None:
        self.contexts, self.engines = contexts_of(0), engines_of(0)
        self.streams = Streams()
        self.cp_traffic, self.tp_traffic = Traffic(), Traffic()

    def on(self, device: torch.device, tp_size: int = 1) -> Comm:
        assert tp_size == 1
        return self

    def has_same_ranks(self, comm: Any) -> bool:
        return comm is self

    def broadcast(self, tensor: Tensor, ranks: int) -> Pending:
        return Pending()

    def exchange(self, *args: Any, **options: Any) -> Pending:
        raise AssertionError("there is no other rank")

    def merge(
        self, part: State | Runs, heads: slice | None = None, *, dtype: torch.dtype | None = None
    ) -> State:
        from star_attention.attention.runs import Runs

        state = part.merged() if isinstance(part, Runs) else part
        if heads is None and dtype is None:
            return state
        wanted = slice(None) if heads is None else heads
        out_BQHD = state.out_BQHD[:, :, wanted].to(dtype or state.out_BQHD.dtype)
        return state._replace(out_BQHD=out_BQHD, lse_BQH=state.lse_BQH[:, :, wanted])

    def cp_sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def cp_gather(self, tensor: Tensor) -> Tensor:
        return tensor[None]

    def gather_heads(self, *own_BSHD: Tensor) -> list[Tensor]:
        return list(own_BSHD)

    def gather_new(
        self,
        q_RQHD: Tensor,
        k_RQGD: Tensor,
        v_RQGD: Tensor,
        tails: Tails,
        rotation: Rotation | None = None,
    ) -> Tensor:
        rotated = tails.store(q_RQHD, k_RQGD, v_RQGD, rotation)
        return q_RQHD if rotated is None else rotated

    def broadcast_step(self, packet: Tensor) -> Pending:
        return Pending()

    def tp_sum(self, tensor: Tensor, *, in_place: bool = True) -> Tensor:
        return tensor

    def tp_gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def rehearsal(self) -> AbstractContextManager[None]:
        return nullcontext()

    def recording(self) -> AbstractContextManager[Recording]:
        return nullcontext(Recording())
