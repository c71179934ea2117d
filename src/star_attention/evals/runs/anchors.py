"""The anchors of ablations, by name."""

from __future__ import annotations

CONTENTS = ("first-block", "none", "constant", "random", "shuffled", "previous-block")
"""Tokens of the anchor: the head of the first block; none; one token repeated; random tokens; the
first block's in another order; the tokens right before the block."""

POSITIONS = ("first-block", "previous-block", "random")
"""Positions of the anchor: at the head of the context; right before the block; random ones before
the block, in order."""
