"""Rotary embeddings of new tokens' queries and keys, as a layer leaves them to attention.

Axes: R rows, Q tokens, H heads, D head size, E angles of a token, in their order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class HeadNorms:
    """RMS norms of each head of queries and keys, before they are rotated.

    Attributes:
        query: weight of the norm of queries, `[D]`.
        key: that of keys.
        offset: what is added to both.
        eps: what is added to each mean square.
    """

    query: Tensor
    key: Tensor
    offset: float
    eps: float

    def applied(self, x_RQHD: Tensor, weight: Tensor) -> Tensor:
        """Return normed queries or keys, computed in fp32, or in fp64 for those."""
        wide = x_RQHD if x_RQHD.element_size() == 8 else x_RQHD.float()
        factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * factor * (weight.to(wide.dtype) + self.offset)).to(x_RQHD.dtype)


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Angles by which elements of queries and keys are rotated, two at a time.

    Attributes:
        cos_RQE: cosines; R may be 1 for all rows. E is D, or half of it where both elements of a
            pair have one number.
        sin_RQE: sines.
        pairs: True if neighbors are a pair; else elements half a head apart are.
        norms: of queries and keys, before that; None where there are none.
    """

    cos_RQE: Tensor
    sin_RQE: Tensor
    pairs: bool
    norms: HeadNorms | None = None

    def normed(self, q_RQHD: Tensor, k_RQGD: Tensor) -> tuple[Tensor, Tensor, Rotation]:
        """Return queries and keys after their norms, and what is left to do."""
        if self.norms is None:
            return q_RQHD, k_RQGD, self
        q_RQHD = self.norms.applied(q_RQHD, self.norms.query)
        return q_RQHD, self.norms.applied(k_RQGD, self.norms.key), replace(self, norms=None)

    def both(self, q_RQHD: Tensor, k_RQGD: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys after their norms, and rotated."""
        q_RQHD, k_RQGD, rotation = self.normed(q_RQHD, k_RQGD)
        return rotation.rotate(q_RQHD), rotation.rotate(k_RQGD)

    def without_heads(self) -> Rotation:
        """Return the same rotation of angles that may have an axis of a single head, `R1QE`."""
        angles = (x[:, 0] if x.dim() == 4 else x for x in (self.cos_RQE, self.sin_RQE))
        cos_RQE, sin_RQE = angles
        return Rotation(cos_RQE=cos_RQE, sin_RQE=sin_RQE, pairs=self.pairs)

    def rotate(self, x_RQHD: Tensor) -> Tensor:
        """Return rotated queries or keys, without their norms, computed as norms are."""
        D = x_RQHD.shape[3]
        wide = x_RQHD if x_RQHD.element_size() == 8 else x_RQHD.float()
        if self.pairs:
            a, b = wide[..., ::2], wide[..., 1::2]
        else:
            a, b = wide[..., : D // 2], wide[..., D // 2 :]
        cos_a, cos_b = self._of_pair(self.cos_RQE, D)
        sin_a, sin_b = self._of_pair(self.sin_RQE, D)
        rotated = x_RQHD.new_empty(x_RQHD.shape)
        if self.pairs:
            rotated[..., ::2], rotated[..., 1::2] = a * cos_a - b * sin_a, b * cos_b + a * sin_b
        else:
            rotated[..., : D // 2] = a * cos_a - b * sin_a
            rotated[..., D // 2 :] = b * cos_b + a * sin_b
        return rotated

    def _of_pair(self, angles_RQE: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
        """Return the numbers of the first and the second element of each pair."""
        angles = angles_RQE[:, :, None]
        if angles.shape[3] < head_size:
            return angles, angles
        if self.pairs:
            return angles[..., ::2], angles[..., 1::2]
        return angles[..., : head_size // 2], angles[..., head_size // 2 :]
