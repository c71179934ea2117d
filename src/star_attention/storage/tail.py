"""Keys and values of a query's and an answer's tokens, which grow with every token.

Axes: B batch rows, G KV heads, S new tokens, T tail tokens, C room for tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from star_attention.storage.kv import Pair
from star_attention.storage.oom import allocate
from star_attention.storage.transfers import send

_INITIAL_CAPACITY = 64
"""Tokens that a tail has room for at first, in a CUDA graph beside those of its query."""


class Tail:
    """Keys and values of one layer's query and generated tokens, `[B, G, length, D]`.

    The buffers grow by doubling, because a concatenation per token would copy the whole tail each
    time. `version` changes whenever they move.
    """

    def __init__(self) -> None:
        self.length = 0
        self.version = 0
        self._k_BGCD: Tensor | None = None
        self._v_BGCD: Tensor | None = None

    def reserve(self, k_BGSD: Tensor, v_BGSD: Tensor) -> None:
        """Make room for S more tokens whose keys and values have these shapes and dtypes."""
        self._k_BGCD = self._with_room(self._k_BGCD, k_BGSD)
        self._v_BGCD = self._with_room(self._v_BGCD, v_BGSD)

    def capacity(self, rows: int) -> int:
        """Return the number of tokens that fit, 0 if the buffers are not for `rows` rows."""
        if self._k_BGCD is None or self._k_BGCD.shape[0] != rows:
            return 0
        return self._k_BGCD.shape[2]

    def buffers(self) -> Pair:
        """Return the whole buffers, `[B, G, capacity, D]`; the first `length` tokens are in use."""
        assert self._k_BGCD is not None and self._v_BGCD is not None, "the tail is empty"
        return self._k_BGCD, self._v_BGCD

    def start_with(self, pair: Pair, room: int) -> None:
        """Begin with copies of keys and values, in buffers with room for more tokens."""
        k_BGCD, v_BGCD = (_with_more_room(tensor, room) for tensor in pair)
        self._k_BGCD, self._v_BGCD = k_BGCD, v_BGCD
        self.length = pair[0].shape[2]
        self.version += 1

    def move_to(self, k_BGCD: Tensor, v_BGCD: Tensor) -> None:
        """Copy the keys and values in use to other buffers, which are the tail's from now on."""
        if self.length:
            for buffer, used in zip((k_BGCD, v_BGCD), self.pair(), strict=True):
                buffer.narrow(2, 0, self.length).copy_(used)
        self._k_BGCD, self._v_BGCD = k_BGCD, v_BGCD
        self.version += 1

    def append(self, k_BGSD: Tensor, v_BGSD: Tensor) -> None:
        """Append the keys and values of S tokens."""
        self.reserve(k_BGSD, v_BGSD)
        assert self._k_BGCD is not None and self._v_BGCD is not None
        tokens = k_BGSD.shape[2]
        self._k_BGCD.narrow(2, self.length, tokens).copy_(k_BGSD)
        self._v_BGCD.narrow(2, self.length, tokens).copy_(v_BGSD)
        self.length += tokens

    def _with_room(self, buffer: Tensor | None, new_BGSD: Tensor) -> Tensor:
        B, G, S, D = new_BGSD.shape
        needed = self.length + S
        if buffer is not None and buffer.shape[2] >= needed:
            return buffer
        self.version += 1
        tokens = max(_INITIAL_CAPACITY, needed, 0 if buffer is None else 2 * buffer.shape[2])
        larger = allocate(lambda: new_BGSD.new_empty(B, G, tokens, D))
        if buffer is not None:
            larger[:, :, : self.length] = buffer[:, :, : self.length]
        return larger

    def pair(self) -> Pair:
        """Return the keys and values in use, `[B, G, length, D]`."""
        assert self._k_BGCD is not None and self._v_BGCD is not None, "the tail is empty"
        length = self.length
        return self._k_BGCD.narrow(2, 0, length), self._v_BGCD.narrow(2, 0, length)

    def row(self, number: int, padding: int = 0) -> Tail:
        """Return the tail of one batch row, without its first `padding` tokens.

        That is this tail itself, if it has no other row and no padding; a copy otherwise.
        """
        if self._k_BGCD is None:
            return Tail()
        if self._k_BGCD.shape[0] == 1 and not padding:
            return self
        row = Tail()
        one = slice(number, number + 1)
        k_BGTD, v_BGTD = self.pair()
        row.append(k_BGTD[one, :, padding:], v_BGTD[one, :, padding:])
        return row

    def rows(self, numbers: list[int], padding: list[int], room: int) -> list[Tail]:
        """Return copies of the tails of batch rows, all in one buffer: copying each takes longer.

        Args:
            numbers: a batch row for each tail; several may be of one.
            padding: the first tokens of each batch row, which are left out.
            room: tokens that may follow before a tail moves to a buffer of its own.
        """
        if self._k_BGCD is None:
            return [Tail() for _ in numbers]
        buffers = [_selected(tensor, numbers, padding, room) for tensor in self.pair()]
        tails = []
        for number, k_1GCD, v_1GCD in zip(
            numbers, *(each.split(1) for each in buffers), strict=True
        ):
            tail = Tail()
            tail._k_BGCD, tail._v_BGCD = k_1GCD, v_1GCD
            tail.length, tail.version = self.length - padding[number], 1
            tails.append(tail)
        return tails

    def room_for(self, tokens: int) -> int:
        """Return the room of new buffers for so many more tokens, and for some that follow."""
        room = 0 if self._k_BGCD is None else self._k_BGCD.shape[2]
        return max(self.length + tokens + _INITIAL_CAPACITY, 2 * room)

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder batch rows (beams)."""
        if self._k_BGCD is not None and self._v_BGCD is not None:
            rows = rows.to(self._k_BGCD.device)
            self.version += 1
            self._k_BGCD = self._k_BGCD.index_select(0, rows)
            self._v_BGCD = self._v_BGCD.index_select(0, rows)

    def crop(self, tokens: int) -> None:
        """Drop the last `tokens` tokens."""
        assert 0 <= tokens <= self.length, "only the tail can be cropped, never the context"
        self.length -= tokens


def _selected(tensor_BGTD: Tensor, numbers: list[int], padding: list[int], room: int) -> Tensor:
    """Return a copy of batch rows without their padding, with room for more tokens."""
    B, _, T, _ = tensor_BGTD.shape
    device = tensor_BGTD.device
    rows_RGTD = tensor_BGTD
    if numbers != list(range(B)):
        rows_RGTD = rows_RGTD.index_select(0, send(numbers, device))
    if any(padding):
        # What follows a row's last token is not used.
        at_RT = send([padding[number] for number in numbers], device)[:, None]
        at_RT = (at_RT + torch.arange(T, device=device)).clamp_(max=T - 1)
        rows_RGTD = rows_RGTD.gather(2, at_RT[:, None, :, None].expand_as(rows_RGTD))
    return _with_more_room(rows_RGTD, room)


def _with_more_room(tensor_BGTD: Tensor, room: int) -> Tensor:
    """Return a copy with room for more tokens."""
    B, G, T, D = tensor_BGTD.shape
    larger = allocate(lambda: tensor_BGTD.new_empty(B, G, max(_INITIAL_CAPACITY, T + room), D))
    larger[:, :, :T] = tensor_BGTD
    return larger
