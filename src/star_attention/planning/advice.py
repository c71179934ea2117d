"""Advice on sizes that are allowed, but hardly meant."""

from __future__ import annotations

from star_attention.planning.sizes import counted

_FEW_TOKENS = 64
_MANY_BLOCKS = 64


def small_blocks(block_size: int | None, context_tokens: int) -> str:
    """Return a warning of many blocks of a few tokens, "" for others.

    As a rule a number of blocks was meant. Short contexts may be cut as finely as anybody likes.
    """
    if block_size is None or block_size >= _FEW_TOKENS:
        return ""
    if context_tokens <= block_size * _MANY_BLOCKS:
        return ""
    return (
        f"block_size {block_size} makes blocks of {counted(block_size, 'token')}, not {block_size}"
        " blocks, in which a text loses its sense; give a size such as 4k, or leave it out"
    )
