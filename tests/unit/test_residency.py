"""Layers of a context in host memory that stay on the device, and what that takes there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from star_attention.planning import cost
from star_attention.planning.plan import BlockPlan
from star_attention.planning.residency import staying, stays
from tests.unit.test_cost import SHAPE


@pytest.mark.parametrize("share", [0, 0.3, 0.5, 0.75, 1])
def test_a_share_of_the_layers_stays(share: float) -> None:
    kept = [stays(layer, 32, share) for layer in range(32)]
    assert sum(kept) == staying(32, share) == int(32 * share)
    # Evenly: any eight neighbors hold about their share.
    for first in range(0, 25):
        assert abs(sum(kept[first : first + 8]) - 8 * share) < 2


@pytest.mark.parametrize("kept", [0, 3, 8, 10])
def test_a_share_of_the_layers_stays_on_the_device(kept: int) -> None:
    """What arrives has room for three layers, or for those that there are."""
    shape = replace(SHAPE, kv_elements_by_layer=SHAPE.kv_elements_by_layer * 5)
    plan = BlockPlan(context_tokens=50, block_size=16, anchor_size=7)
    places: tuple[dict[str, Any], ...] = (dict(kv_device="cpu", kv_resident=kept / 10), {})
    memory, plain = (
        cost.memory_per_rank(shape, plan, tokens_per_forward=8, kv_windows="all", **place)
        for place in places
    )
    layer = plain.kv // shape.kv_layers
    assert (memory.kv, memory.host) == (layer * kept, layer * (10 - kept))
    assert memory.working - plain.working == layer * min(3, 10 - kept)
