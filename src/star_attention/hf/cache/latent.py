"""Attention modules that expand compressed keys and values (MLA), as phase 2 does without.

transformers caches what keys and values are computed from, and expands all of it in each forward,
by `kv_b_proj`. `LatentAttention` knows such a module; `attention.latent` computes the rest.

Axes: B batch, K tokens, H heads, D head size of keys, N their part without rotation, V head size of
values, C compressed size, R rotary size.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from star_attention.attention.latent import Expansion
from star_attention.planning.model_shape import most_compressed
from star_attention.storage.kv import Pair

_log = logging.getLogger("star_attention")


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """An attention module whose keys and values are products of a weight and compressed ones.

    Attributes:
        module: the module.
        heads: H.
        plain_size: N.
        value_size: V.
        compressed_size: C.
    """

    module: Any
    heads: int
    plain_size: int
    value_size: int
    compressed_size: int

    @classmethod
    def of(cls, module: Any, stored: Pair, expanded: Pair) -> LatentAttention | None:
        """Return what is known of a module that expands; None if it does so in another way.

        Args:
            module: the module.
            stored: what it passed to its cache, `[B, 1, K, C]` and `[B, 1, K, R]`.
            expanded: the keys and values that it made of that, `[B, H, K, D]` and `[B, H, K, V]`.
        """
        (c_BGKC, r_BGKR), (k_BHKD, v_BHKV) = stored, expanded
        if c_BGKC.shape[1] != 1 or not hasattr(module, "kv_b_proj"):
            return None
        known = cls(
            module=module,
            heads=k_BHKD.shape[1],
            plain_size=k_BHKD.shape[3] - r_BGKR.shape[3],
            value_size=v_BHKV.shape[3],
            compressed_size=c_BGKC.shape[3],
        )
        # Without data, shapes have to do.
        proven = known.is_readable() and (c_BGKC.is_meta or known._makes(stored, expanded))
        return known if proven else None

    def _makes(self, stored: Pair, expanded: Pair) -> bool:
        """True if the weights make these keys and values."""
        c_B1KC, r_B1KR = stored
        x_BHKX = torch.einsum("bgkc,hxc->bhkx", c_B1KC, self.expansion().weight_HXC)
        plain_BHKN, values_BHKV = x_BHKX.tensor_split([self.plain_size], -1)
        keys_BHKD = torch.cat([plain_BHKN, r_B1KR.expand(-1, self.heads, -1, -1)], -1)
        pairs = zip((keys_BHKD, values_BHKV), expanded, strict=True)
        return all(_is_close(actual, expected) for actual, expected in pairs)

    def is_readable(self) -> bool:
        """True if the weights can be read as a matrix at the moment; logs why they cannot."""
        reason = self._obstacle()
        if reason is not None:
            _log.info(
                "%s expands the whole context for every token: %s",
                type(self.module).__name__,
                reason,
            )
        return reason is None

    def _obstacle(self) -> str | None:
        linear = self.module.kv_b_proj
        if type(linear) is not nn.Linear:
            return f"its kv_b_proj is a {type(linear).__name__}"
        weight = linear.weight
        if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
            return f"the weight of its kv_b_proj is a {type(weight).__name__} of {weight.dtype}"
        shape = self.heads * (self.plain_size + self.value_size), self.compressed_size
        if weight.shape != shape or linear.bias is not None:
            return f"its kv_b_proj is not just a matrix of {shape[0]} x {shape[1]}"
        if "forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks:
            return "its kv_b_proj has hooks"
        return None

    @property
    def most_queries(self) -> int:
        """Queries of a forward up to which it attends to compressed keys."""
        return most_compressed(self.compressed_size, self.plain_size, self.value_size)

    def expansion(self) -> Expansion:
        """Return the weights, as they are now."""
        weight_XC: Tensor = self.module.kv_b_proj.weight
        return Expansion(weight_XC.view(self.heads, -1, self.compressed_size), self.plain_size)


Latents = list[LatentAttention | None]
"""Of each cache layer the attention that expands what it stores; None for others."""


def usable(latents: Latents) -> Latents:
    """Return those whose weights can be read at the moment; None for others.

    An adapter on them may have been loaded since the model was probed.
    """
    return [latent if latent is not None and latent.is_readable() else None for latent in latents]


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    error = (actual - expected).abs().max()
    return bool(error <= torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max())
