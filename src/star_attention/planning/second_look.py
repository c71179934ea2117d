"""The second look in numbers: what share of a context, and how many tokens that are.

Standard library only.
"""

from __future__ import annotations

import math
from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.planning.windows import ALL, Windows, dropping

NEIGHBORS = 17
"""Tokens over which attention is averaged: a fact is more than the one token that a query finds."""


def check_share(share: Any) -> None:
    """Check a share of context tokens.

    Raises:
        InvalidInputError: a value other than a number from 0 to 1.
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)):
        raise InvalidInputError(
            f"second_look {quote(share)}: expected a number, got {type(share).__name__}; give the"
            " share of context tokens to compute again, such as 0.1, or 0 for none"
        )
    if not 0 <= share <= 1:
        raise InvalidInputError(
            f"second_look {share} is not a share from 0 to 1; give that of context tokens to"
            " compute again, such as 0.1, or 0 for none"
        )


def check_keeps(share: float, windows: Windows, context_tokens: int, kv_windows: str) -> None:
    """Check that a context keeps what a second look at a share of it takes.

    Args:
        share: the share, 0 for no second look.
        windows: sliding window of each layer in tokens, None for full attention.
        context_tokens: tokens of the context.
        kv_windows: what it keeps of layers with a window.

    Raises:
        InvalidInputError: it has dropped what its tokens saw.
    """
    dropped = sum(map(bool, dropping(windows, context_tokens, kv_windows)))
    if share and dropped:
        raise InvalidInputError(
            f"second_look {share} does not work: {dropped} of {len(windows)} layers have a sliding"
            f" window, of which a context of {context_tokens:,} tokens keeps the last one alone;"
            f" encode it with kv_windows={quote(ALL)} (--kv-windows {ALL}), or leave it out"
        )


def chosen_tokens(share: float, context_tokens: int) -> int:
    """Return how many tokens a share of a context is, rounded up."""
    # Rounded before: 0.1 * 30 is a little more than 3.
    return math.ceil(round(share * context_tokens, 6))
