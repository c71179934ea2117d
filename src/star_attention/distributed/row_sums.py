"""A mesh's sums of single rows over ranks, in compiled layers: with what is around them."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from star_attention.distributed.mesh import Mesh
from star_attention.planning import traffic

if TYPE_CHECKING:
    from star_attention.distributed.peers import PeerGroup
    from star_attention.linear.triton_few import Product
    from star_attention.linear.triton_norm import RowNorms


class RowSums(Mesh, ABC):
    """Sums of rows of a `collectives.MeshComm`."""

    @abstractmethod
    def cp_sum(self, tensor: Tensor) -> Tensor: ...

    @abstractmethod
    def tp_sum(self, tensor: Tensor, *, in_place: bool = True) -> Tensor: ...

    @abstractmethod
    def _count(self, bytes: int) -> None: ...

    def sum_row(self, part: Tensor, over: str, norms: RowNorms) -> list[Tensor]:
        """Return the results of what follows the sum of a single row over ranks.

        Args:
            part: this rank's part, `[..., K]`.
            over: "cp" or "tp", as for `cp_sum` and `tp_sum`.
            norms: what follows.
        """
        peers = self._peers_of_row(part, over)
        if peers is None:
            is_cp = over == "cp"
            return norms.after(self.cp_sum(part) if is_cp else self.tp_sum(part, in_place=False))
        return self._with_peers(part, over, functools.partial(peers.add_row, part, norms))

    def sum_product(self, x: Tensor, product: Product, over: str, norms: RowNorms) -> list[Tensor]:
        """Return the results of what follows the sum of a single row's products over ranks.

        Args:
            x: this rank's row, `[..., K]`.
            product: this rank's matrix.
            over: "cp" or "tp", as for `cp_sum` and `tp_sum`.
            norms: what follows.
        """
        peers = self._peers_of_row(product.out, over)
        if peers is None or not peers.fits_product(x, product):
            from star_attention.linear import triton_row

            triton_row.launch(x.contiguous(), [product])
            return self.sum_row(product.out, over, norms)
        add = functools.partial(peers.add_product, x, product, norms)
        return self._with_peers(product.out, over, add)

    def _peers_of_row(self, row: Tensor, over: str) -> PeerGroup | None:
        """Return the group whose members sum a row by themselves, if they do."""
        ranks = self._lane() if over == "cp" else self._row()
        peers = self._peers(ranks)
        if peers is None or not peers.fits_row(row):
            return None
        choice = traffic.sum_choice(len(ranks), row.numel(), row.element_size())
        return peers if choice == "gather" else None

    def _with_peers(self, row: Tensor, over: str, add: Callable[..., list[Tensor]]) -> list[Tensor]:
        if self._rehearsing:
            return add(rehearsal=True)
        is_cp = over == "cp"
        count = self._count if is_cp else self.tp_traffic.add
        ranks = self.cp_size if is_cp else self.tp_size
        count(traffic.gather_bytes(row.numel() * row.element_size(), ranks))
        results: list[Tensor] = self.world.launch(add)
        return results
