"""Where a forward ends of which only the keys and values are wanted.

Encoding reads nothing else of the last layer: its attention, its MLP and the final norm are left
out, a thirtieth of a model of thirty layers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from star_attention.hf.execution import hook
from star_attention.hf.loading import fingerprint


def has_other_forwards(decoder: nn.Module) -> bool:
    """True if others have replaced the forward of a module. Not to be asked in our forwards."""
    return any("forward" in vars(module) for module in fingerprint.modules_of(decoder))


def last_kv_layer(handle: Any) -> int | None:
    """Return the layer of a `ModelHandle` that stores the last keys; None if no forward may end
    there.

    Forwards and hooks of others run after a module, too: accelerate's take its weights away again.
    """
    decoder = handle.decoder
    modules = [*map(vars, fingerprint.modules_of(decoder))]
    with hook.lock_of(handle.model):
        # Between forwards of ours, in whichever thread.
        other_forwards = any("forward" in attributes for attributes in modules)
    if other_forwards or any(attributes["_forward_hooks"] for attributes in modules):
        return None
    if not getattr(handle.config, "num_kv_shared_layers", None):
        return len(handle.windows) - 1
    # Later layers read the keys of earlier ones.
    return max(index for index, shape in enumerate(handle.layer_shapes) if shape is not None)
