"""Ranks of one host that write into each other's GPU memory: collectives of one kernel each.

They take a third of NCCL's time for a few kilobytes. Nothing waits on the host, so CUDA graphs can
hold them; graphs know the addresses of the buffers, which stay the same after a fault.

Axes: B batch, Q query rows, H query heads, D head size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from star_attention.attention.kernels import triton_pdl
from star_attention.attention.kernels.row_tables import ROW_COLUMNS
from star_attention.attention.kernels.triton_new import NOT, Tails, rotation_arguments
from star_attention.attention.rotation import Rotation
from star_attention.attention.runs import Runs, shape_of
from star_attention.attention.state import State
from star_attention.distributed import triton_peers
from star_attention.distributed.peer_rows import PeerRows
from star_attention.distributed.triton_peers import BLOCK, REGION
from star_attention.errors import first_line
from star_attention.linear import triton_words

_log = logging.getLogger("star_attention")

_PROGRAMS = 2048
"""Programs of a collective at most, times ranks: 18 MB of buffers."""
_FEWEST_ELEMENTS = 32
"""Elements of a program in a merge of few rows: one for each thread of a warp."""
_MOST_WARPS = 4096
"""Warps of a merge that a large GPU runs at once: programs that come later are late for others."""
_FEWEST_RUNS, _MOST_RUNS, _LOADED = 8, 64, 2048
"""Runs that a program of a merge reads at once, and about how many numbers of them."""


class Memory(Protocol):
    """Memory that other processes reach, by addresses. `cuda_memory.CudaMemory` documents it."""

    device: torch.device

    def allocate(self, bytes: int) -> int: ...
    def export(self, address: int) -> str: ...
    def open(self, exported: str) -> int: ...
    def clear(self, address: int, bytes: int) -> None: ...
    def synchronize(self) -> None: ...
    def flag(self) -> Tensor: ...


class PeerGroup(PeerRows):
    """Some ranks of one host, as one of them sees them.

    Members call the same operations in the same order, with tensors of the same shape. All results
    have the same bits on all ranks.

    Attributes:
        usable: True if all members reach each other's memory.
    """

    def __init__(self, member: int, size: int, memory: Memory) -> None:
        """Prepare to connect.

        Args:
            member: number of this rank among them.
        """
        self.usable = False
        self._member, self._size, self._memory = member, size, memory
        self._programs = _PROGRAMS // size
        self._slot = self._programs * REGION
        self._bytes = size * 2 * self._slot * 8
        # Addresses of all members' buffers; empty until they are known.
        self._addresses: list[int] = []
        self._own = 0
        self._abort: Tensor
        # On the device: those addresses and that of the abort flag; exchanges of each program.
        self._table: Tensor
        self._epochs: Tensor

    def connect(self, exchange: Callable[[str, str], list[str]]) -> None:
        """Open each other's memory, or begin again after a fault. Collective.

        Args:
            exchange: sends a text, under a key, to all members, and returns theirs.
        """
        exported = self._attempt(self._export)
        texts = exchange("memory", exported)
        # Every member has synchronized, so nobody writes into a buffer now.
        ready = self._attempt(lambda: self._open(texts)) if all(texts) else ""
        self.usable = all(exchange("ready", ready))

    def _attempt(self, step: Callable[[], str]) -> str:
        """Return the step's result, and "" if it failed: then all members fall back on NCCL."""
        try:
            return step()
        except (RuntimeError, OSError) as error:
            _log.info("no peer access to GPU memory: %s", first_line(error))
            return ""

    def _export(self) -> str:
        if not self._own:
            self._own = self._memory.allocate(self._bytes)
        self._memory.synchronize()
        return self._memory.export(self._own)

    def _open(self, exported: list[str]) -> str:
        if not self._addresses:
            self._addresses = [
                self._own if member == self._member else self._memory.open(text)
                for member, text in enumerate(exported)
            ]
            device = self._memory.device
            self._abort = self._memory.flag()
            # By address: host memory has one for host and device.
            self._table = torch.tensor([*self._addresses, self._abort.data_ptr()], device=device)
            self._epochs = torch.zeros(self._programs, dtype=torch.int32, device=device)
        self._memory.clear(self._own, self._bytes)
        self._epochs.zero_()
        self._abort.zero_()
        self._memory.synchronize()
        return "ready"

    def abort(self) -> None:
        """End the kernels that wait for other members; their results are worthless."""
        if self._addresses:
            self._abort.fill_(1)

    # ------------------------------------------------------------------ operations

    def fits(self, tensor: Tensor) -> bool:
        """Return True if `add` and `gather` take a tensor of this size."""
        words = tensor.numel() * max(1, tensor.element_size() // 4)
        return 0 < words <= self._programs * BLOCK

    def fits_states(self, rows: int, head_size: int) -> bool:
        """Return True if `merge` takes states of `rows` batch x queries x heads."""
        return rows > 0 and _merge_tile(rows, head_size, self._programs) is not None

    def add(self, part: Tensor, *, rehearsal: bool = False) -> Tensor:
        """Return the sum of all members' parts, added up in fp32, in the part's precision.

        Args:
            rehearsal: only compile the kernel, and return nothing of use.
        """
        dtype = triton_words.dtype_of(part)
        if dtype is None:
            return self.add(part.float(), rehearsal=rehearsal).to(part.dtype)
        words, total = triton_words.view(part), part.new_empty(part.shape)
        grid, n = self._grid(words.numel(), BLOCK, rehearsal)
        triton_peers.add_kernel[grid](
            words, triton_words.view(total), self._table, self._epochs, self._member, n,
            DTYPE=dtype, BLOCK=BLOCK, **self._constants(),
        )  # fmt: skip
        return total

    def gather(self, part: Tensor, *, rehearsal: bool = False) -> Tensor:
        """Return all members' parts in their order, `[size, *shape]`. See `add`."""
        parts = part.new_empty(self._size, *part.shape)
        self._copy(part.contiguous(), parts, root=-1, rehearsal=rehearsal)
        return parts

    def broadcast(self, packet: Tensor, *, rehearsal: bool = False) -> None:
        """Overwrite a contiguous tensor with the first member's. See `add`."""
        assert packet.is_contiguous()
        self._copy(packet, packet, root=0, rehearsal=rehearsal)

    def fits_heads(self, own: Sequence[Tensor]) -> bool:
        """Return True if `gather_heads` and `gather_new` take tensors of these sizes."""
        words = sum(t.numel() for t in own)
        is_known = all(t.element_size() in (2, 4) for t in own)
        return is_known and 0 < words <= self._programs * BLOCK

    def gather_heads(self, own: Sequence[Tensor], *, rehearsal: bool = False) -> list[Tensor]:
        """Return queries, keys and values of all members' heads, in the order of members.

        Args:
            own: this member's, `[B, S, heads, D]` each.
        """
        B, S = own[0].shape[:2]
        heads = [t.new_empty(B, S, t.shape[2] * self._size, t.shape[3]) for t in own]
        # Not rotated, and not stored in tails: nothing is read of these.
        unused = self._table, self._table, 0, 0, self._table, self._epochs, 0
        constants = dict(ROTATED=NOT, E=1, STORED=False, BY_ROW=False, KV_HEADS=1)
        self._gather(own, heads, unused, constants, rehearsal)
        return heads

    def gather_new(
        self,
        own: Sequence[Tensor],
        tails: Tails,
        rotation: Rotation | None = None,
        *,
        rehearsal: bool = False,
    ) -> Tensor:
        """Return the queries of all members' heads, and write keys and values into tails.

        Args:
            own: this member's queries, keys and values, `[R, Q, heads, D]` each.
            tails: where keys and values of all members' heads go.
            rotation: rotates queries and keys first; without norms.
        """
        R, Q, G, D = own[1].shape
        q_RQHD = own[0].new_empty(R, Q, own[0].shape[2] * self._size, D)
        angles: Any = (self._table, self._table, 0, 0)
        constants = dict(ROTATED=NOT, E=1)
        if rotation is not None:
            assert rotation.norms is None
            angles, constants = rotation_arguments(rotation, R)
        where = *angles, tails.addresses, tails.numbers, tails.first
        constants |= dict(STORED=True, BY_ROW=tails.by_row, KV_HEADS=G * self._size)
        self._gather(own, [q_RQHD, q_RQHD, q_RQHD], where, constants, rehearsal)
        return q_RQHD

    def _gather(
        self,
        own: Sequence[Tensor],
        heads: Sequence[Tensor],
        where: tuple[Any, ...],
        constants: dict[str, Any],
        rehearsal: bool,
    ) -> None:
        R, Q = own[0].shape[:2]
        own = [t.contiguous() for t in own]
        grid, words = self._grid(sum(t.numel() for t in own), BLOCK, rehearsal)
        widths = [t.shape[2] * t.shape[3] for t in own]
        triton_peers.heads_kernel[grid](
            *own, *heads, self._table, self._epochs, self._member, R * Q if words else 0, Q, *where,
            WIDTH_Q=widths[0], WIDTH_K=widths[1], WIDTH_V=widths[2], D=own[0].shape[3],
            BLOCK=BLOCK, **constants, **self._constants(),
        )  # fmt: skip

    def _copy(self, part: Tensor, parts: Tensor, *, root: int, rehearsal: bool) -> None:
        words = _words(part)
        grid, n = self._grid(words.numel(), BLOCK, rehearsal)
        triton_peers.copy_kernel[grid](
            words, _words(parts), self._table, self._epochs, self._member, n,
            ROOT=root, BLOCK=BLOCK, **self._constants(),
        )  # fmt: skip

    def merge(
        self,
        part: State | Runs,
        heads: slice | None = None,
        dtype: torch.dtype | None = None,
        *,
        rehearsal: bool = False,
    ) -> State:
        """Return the merge of all members' states, in fp32; see `add`.

        Some members may have runs, which are merged first, and others a state.

        Args:
            heads: the heads to merge, which may differ between members; None for all.
            dtype: precision of the result's `out`, fp32 by default.
        """
        B, Q, H, D = shape_of(part)
        first, stop, step = (heads or slice(None)).indices(H)
        assert step == 1
        wanted = max(0, stop - first)
        device = self._memory.device
        merged_BQHD = torch.empty(B, Q, wanted, D, dtype=dtype or torch.float32, device=device)
        merged_BQH = torch.empty(B, Q, wanted, dtype=torch.float32, device=device)
        tile = _merge_tile(B * Q * H, D, self._programs)
        assert tile is not None
        rows, block_d = tile
        programs = triton.cdiv(B * Q * H, rows) * triton.cdiv(D, block_d)
        tensors, numbers, constants = _source(part, rows * block_d)
        triton_peers.merge_kernel[(1 if rehearsal else programs,)](
            *tensors, merged_BQHD, merged_BQH, self._table, self._epochs,
            self._member, 0 if rehearsal else B * Q * H, first, wanted, *numbers,
            HEADS=H, D=D, BLOCK_D=block_d, ROWS=rows,
            **constants, **(self._constants() | dict(num_warps=_warps(rows * block_d))),
        )  # fmt: skip
        return State(merged_BQHD, merged_BQH)

    def _grid(self, words: int, block: int, rehearsal: bool) -> tuple[tuple[int], int]:
        """Return the grid, and the number of words to exchange: none in a rehearsal."""
        return ((1,), 0) if rehearsal else ((triton.cdiv(words, block),), words)

    def _constants(self) -> dict[str, Any]:
        return dict(
            SIZE=self._size,
            SLOT=self._slot,
            REGION=REGION,
            SPINS=triton_peers.SPINS,
            num_warps=triton_peers.WARPS,
            **triton_pdl.options(self._memory.device),
        )


def _words(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as the integers that an exchange moves, 32 bits at most."""
    dtype = {1: torch.uint8, 2: torch.int16}.get(tensor.element_size(), torch.int32)
    return tensor.view(-1).view(dtype)


def _merge_tile(rows: int, head_size: int, programs: int) -> tuple[int, int] | None:
    """Return the rows of a program of a merge, and how many elements of each; None if too many.

    The same on all members, whatever they merge: one token's few rows are for many programs, which
    read their runs at once.
    """
    elements = min(_FEWEST_ELEMENTS, triton.next_power_of_2(head_size))
    tile_rows = _FEWEST_ELEMENTS // elements
    while True:
        count = triton.cdiv(rows, tile_rows) * triton.cdiv(head_size, elements)
        if count <= min(programs, _MOST_WARPS // _warps(tile_rows * elements)):
            return tile_rows, elements
        larger = (tile_rows, 2 * elements) if elements < head_size else (2 * tile_rows, elements)
        if larger[0] * larger[1] > BLOCK or larger[0] * (larger[1] + 1) > REGION:
            return (tile_rows, elements) if count <= programs else None
        tile_rows, elements = larger


def _source(
    part: State | Runs, elements: int
) -> tuple[tuple[Tensor, ...], tuple[int, int], dict[str, int]]:
    """Return what a merge kernel needs of a member's part: tensors, numbers and constants."""
    if not isinstance(part, Runs):
        out_BQHD, lse_BQH = part.out_BQHD.contiguous(), part.lse_BQH.contiguous()
        none = dict(KV_HEADS=1, TILE=0, ROW_COLUMNS=0, BLOCK_S=0)
        return (out_BQHD, lse_BQH, lse_BQH), (0, 0), none
    table = part.table
    constants = dict(BLOCK_S=max(_FEWEST_RUNS, min(_MOST_RUNS, _LOADED // elements)))
    if table is None:
        constants |= dict(KV_HEADS=1, TILE=0, ROW_COLUMNS=0)
        return (part.out_PD, part.lse_P, part.lse_P), (part.count, 0), constants
    constants |= dict(KV_HEADS=table.kv_heads, TILE=table.tile_size, ROW_COLUMNS=ROW_COLUMNS)
    return (part.out_PD, part.lse_P, table.rows), (part.count, table.tails_at), constants


def _warps(elements: int) -> int:
    """Return warps none of whose threads hold copies of the others' words: all see them arrive."""
    return min(triton_peers.WARPS, elements // 32)
