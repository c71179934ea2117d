"""Advice on sizes that are allowed, but hardly meant."""

from __future__ import annotations

from star_attention.planning.plan import counted


def small_blocks(block_size: int | None) -> str:
    """Return a warning of blocks so small that their number may be meant; "" for others."""
    if block_size is None or block_size >= 64:
        return ""
    return (
        f"block_size {block_size} makes blocks of {counted(block_size, 'token')}, not {block_size}"
        " blocks, in which a text loses its sense; give a size such as 4k, or leave it out"
    )
