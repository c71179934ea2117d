"""A single row's sum over ranks that write into each other's memory, with what is around it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import triton
from torch import Tensor

from star_attention.attention.kernels import triton_pdl
from star_attention.distributed import triton_peer_rows
from star_attention.distributed.triton_peers import BLOCK, REGION
from star_attention.linear import triton_norm, triton_row, triton_words
from star_attention.linear.triton_few import Product
from star_attention.linear.triton_norm import RowNorms


class PeerRows(ABC):
    """Rows of a `peers.PeerGroup`, which has these attributes."""

    _member: int
    _size: int
    _slot: int
    _table: Tensor
    _epochs: Tensor

    @abstractmethod
    def fits(self, tensor: Tensor) -> bool: ...

    @abstractmethod
    def _constants(self) -> dict[str, Any]: ...

    def fits_row(self, row: Tensor) -> bool:
        """Return True if `add_row` takes a row of this size and precision."""
        # Registers hold a row in fp32 of half the size.
        words = row.numel() * row.element_size() // 4
        is_row = row.numel() == row.shape[-1] and triton_norm.serves(row)
        return self.fits(row) and is_row and words <= triton_norm.MAX_SIZE // 2

    def add_row(self, part: Tensor, norms: RowNorms, *, rehearsal: bool = False) -> list[Tensor]:
        """Add up a single row as `add` does, and return the results of what follows.

        Other members may call `add` for the same exchange.

        Args:
            part: this member's, `[..., K]`.
            norms: what follows.
        """
        part = part.contiguous()
        outs = norms.outs(part)
        self._add_row(part, triton_words.view(part), norms.arguments(part, outs), rehearsal)
        return outs

    def fits_product(self, x: Tensor, product: Product) -> bool:
        """Return True if `add_product` takes a row and a matrix of these sizes."""
        halves = x.element_size() == 2 and x.numel() == x.shape[-1]
        return halves and self.fits_row(product.out)

    def add_product(
        self, x: Tensor, product: Product, norms: RowNorms, *, rehearsal: bool = False
    ) -> list[Tensor]:
        """Add up a row's products with each member's matrix. See `add_row`.

        Args:
            x: this member's row, in half precision.
            product: its matrix; `out` has the result's shape, and is not written.
            norms: what follows.
        """
        x, (weight, bias, scale, out) = x.contiguous(), product
        outs = norms.outs(out)
        # They may be copied first: the two launches must follow one another.
        arguments = norms.arguments(out, outs)
        tile = triton_row.tile_of(x, [weight], least=2)
        N = weight.shape[0]
        triton_peer_rows.product_kernel[(triton.cdiv(N, tile["ROWS"]),)](
            x, x.shape[-1], weight, weight if bias is None else bias,
            weight if scale is None else scale, N, weight.stride(0),
            self._table, self._epochs, self._member, int(not rehearsal),
            BIAS=bias is not None, SCALE=scale is not None, DTYPE=triton_words.dtype_of(out),
            SIZE=self._size, SLOT=self._slot, BLOCK=BLOCK, REGION=REGION,
            **tile, **triton_pdl.options(x.device),
        )  # fmt: skip
        self._add_row(out, None, arguments, rehearsal)
        return outs

    def _add_row(
        self,
        row: Tensor,
        words: Tensor | None,
        follows: tuple[list[Any], dict[str, Any]],
        rehearsal: bool,
    ) -> None:
        """Add up rows of the shape of `row`, by this member's words, or None if they are sent.

        Args:
            follows: `RowNorms.arguments`.
        """
        arguments, constants = follows
        size = row.numel() * row.element_size() // 4
        regions = triton.cdiv(size, BLOCK)
        padded = triton.next_power_of_2(regions)
        options = self._constants() | dict(num_warps=min(32, padded * BLOCK // 64))
        triton_peer_rows.row_kernel[(1,)](
            arguments[0] if words is None else words, *arguments,
            self._table, self._epochs, self._member, size, int(not rehearsal),
            SENT=words is None, REGIONS=padded, GAPS=padded != regions, BLOCK=BLOCK,
            **constants, **options,
        )  # fmt: skip
