"""The picture of a plan: a line for each block, context from left to right."""

from __future__ import annotations

from collections.abc import Sequence


def draw(
    owners: Sequence[int],
    blocks: Sequence[tuple[int, int]],
    anchor_size: int,
    width: int,
    lookback: int = 0,
) -> str:
    """Draw blocks; of more than 16, the middle ones are left out, with a note.

    Args:
        owners: the rank that holds each block.
        blocks: first token of each block, and the token after its last.
        anchor_size: leading tokens that every block sees.
        width: columns of the picture.
        lookback: blocks before its own that a block sees in the layers that look back.
    """
    numbered = list(enumerate(zip(owners, blocks, strict=True)))
    shown = numbered if len(numbered) <= 16 else [*numbered[:8], *numbered[-7:]]
    scale = width / blocks[-1][1]
    lines = [
        f"rank {owner:<2} b{index:<3}"
        f" |{_row(blocks[max(0, index - lookback)][0], start, stop, anchor_size, width, scale)}|"
        f" {start:,}..{stop:,}"
        for index, (owner, (start, stop)) in shown
    ]
    if len(shown) < len(numbered):
        lines.insert(8, f"{'':>10}  ... {len(numbered) - len(shown)} more blocks ...")
    return "\n".join([*lines, f"{'query':>10} |{'#' * width}| sees everything"])


def _row(first: int, start: int, stop: int, anchor_size: int, width: int, scale: float) -> str:
    row = ""
    for column in range(width):
        token = int((column + 0.5) / scale)
        if start <= token < stop or int(start * scale) == column:
            row += "#"
        # An anchor of less than a column is drawn, too.
        elif start > 0 and (token < anchor_size or (column == 0 and anchor_size)):
            row += "A"
        else:
            row += "+" if first <= token < start else "."
    return row
