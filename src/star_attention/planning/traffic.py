"""What crosses the wire, in integers: which collective merges states, and how many bytes each collective moves.

Bytes are payload received, all ranks together, as the collectives move it in a ring or a tree: a broadcast of n bytes
delivers them to each other rank, a gather delivers every part to every other rank, and a reduction moves two parts in
`ranks` of its buffer through each rank in each of `ranks - 1` steps. What a transport adds (headers, the few hundred
bytes with which rank 0 leads the others) is not counted. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32 = 4
CALL_BYTES = 128 * 1024
"""What one more collective costs, as bytes that could move meanwhile: some 5 us on a fast link."""


@dataclass
class Traffic:
    """Collectives and bytes of one phase."""

    calls: int = 0
    bytes: int = 0

    def add(self, bytes: int, calls: int = 1) -> None:
        self.calls += calls
        self.bytes += bytes

    def since(self, before: Traffic) -> Traffic:
        """What was added to an earlier copy of this."""
        return Traffic(self.calls - before.calls, self.bytes - before.bytes)


def broadcast_bytes(payload: int, ranks: int) -> int:
    return payload * (ranks - 1)


def gather_bytes(part: int, ranks: int) -> int:
    """Every rank's part of that many bytes to every other rank."""
    return part * ranks * (ranks - 1)


def reduce_bytes(payload: int, ranks: int) -> int:
    """A sum or maximum of `payload` bytes, on all ranks."""
    return 2 * payload * (ranks - 1)


def state_bytes(rows: int, head_size: int) -> tuple[int, int]:
    """Bytes of `rows` rows (batch x queries x heads) of a state: with outputs of `head_size`, and of the lse alone."""
    return rows * (head_size + 1) * FLOAT32, rows * FLOAT32


def merge_choice(ranks: int, rows: int, head_size: int) -> str:
    """`"gather"` or `"reduce"`, whichever moves fewer bytes; a reduction takes a collective more.

    Gathering hands every rank all states; it is one collective, for few ranks and short queries. Reducing takes the
    maximum of the lse and then a sum, whose bytes a rank do not grow with the number of ranks.
    """
    packed, lse = state_bytes(rows, head_size)
    gather = gather_bytes(packed, ranks) // ranks
    reduce = (reduce_bytes(packed, ranks) + reduce_bytes(lse, ranks)) // ranks
    return "gather" if gather <= reduce + CALL_BYTES else "reduce"


def merge_traffic(ranks: int, rows: int, head_size: int, how: str | None = None) -> Traffic:
    """Merging one layer's states over the ranks."""
    if ranks == 1:
        return Traffic()
    packed, lse = state_bytes(rows, head_size)
    if (how or merge_choice(ranks, rows, head_size)) == "gather":
        return Traffic(1, gather_bytes(packed, ranks))
    return Traffic(2, reduce_bytes(packed, ranks) + reduce_bytes(lse, ranks))
