"""Contexts too short to gain from blocks, by the default rule: one block, which is dense attention.

On a GPU, forwards of small models wait for launches, of which blocks and their anchor take more.
Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable

from star_attention.config import StarConfig
from star_attention.planning import cost
from star_attention.planning.hardware import HARDWARE
from star_attention.planning.model_shape import ModelShape
from star_attention.planning.plan import BlockPlan

ON = HARDWARE["h200-nvlink"]

DENSE_LAYER_S, BLOCKS_LAYER_S = 1.1e-3, 2.6e-3
"""Seconds that a layer's launches take in a forward that is not compiled.

From 33 and 78 ms for the 30 layers of a model of 135M parameters at 4K, in one block and in four,
on the host of an H200.
"""


def may_choose(config: StarConfig, device_type: str) -> bool:
    """True if no setting asks for blocks, and launches may take longer than the work."""
    chosen = (config.block_size, config.anchor_size) != (None, None) or config.lookback > 0
    return device_type == "cuda" and config.method == StarConfig.method and not chosen


def chosen_plan(
    plan: BlockPlan, config: StarConfig, device_type: str, shape: Callable[[], ModelShape]
) -> BlockPlan:
    """Return the plan of the default sizes, or one block where that is at least as fast.

    The choice does not depend on the ranks, whose number is to be invisible. It concerns contexts
    of one forward: longer ones run compiled layers, and wait for the device.

    Args:
        plan: the plan by the rule of the block size.
        config: the engine's settings.
        device_type: "cpu" or "cuda".
        shape: returns the model, which takes a moment.
    """
    tokens = plan.context_tokens
    is_short = 1 < plan.num_blocks and tokens <= config.forward_size(device_type)
    if not (is_short and may_choose(config, device_type)):
        return plan
    model = shape()
    dense = BlockPlan.resolve(tokens, tokens, ranks=plan.ranks)
    if _seconds(model, dense, DENSE_LAYER_S) > _seconds(model, plan, BLOCKS_LAYER_S):
        return plan
    return dense


def waits_for_launches(parameters: int, layers: int, tokens: int) -> bool:
    """Return True if a device computes a forward in less time than its launches take.

    Args:
        parameters: those of the decoder.
        layers: its layers.
        tokens: tokens of the forward.
    """
    return ON.seconds(cost.Flops(linear=2 * parameters * tokens)) < layers * DENSE_LAYER_S


def _seconds(shape: ModelShape, plan: BlockPlan, layer_s: float) -> float:
    """Estimate one forward: the device's work, or the launches if they take longer."""
    flops = cost.phase1(shape, plan, tokens_per_forward=plan.context_tokens)
    return max(ON.seconds(flops), shape.layers * layer_s)
