"""The tails of one layer's rows in common buffers, so that one call appends to all, and one reads.

Python's time for a call of each row would be about that of the attention itself.

Axes: R rows, G KV heads, H query heads, C capacity, K keys, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from star_attention.attention.attend import Rule, attend_padded
from star_attention.attention.latent import as_one_head
from star_attention.attention.state import State
from star_attention.storage.oom import allocate
from star_attention.storage.tail import Tail

_LEAST_CAPACITY = 64


class Lengths:
    """Tensors about the lengths of rows, made once for all layers of a forward."""

    def __init__(self) -> None:
        self._last: tuple[list[int], Tensor] | None = None
        self._masks: dict[tuple[int | None, ...], Tensor] = {}

    def of(self, lengths: list[int], device: torch.device) -> Tensor:
        """Return lengths on the device, `[R]`."""
        if self._last is None or self._last[0] != lengths:
            self._last = lengths, torch.tensor(lengths, device=device)
            self._masks.clear()
        return self._last[1]

    def mask(
        self, lengths: list[int], windows: Sequence[int | None], device: torch.device
    ) -> Tensor | None:
        """Return which keys each row's last token sees, bool `[R, K]`; None if all see all.

        Args:
            lengths: keys of each row.
            windows: the latest keys that each row sees, None for all.
            device: where the mask is wanted.
        """
        most = max(lengths)
        if min(lengths) == most and all(window is None or window >= most for window in windows):
            return None
        lengths_R = self.of(lengths, device)
        key = tuple(windows)
        if key not in self._masks:
            at_K = torch.arange(most, device=device)
            mask_RK = at_K < lengths_R[:, None]
            if any(window is not None for window in windows):
                first = [
                    0 if window is None else max(0, length - window)
                    for length, window in zip(lengths, windows, strict=True)
                ]
                mask_RK &= at_K >= torch.tensor(first, device=device)[:, None]
            self._masks[key] = mask_RK
        return self._masks[key]


class PackedTails:
    """Tails of about the same length in common buffers, `[R, G, C, D]`, of which each has a row.

    Args:
        tails: one tail of each row.
        capacity: tokens for which each has room.
        lengths: shared by the layers of a forward.
    """

    def __init__(self, tails: list[Tail], capacity: int, lengths: Lengths) -> None:
        self._tails, self._capacity, self._lengths = tails, capacity, lengths
        k_1GCD, v_1GCD = tails[0].buffers()
        self._k_RGCD, self._v_RGCD = (
            _buffer(buffer, len(tails), capacity) for buffer in (k_1GCD, v_1GCD)
        )
        for tail, k, v in zip(tails, self._k_RGCD.split(1), self._v_RGCD.split(1), strict=True):
            tail.move_to(k, v)
        self._at_R = torch.arange(len(tails), device=k_1GCD.device)

    @classmethod
    def of(cls, tails: list[Tail], lengths: Lengths) -> PackedTails | None:
        """Move tails next to each other, with room for a token.

        None if there is a single one, or if the longest would make the others much longer.
        """
        needed = [_capacity(tail.length + 1) for tail in tails]
        if len(tails) < 2 or max(needed) * len(tails) > 2 * sum(needed):
            return None
        return cls(tails, max(needed), lengths)

    @property
    def is_full(self) -> bool:
        """True if there is no room for a token of each row."""
        return any(tail.length >= self._capacity for tail in self._tails)

    def append(self, k_RG1D: Tensor, v_RG1D: Tensor) -> None:
        """Append a token to each tail."""
        lengths = [tail.length for tail in self._tails]
        pairs = ((self._k_RGCD, k_RG1D), (self._v_RGCD, v_RG1D))
        if min(lengths) == max(lengths):
            for buffer, new in pairs:
                buffer.narrow(2, lengths[0], 1).copy_(new)
        else:
            lengths_R = self._lengths.of(lengths, k_RG1D.device)
            for buffer, new in pairs:
                buffer[self._at_R, :, lengths_R] = new[:, :, 0]
        for tail in self._tails:
            tail.length += 1

    def attend(
        self,
        q_R1HD: Tensor,
        rule: Rule,
        windows: Sequence[int | None],
        *,
        compressed: bool = False,
    ) -> State:
        """Compute attention of each row's newest token over its tail.

        Args:
            q_R1HD: queries.
            rule: scale and softcap.
            windows: the latest keys that each row sees, None for all.
            compressed: True for queries that attend to compressed keys (`attention.latent`).
        """
        lengths = [tail.length for tail in self._tails]
        mask_RK = self._lengths.mask(lengths, windows, q_R1HD.device)
        keys = max(lengths)
        k_RKGD = self._k_RGCD.narrow(2, 0, keys).transpose(1, 2)
        v_RKGD = self._v_RGCD.narrow(2, 0, keys).transpose(1, 2)
        if compressed:
            k_RKGD, v_RKGD = as_one_head(k_RKGD, v_RKGD)
        return attend_padded(q_R1HD, k_RKGD, v_RKGD, rule=rule, mask_BK=mask_RK)


def _capacity(tokens: int) -> int:
    """Return the room for a number of tokens, a power of two."""
    return max(_LEAST_CAPACITY, 1 << (tokens - 1).bit_length())


def _buffer(like_1GCD: Tensor, rows: int, capacity: int) -> Tensor:
    _, G, _, D = like_1GCD.shape
    # Masked scores of a number that is none would be none.
    return allocate(lambda: like_1GCD.new_zeros(rows, G, capacity, D))
