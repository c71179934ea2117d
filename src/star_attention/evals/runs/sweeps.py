"""Variants of the paper's sweeps: block sizes (figure 5a), anchor sizes (5b), anchors (table 4)."""

from __future__ import annotations

from star_attention.config import BASELINE_METHOD, StarConfig
from star_attention.evals.runs.variants import Variant, parse_all

TABLE_4 = (
    "anchor=none",
    "positions=random",
    "positions=previous-block",
    "",
    "anchor=constant",
    "anchor=random",
    "anchor=shuffled",
    "anchor=previous-block",
    "anchor=previous-block:positions=previous-block",
)
"""Rows of the paper's table, as written after `star:BLOCK`; "" is Star Attention itself."""


def block_sweep(blocks: str) -> list[Variant]:
    """Return dense attention, then one variant for each block size, the anchor as large."""
    return _with_baseline([f"{StarConfig.method}:{size}" for size in blocks.split(",")])


def anchor_sweep(block: str, anchors: str) -> list[Variant]:
    """Return dense attention, then one variant for each anchor size, at one block size."""
    return _with_baseline([f"{StarConfig.method}:{block}:{size}" for size in anchors.split(",")])


def ablation_table(block: str) -> list[Variant]:
    """Return dense attention, then the rows of `TABLE_4`."""
    return _with_baseline([f"{StarConfig.method}:{block}:{row}".rstrip(":") for row in TABLE_4])


def _with_baseline(variants: list[str]) -> list[Variant]:
    return parse_all(",".join([BASELINE_METHOD, *variants]))
