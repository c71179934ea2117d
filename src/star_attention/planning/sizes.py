"""Numbers of tokens and blocks: how they are written, their defaults and limits.

Standard library only.
"""

from __future__ import annotations

from star_attention.errors import SizeError, quote
from star_attention.planning.lookback import sink_size

MIN_BLOCK_SIZE = 1024
MAX_BLOCK_SIZE = 32768

TOKENS_PER_FORWARD = 8192
"""Forwards of twice as many tokens encode an 8B model no faster on an H200, in 0.7 GiB more."""
TOKENS_PER_FORWARD_ON_RANKS = 16384
"""Ranks wait for the whole anchor, whose layers arrive while it is computed if it is one forward.
An anchor of 16K in two forwards costs two H200s 6 %."""
TOKENS_PER_FORWARD_CPU = 2048
"""Forwards of 8K leave a CPU's caches and take new pages in each layer: a tenth slower at 135M."""
DEFAULT_FORWARD_RULE = "8k; 16k on several ranks; 2k on a CPU"
"""`default_forward_size`, in words."""

_UNITS = {"k": 1024, "m": 1024**2, "g": 1024**3}


def parse_size(text: str | int, name: str = "size") -> int:
    """Parse a number of tokens.

    Args:
        text: `4096`, `"4096"`, `"4k"`, `"128K"` or `"1m"`; units are powers of 1024.
        name: what to call the value in an error.

    Returns:
        The number; zero and negative ones pass, so that callers can state their own limits.

    Raises:
        SizeError: anything else.
    """
    error = SizeError(
        f"{name} {quote(text)} is not a number of tokens; write 4096, '4k', '128k' or '1m'"
    )
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise error
    if isinstance(text, int):
        return text
    digits, unit = text.strip().lower(), 1
    if digits and digits[-1] in _UNITS:
        digits, unit = digits[:-1], _UNITS[digits[-1]]
    try:
        tokens = (float(digits) if "." in digits else int(digits)) * unit
        whole = int(tokens)
    except (ValueError, OverflowError):
        raise error from None
    if tokens != whole:
        raise error
    return whole


def format_size(tokens: int) -> str:
    """Format `16384` as `16k` and `1048576` as `1m`; other sizes get thousands separators."""
    for suffix, unit in (("m", 1024**2), ("k", 1024)):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{suffix}"
    return f"{tokens:,}"


def counted(number: int, noun: str) -> str:
    """Format a count: `1 block`, `2,048 blocks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def default_forward_size(device_type: str, ranks: int) -> int:
    """Return the most context tokens of a forward.

    Args:
        device_type: where it runs ("cpu", "cuda").
        ranks: context-parallel ranks.
    """
    if device_type == "cpu":
        return TOKENS_PER_FORWARD_CPU
    return TOKENS_PER_FORWARD if ranks == 1 else TOKENS_PER_FORWARD_ON_RANKS


def default_block_size(context_tokens: int) -> int:
    """Return the paper's block size for a context.

    It is the smallest power of two that is at least a quarter of the context, within 1024..32768.
    Source: arXiv 2411.17116, section 3 (a quarter of the sequence up to 128K, fixed at 32K beyond).
    """
    size = MIN_BLOCK_SIZE
    while size * 4 < context_tokens and size < MAX_BLOCK_SIZE:
        size *= 2
    return size


def resolve_sizes(
    context_tokens: int,
    block_size: int | str | None,
    anchor_size: int | str | None,
    lookback: int = 0,
) -> tuple[int, int]:
    """Resolve block and anchor size for a context of `context_tokens` tokens.

    Args:
        context_tokens: length of the context.
        block_size: tokens of a block, or `"4k"`; None for `default_block_size`.
        anchor_size: tokens of the anchor, or `"4k"`; None for the block size, or with look-back for
            a sink of at most 64.
        lookback: blocks before its own that a block sees.

    Returns:
        Block size and anchor size in tokens.

    Raises:
        SizeError: a size that is not a number, a block below 1, an anchor below 0 or above the
            block.
    """
    block = default_block_size(context_tokens)
    if block_size is not None:
        block = parse_size(block_size, "block_size")
    if block < 1:
        raise SizeError(
            f"block_size {block} is below 1; give a positive number of tokens, or leave it out for"
            " the paper's rule"
        )
    by_rule = sink_size(block) if lookback else block
    anchor = by_rule if anchor_size is None else parse_size(anchor_size, "anchor_size")
    if anchor < 0:
        raise SizeError(
            f"anchor_size {anchor} is negative; give 0 (no anchor) to block_size {block}, or leave"
            " it out for the block size"
        )
    if anchor > block:
        raise SizeError(
            f"anchor_size {anchor} is above block_size {block}: the anchor is the head of the first"
            f" block; lower anchor_size to at most {block} or raise block_size"
        )
    return block, anchor


def check_lookback(lookback: int) -> None:
    """Raise `SizeError` unless `lookback` is a number of blocks, 0 or more."""
    if isinstance(lookback, bool) or not isinstance(lookback, int) or lookback < 0:
        raise SizeError(
            f"lookback {quote(lookback)} is not a number of blocks; give 0 (the paper's method) or"
            " more"
        )
