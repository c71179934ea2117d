"""`KeptTail`: keys and values of one answer's query and tokens, kept for the next turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from star_attention.storage.kv import Pair
from star_attention.storage.tail import Tail


class KeptTail:
    """Keys and values after a context on one rank, which nothing changes.

    Args:
        layers: those of each layer, `[1, G, tokens, D]`; None for layers that read another layer's.
        key: names the tail to the other ranks; 0 on one process.
    """

    def __init__(self, layers: Sequence[Pair | None], key: int = 0) -> None:
        self.layers = list(layers)
        self.key = key

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values on this rank."""
        pairs = [pair for pair in self.layers if pair is not None]
        return sum(tensor.numel() * tensor.element_size() for pair in pairs for tensor in pair)

    def copy_to(self, tails: list[Tail], tokens: int, room: int) -> None:
        """Let the tails of an answer begin with the first tokens, and have room for more."""
        for tail, pair in zip(tails, self.layers, strict=True):
            if pair is not None:
                k_1GTD, v_1GTD = (tensor[:, :, :tokens] for tensor in pair)
                tail.start_with((k_1GTD, v_1GTD), room)


def kept_row(
    tails: list[Tail], row: int, padding: int, tokens: int, *, copies: bool = False
) -> list[Pair | None]:
    """Return keys and values of one row of an answer.

    Args:
        tails: the tail of each layer.
        row: the row.
        padding: tokens before its first one.
        tokens: its first tokens, which are wanted.
        copies: True where the buffers are not to be kept.
    """
    own = [tail.row(row, padding) if tail.length else None for tail in tails]
    pairs = [None if tail is None else _first(tail, tokens) for tail in own]
    # Buffers grow by doubling: their room is not to be kept.
    room = max((tail.capacity(1) for tail in own if tail is not None), default=0)
    return _copied(pairs) if copies or room > tokens + tokens // 4 else pairs


def _first(tail: Tail, tokens: int) -> Pair:
    assert tokens <= tail.length, "a rank has kept less than rank 0"
    k_BGCD, v_BGCD = tail.buffers()
    return k_BGCD.narrow(2, 0, tokens), v_BGCD.narrow(2, 0, tokens)


def _copied(pairs: Sequence[Pair | None]) -> list[Pair | None]:
    """Return copies of keys and values, those of one shape by a single operation.

    On a GPU each operation costs a launch, and other answers wait while a conversation is kept.
    """
    alike: dict[Any, dict[tuple[int, int], Tensor]] = {}
    for layer, pair in enumerate(pairs):
        for side, tensor in enumerate(pair or ()):
            kind = tensor.shape, tensor.dtype, tensor.device
            alike.setdefault(kind, {})[layer, side] = tensor
    copies: dict[tuple[int, int], Tensor] = {}
    for tensors in alike.values():
        copies |= zip(tensors, torch.cat([*tensors.values()]).split(1), strict=True)
    return [
        None if pair is None else (copies[layer, 0], copies[layer, 1])
        for layer, pair in enumerate(pairs)
    ]
