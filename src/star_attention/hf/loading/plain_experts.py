"""Which layers' experts have the form that we multiply ourselves."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def are_plain_experts(module: Any) -> bool:
    """True for experts in two tensors without biases, with a forward of transformers' form."""
    weights = dict(module.named_parameters())
    if set(weights) != {"gate_up_proj", "down_proj"} or not hasattr(module, "_apply_gate"):
        return False
    up, down = weights["gate_up_proj"], weights["down_proj"]
    return (
        not getattr(module, "is_transposed", False)
        and not getattr(module, "has_post_expert_norm", False)
        and up.dim() == down.dim() == 3
        and up.shape == (down.shape[0], 2 * down.shape[2], down.shape[1])
        and all(type(weight) is nn.Parameter for weight in (up, down))
        and all(weight.is_floating_point() and weight.is_contiguous() for weight in (up, down))
        and up.device.type != "meta"
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and list(inspect.signature(module.forward).parameters)
        == ["hidden_states", "top_k_index", "top_k_weights"]
    )
