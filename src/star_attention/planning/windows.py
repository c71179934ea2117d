"""What layers with a sliding window keep of a context. Standard library only.

A token at position p sees the keys from p - window + 1 on. Whatever comes after a context of n
tokens, its queries, answers or more context, stands at n or later: of such a layer it sees the last
`window - 1` tokens of the context at most, whatever blocks and anchor are.
"""

from __future__ import annotations

from collections.abc import Sequence

from star_attention.planning.segments import Segments

LAST, ALL = "last", "all"
KV_WINDOWS = (LAST, ALL)
"""What is kept of layers with a window: what later tokens see, or the whole context."""

Windows = Sequence[int | None]
"""Sliding window of each layer in tokens, None for full attention."""


def first_kept(context_tokens: int, window: int | None) -> int:
    """Return the first token of a context that later tokens see in a layer."""
    return 0 if window is None else max(0, context_tokens - window + 1)


def kept(segments: Segments, window: int | None, context_tokens: int) -> Segments:
    """Return which of a rank's tokens a layer keeps: those that later tokens see.

    Args:
        segments: the context tokens of the rank.
        window: sliding window of the layer in tokens, None for full attention.
        context_tokens: tokens of the whole context.
    """
    return Segments(segments.within(first_kept(context_tokens, window), context_tokens))


def kept_by_layer(
    segments: Segments, windows: Windows, context_tokens: int, kv_windows: str
) -> list[Segments]:
    """Return which of a rank's tokens each layer keeps, by the setting `kv_windows`."""
    if kv_windows == ALL:
        return [segments] * len(windows)
    by_window = {window: kept(segments, window, context_tokens) for window in set(windows)}
    return [by_window[window] for window in windows]


def dropping(windows: Windows, context_tokens: int, kv_windows: str) -> list[int | None]:
    """Return the windows of the layers that do not keep the whole context, None for others."""
    return [
        window if kv_windows == LAST and first_kept(context_tokens, window) > 0 else None
        for window in windows
    ]
