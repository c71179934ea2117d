"""`MeshComm`: the tensors that ranks exchange.

Axes: B batch, Q query rows, H query heads, D head size.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from star_attention.attention.runs import Runs, shape_of
from star_attention.attention.state import State, merge
from star_attention.distributed.comm import Pending
from star_attention.distributed.groups import all_gather
from star_attention.distributed.mesh import host_of
from star_attention.distributed.rendezvous import dist
from star_attention.distributed.row_sums import RowSums
from star_attention.distributed.world import World
from star_attention.planning import traffic

if TYPE_CHECKING:
    from star_attention.attention.kernels.triton_new import Tails
    from star_attention.attention.rotation import Rotation


class MeshComm(RowSums):
    """The ranks of a world in a mesh, and the transport of their tensors.

    Tensors travel in a lane of the mesh or in a row of it.
    """

    def __init__(
        self,
        world: World,
        *,
        tp_size: int = 1,
        backend: str = "gloo",
        device: torch.device | None = None,
        hosts: list[str] | None = None,
        merge_collective: str | None = None,
    ) -> None:
        """Arrange the ranks.

        Args:
            tp_size: ranks that share the heads and weights of one cp rank.
            backend: "gloo" or "nccl".
            device: where the transport reaches tensors; None for the CPU.
            hosts: `host_of` of each rank; None for "" of all.
            merge_collective: see `TorchComm`.
        """
        super().__init__(world, tp_size=tp_size, backend=backend, device=device, hosts=hosts)
        self.merge_collective = merge_collective

    # ------------------------------------------------------------------ the mesh

    def on(self, device: torch.device, tp_size: int = 1) -> MeshComm:
        """Return the same ranks in another mesh, which exchanges tensors of `device`. Collective.

        Tensors go by NCCL if every rank has a GPU of its own, else by gloo; small ones of ranks of
        one machine through GPU memory (`PeerGroup`) or sockets (`SocketGroup`).
        """
        gpu = None
        if device.type == "cuda":
            # By its UUID: where each rank sees one GPU only, all call theirs cuda:0.
            gpu = (socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid))
        places = self.gather((gpu, host_of(device)))
        gpus, hosts = [gpu for gpu, _ in places], [host for _, host in places]
        backend, transport_device = "gloo", torch.device("cpu")
        if None not in gpus and len(set(gpus)) == self.size and dist.is_nccl_available():
            torch.cuda.set_device(device)
            backend = "nccl"
            transport_device = torch.device("cuda", torch.cuda.current_device())
            self.world.watchdog.waits_on_device = True
        mesh = MeshComm(
            self.world,
            tp_size=tp_size,
            backend=backend,
            device=transport_device,
            hosts=hosts,
            merge_collective=self.merge_collective,
        )
        mesh.gpus_on_one_host = backend == "nccl" and len({host for host, _ in gpus}) == 1
        return mesh

    def has_same_ranks(self, comm: Any) -> bool:
        """Return True if `comm` is over the same ranks, in whatever mesh."""
        return isinstance(comm, MeshComm) and comm.world is self.world

    # ------------------------------------------------------------------ tensors

    def broadcast(self, tensor: Tensor, ranks: int) -> Pending:
        """Send a contiguous tensor from the first cp rank to the first `ranks` cp ranks.

        Collective among those. On the others `tensor` is overwritten. On GPUs it takes few of the
        processors, since it runs beside computation.
        """
        assert tensor.is_contiguous() and self.cp_rank < ranks <= self.cp_size
        if self._rehearsing:
            return Pending()
        self._count(traffic.broadcast_bytes(tensor.numel() * tensor.element_size(), ranks))
        staged = self._staged(tensor, fill=self.cp_rank == 0)
        lane = self._group(self._lane(ranks), narrow=True)
        pending = self.world.issue(lane, lambda group: group.broadcast(staged, 0))
        return Pending(lambda: self._unstage(pending, staged, tensor if self.cp_rank else staged))

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
    ) -> Pending:
        """Send parts of a flat tensor to other cp ranks and receive parts from others. Collective.

        Args:
            tensor: what to send, by receiving rank; may be empty.
            received: room for what arrives, by sending rank; may be empty.
            sent: elements for each cp rank that receives some.
            arriving: elements from each cp rank that sends some.
            total: elements that all ranks together send.
            ranks: the first cp ranks, which take part; None for all.
            narrow: leave the device to computation (`_group`).
        """
        for flat, sizes in ((tensor, sent), (received, arriving)):
            assert flat.dim() == 1 and flat.is_contiguous() and flat.numel() == sum(sizes.values())
        if self._rehearsing:
            return Pending()
        self._count(total * received.element_size())
        staged, arrived = self._staged(tensor, fill=True), self._staged(received, fill=False)
        # Not send and recv: a wait for gloo's with a timeout breaks the connection.
        lane = self._lane(ranks)
        split = [[sizes.get(rank, 0) for rank in range(len(lane))] for sizes in (arriving, sent)]
        group = self._group(lane, narrow=narrow)
        pending = self.world.issue(group, lambda g: g.alltoall_base(arrived, staged, *split))
        return Pending(lambda: self._unstage(pending, arrived, received))

    def merge(
        self, part: State | Runs, heads: slice | None = None, *, dtype: torch.dtype | None = None
    ) -> State:
        """Return the state over all cp ranks' keys, the same bits on every rank (Algorithm 2).

        Args:
            part: this rank's state, of all heads, or runs that are not merged yet.
            heads: the query heads to merge, which may differ between ranks; None for all.
            dtype: precision of the result's `out`, fp32 by default.
        """
        wanted = slice(None) if heads is None else heads
        B, Q, H, head_size = shape_of(part)
        rows = B * Q * H
        collective = self.merge_collective or traffic.merge_choice(self.cp_size, rows, head_size)
        peers = self._peers(self._lane()) if collective == "gather" else None
        if peers is not None and peers.fits_states(rows, head_size):
            if not self._rehearsing:
                sent, _ = traffic.state_bytes(rows, head_size)
                self._count(traffic.gather_bytes(sent, self.cp_size))
                of_peers: State = self.world.launch(lambda: peers.merge(part, heads, dtype))
                return of_peers
            # No numbers, but none that later layers could stumble over.
            return State(*(t.zero_() for t in peers.merge(part, heads, dtype, rehearsal=True)))
        state = part.merged() if isinstance(part, Runs) else part
        if self._rehearsing:
            merged = State(state.out_BQHD[:, :, wanted].float(), state.lse_BQH[:, :, wanted])
        elif collective == "gather":
            merged = self._merge_gathered(state, wanted)
        else:
            merged = self._merge_reduced(state.out_BQHD.float(), state.lse_BQH.contiguous(), wanted)
        return merged._replace(out_BQHD=merged.out_BQHD.to(dtype or torch.float32))

    def _merge_gathered(self, state: State, heads: slice) -> State:
        # In fp32, as the lse is.
        packed_BQHE = torch.cat([state.out_BQHD, state.lse_BQH[..., None]], -1)
        parts = self.cp_gather(packed_BQHE)[:, :, :, heads]
        return merge([State(part[..., :-1], part[..., -1]) for part in parts])

    def _merge_reduced(self, out_BQHD: Tensor, lse_BQH: Tensor, heads: slice) -> State:
        top_BQH = self._reduced(lse_BQH.clone(), dist.ReduceOp.MAX)
        # Rows for which no rank has keys: -inf - -inf is NaN, and a zero row may have any weight.
        weight_BQH = (lse_BQH - top_BQH).exp().nan_to_num(0.0)
        packed_BQHE = torch.cat(
            [out_BQHD * weight_BQH[..., None], weight_BQH[..., None]], -1
        ).contiguous()
        packed_BQHE = self._reduced(packed_BQHE, dist.ReduceOp.SUM)[:, :, heads]
        sum_BQH = packed_BQHE[..., -1]
        out_BQHD = (
            packed_BQHE[..., :-1] / sum_BQH.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        )
        return State(out_BQHD, top_BQH[:, :, heads] + sum_BQH.log())

    def _reduced(self, tensor: Tensor, op: Any) -> Tensor:
        staged = self._staged(tensor, fill=True)
        self._count(traffic.reduce_bytes(tensor.numel() * tensor.element_size(), self.cp_size))
        self.world.issue(
            self._group(self._lane()), lambda group: group.allreduce(staged, op)
        ).wait()
        return staged.to(tensor.device)

    def cp_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the cp ranks, added up in fp32: the same bits on every rank."""
        ranks = self._lane()
        if len(ranks) == 1:
            return tensor
        if traffic.sum_choice(len(ranks), tensor.numel(), tensor.element_size()) == "gather":
            return self._added(tensor, ranks, self._count)
        if self._rehearsing:
            return tensor
        wide = traffic.sum_dtype_bytes(len(ranks), tensor.element_size()) > tensor.element_size()
        part = tensor.to(torch.float32 if wide else tensor.dtype, copy=True)
        return self._reduced(part.contiguous(), dist.ReduceOp.SUM).to(tensor.dtype)

    def tp_sum(self, tensor: Tensor, *, in_place: bool = True) -> Tensor:
        """Return the sum over the tp ranks, of a long tensor in its own precision.

        Args:
            tensor: this rank's part.
            in_place: True to overwrite a long one.
        """
        ranks = self._row()
        if len(ranks) == 1:
            return tensor
        if traffic.sum_choice(len(ranks), tensor.numel(), tensor.element_size()) == "gather":
            return self._added(tensor, ranks, self.tp_traffic.add)
        if self._rehearsing:
            return tensor
        part = tensor if in_place else tensor.clone(memory_format=torch.contiguous_format)
        staged = self._staged(part.contiguous(), fill=True)
        self.tp_traffic.add(
            traffic.reduce_bytes(staged.numel() * staged.element_size(), self.tp_size)
        )
        self.world.issue(
            self._group(ranks), lambda group: group.allreduce(staged, dist.ReduceOp.SUM)
        ).wait()
        return staged.to(tensor.device)

    def _added(self, tensor: Tensor, ranks: range, count: Callable[[int], None]) -> Tensor:
        """Return the sum over ranks, in fp32 and in the order of ranks."""
        peers = self._peers(ranks)
        if peers is not None and peers.fits(tensor):
            if not self._rehearsing:
                count(traffic.gather_bytes(tensor.numel() * tensor.element_size(), len(ranks)))
                total: Tensor = self.world.launch(lambda: peers.add(tensor))
                return total
            peers.add(tensor, rehearsal=True)
        # torch's own sum over an axis may add in any order.
        parts = self._gathered(tensor, ranks, count).float().unbind()
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total.to(tensor.dtype)

    def cp_gather(self, tensor: Tensor) -> Tensor:
        """Return the cp ranks' tensors, of one shape, in their order: `[cp_size, *shape]`."""
        return self._gathered(tensor, self._lane(), self._count)

    def gather_heads(self, *own_BSHD: Tensor) -> list[Tensor]:
        """Return queries, keys and values of all cp ranks' heads, in one collective.

        Args:
            own_BSHD: those of this rank's heads.
        """
        peers = self._peers(self._lane())
        if peers is not None and peers.fits_heads(own_BSHD):
            if self._rehearsing:
                return peers.gather_heads(own_BSHD, rehearsal=True)
            self._count_heads(own_BSHD)
            heads: list[Tensor] = self.world.launch(lambda: peers.gather_heads(own_BSHD))
            return heads
        B, S = own_BSHD[0].shape[:2]
        parts = self.cp_gather(torch.cat([t.reshape(-1) for t in own_BSHD]))
        return [
            # From `[ranks, B, S, heads, D]`, in which a rank's heads follow those before it.
            part.view(-1, *t.shape).movedim(0, 2).reshape(B, S, -1, t.shape[3])
            for part, t in zip(parts.split([t.numel() for t in own_BSHD], 1), own_BSHD, strict=True)
        ]

    def gather_new(
        self,
        q_RQHD: Tensor,
        k_RQGD: Tensor,
        v_RQGD: Tensor,
        tails: Tails,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Return the queries of all cp ranks' heads; their keys and values go to the tails.

        Args:
            q_RQHD: queries of this rank's heads.
            k_RQGD: keys; `v_RQGD` likewise.
            tails: where all ranks' keys and values go.
            rotation: rotates queries and keys first; None if that is done.
        """
        if rotation is not None:
            # Graphs have none where heads are gathered (`rotary`).
            q_RQHD, k_RQGD, rotation = rotation.normed(q_RQHD, k_RQGD)
        own, peers = (q_RQHD, k_RQGD, v_RQGD), self._peers(self._lane())
        if peers is not None and peers.fits_heads(own):
            if self._rehearsing:
                return peers.gather_new(own, tails, rotation, rehearsal=True)
            self._count_heads(own)
            heads: Tensor = self.world.launch(lambda: peers.gather_new(own, tails, rotation))
            return heads
        if rotation is not None:
            own = *rotation.both(q_RQHD, k_RQGD), v_RQGD
        all_q_RQHD, all_k_RQGD, all_v_RQGD = self.gather_heads(*own)
        tails.store(None, all_k_RQGD, all_v_RQGD, None)
        return all_q_RQHD

    def _count_heads(self, own: Sequence[Tensor]) -> None:
        part = sum(t.numel() * t.element_size() for t in own)
        self._count(traffic.gather_bytes(part, self.cp_size))

    def tp_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tp ranks' tensors, of one shape, in their order; on the CPU with gloo."""
        if self.tp_size == 1 or self._rehearsing:
            return [tensor] * self.tp_size
        part = self._staged(tensor.contiguous(), fill=True)
        return list(self._gathered(part, self._row(), self.tp_traffic.add))

    def _gathered(self, tensor: Tensor, ranks: range, count: Callable[[int], None]) -> Tensor:
        peers = self._peers(ranks)
        is_small = peers is not None and peers.fits(tensor)
        if len(ranks) == 1 or self._rehearsing:
            if peers is not None and is_small:
                peers.gather(tensor, rehearsal=True)
            return tensor.expand(len(ranks), *tensor.shape).contiguous()
        count(traffic.gather_bytes(tensor.numel() * tensor.element_size(), len(ranks)))
        if peers is not None and is_small:
            gathered: Tensor = self.world.launch(lambda: peers.gather(tensor))
            return gathered
        part = self._staged(tensor.contiguous(), fill=True)
        parts = part.new_empty(len(ranks), *part.shape)
        group = self._group_of_few(ranks, part.numel() * part.element_size())
        self.world.issue(group, lambda group: all_gather(group, parts, part)).wait()
        return parts.to(tensor.device)

    def broadcast_step(self, packet: Tensor) -> Pending:
        """Send a small contiguous tensor, in place, from rank 0 to all ranks of the world.

        Not counted, like the messages with which rank 0 leads the others.
        """
        assert packet.is_contiguous()
        everyone = range(self.size)
        peers = self._peers(everyone)
        if peers is not None and peers.fits(packet):
            if self._rehearsing:
                peers.broadcast(packet, rehearsal=True)
            else:
                self.world.launch(lambda: peers.broadcast(packet))
            return Pending()
        if self._rehearsing:
            return Pending()
        staged = self._staged(packet, fill=self.rank == 0)
        group = self._group_of_few(everyone, staged.numel() * staged.element_size())
        pending = self.world.issue(group, lambda group: group.broadcast(staged, 0))
        return Pending(lambda: self._unstage(pending, staged, packet if self.rank else staged))

    def _count(self, bytes: int) -> None:
        """Count what all lanes move: they do the same at the same time."""
        self.cp_traffic.add(bytes * self.tp_size, self.tp_size)

    def _staged(self, tensor: Tensor, *, fill: bool) -> Tensor:
        """Return the tensor, or a copy, where the transport reaches it: host memory with gloo."""
        if tensor.device == self._device:
            return tensor
        return tensor.to(self._device) if fill else torch.empty_like(tensor, device=self._device)

    @staticmethod
    def _unstage(pending: Pending, staged: Tensor, tensor: Tensor) -> None:
        pending.wait()
        if staged is not tensor:
            tensor.copy_(staged)
