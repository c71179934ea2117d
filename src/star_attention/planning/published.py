"""What the paper printed about speed (arXiv 2411.17116, version 3). Standard library only.

Its times are of its own implementation in bfloat16 on A100s. Its baseline is ring attention with
contiguous shards. A worker is a group of two GPUs for models of 8B, whose layers it splits.
"""

from __future__ import annotations

from dataclasses import dataclass

_K = 1024


@dataclass(frozen=True, kw_only=True)
class PublishedSpeedUp:
    """A row of the paper's Table 1 or 5, for models of 8B.

    Attributes:
        context, block: in tokens; the anchor is as large as the block.
        workers: groups of GPUs that share the context (Table 7).
        speed_up: Star Attention over ring attention, times.
        table: where it is printed.
    """

    context: int
    block: int
    workers: int
    speed_up: float
    table: int


SPEED_UPS = tuple(
    PublishedSpeedUp(
        context=context * _K, block=block * _K, workers=workers, speed_up=speed_up, table=table
    )
    for context, block, workers, speed_up, table in (
        (16, 4, 4, 1.1, 1),
        (32, 8, 4, 1.2, 1),
        (64, 16, 4, 1.8, 1),
        (128, 32, 4, 2.7, 1),
        (256, 32, 8, 10.8, 5),
        (512, 32, 8, 16.2, 5),
        (1024, 32, 16, 16.9, 5),
    )
)

SECONDS = {
    16 * _K: {"one process": 7.0, "ring": 10.0, "star": 9.0},
    32 * _K: {"one process": 10.0, "ring": 12.0, "star": 10.0},
    64 * _K: {"one process": 18.0, "ring": 22.0, "star": 12.0},
    128 * _K: {"ring": 53.0, "star": 20.0},
}
"""Seconds per sample of 8B on eight A100s, answers included (Table 6); one process, with the layers
on all GPUs, had no memory for 128K."""


def speed_up(context: int) -> PublishedSpeedUp | None:
    """Return the paper's row for a length, None if it has none."""
    return next((row for row in SPEED_UPS if row.context == context), None)
