"""`KeptTail`: keys and values of one answer's query and tokens, kept for the next turn."""

from __future__ import annotations

from collections.abc import Sequence

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
    return [
        _kept(tail.row(row, padding), tokens, copies) if tail.length else None for tail in tails
    ]


def _kept(tail: Tail, tokens: int, copies: bool) -> Pair:
    assert tokens <= tail.length, "a rank has kept less than rank 0"
    k_1GTD, v_1GTD = (tensor[:, :, :tokens] for tensor in tail.pair())
    # Buffers grow by doubling: their room is not to be kept.
    if copies or tail.capacity(1) > tokens + tokens // 4:
        return k_1GTD.clone(), v_1GTD.clone()
    return k_1GTD, v_1GTD
