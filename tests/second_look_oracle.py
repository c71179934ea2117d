"""The second look on whole models: slow, and what every fast path is compared with.

The choice is read off the attention weights of an eager forward. The answer is one more eager
forward with an explicit mask, over the context, the chosen tokens once more at their own positions,
and query and answer: the latter two see, of each chosen token, the later one alone.

Axes: `L` context tokens, `T` tokens of query and answer, `N` all tokens of a forward, `V`
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from tests.model_oracle import (
    Mask,
    cached,
    eager_attention,
    law_mask,
    layer_masks,
    other_masks,
    pinned_rope,
)

NEIGHBORS = 17


@torch.no_grad()
def attention_mass(
    model: PreTrainedModel,
    ids: list[int],
    *,
    context_len: int,
    query_len: int,
    block_size: int,
    anchor_size: int,
    lookback: int = 0,
    lookback_layers: Collection[int] = (),
    rope_length: int | None = None,
) -> torch.Tensor:
    """Return how much a query attends to each context token, in all heads and layers, `[L]`.

    Args:
        model: the model.
        ids: ids of context and query, at least.
        context_len: tokens of the context.
        query_len: tokens of the query.
        block_size: tokens of a block.
        anchor_size: tokens of the anchor.
        lookback: blocks before its own that a block sees in `lookback_layers`.
        lookback_layers: numbers of these layers.
        rope_length: length for which length-dependent rotary frequencies are taken.
    """
    N = context_len + query_len

    def masks(lookback: int) -> Mask:
        return layer_masks(
            model,
            lambda window: law_mask(context_len, N, block_size, anchor_size, window, lookback),
        )

    mask = masks(0)
    with (
        eager_attention(model),
        pinned_rope(model, rope_length or N),
        other_masks(model, lookback_layers, mask, masks(lookback)),
    ):
        output = model(
            input_ids=torch.tensor([ids[:N]]),
            attention_mask=mask,
            position_ids=torch.arange(N)[None],
            output_attentions=True,
        )
    mass_L = torch.zeros(context_len)
    for weights_1HNN in output.attentions:
        mass_L += weights_1HNN[0, :, context_len:, :context_len].sum((0, 1))
    return mass_L


def second_look_choice(
    model: PreTrainedModel, ids: list[int], share: float, **law: Any
) -> list[int]:
    """Return the positions of the share of the context that a query attends to most.

    Args:
        model: the model.
        ids: ids of context and query, at least.
        share: share of the context's tokens.
        law: further arguments of `attention_mass`.
    """
    mass_L = attention_mass(model, ids, **law)
    around = [
        float(mass_L[max(0, at - NEIGHBORS // 2) : at + NEIGHBORS // 2 + 1].sum())
        for at in range(len(mass_L))
    ]
    order = sorted(range(len(mass_L)), key=lambda at: -around[at])
    return sorted(order[: math.ceil(share * len(mass_L) - 1e-9)])


@torch.no_grad()
def second_look_logits(
    model: PreTrainedModel,
    ids: list[int],
    chosen: list[int],
    *,
    context_len: int,
    block_size: int,
    anchor_size: int,
    lookback: int = 0,
    lookback_layers: Collection[int] = (),
    rope_length: int | None = None,
) -> torch.Tensor:
    """Return the logits of query and answer, `[T, V]`, after chosen tokens were computed again.

    Arguments as for `attention_mass`; `ids` are those of context, query and answer.
    """
    L, T = context_len, len(ids) - context_len
    positions = [*range(L), *chosen, *range(L, L + T)]
    positions_N = torch.tensor(positions)
    is_old_N = torch.arange(len(positions)) < L
    is_replaced_N = is_old_N & torch.isin(positions_N, torch.tensor(chosen))

    def visible(window: int | None, looks_back: int) -> torch.Tensor:
        ahead_NN = positions_N[:, None] - positions_N[None]
        keep_NN = (ahead_NN >= 0) & ~is_replaced_N[None]
        law_LL = law_mask(L, L, block_size, anchor_size, None, looks_back)
        keep_NN[:L] = False
        keep_NN[:L, :L] = law_LL
        if window is not None:
            return keep_NN & (ahead_NN < window)
        if not looks_back and lookback_layers:
            # A token that is computed again sees what it saw before, and the others before it.
            again = slice(L, L + len(chosen))
            keep_NN[again, :L] &= law_LL[chosen]
        return keep_NN

    def masks(lookback: int) -> Mask:
        return layer_masks(model, lambda window: visible(window, lookback))

    mask = masks(0)
    cache: Any = DynamicCache()
    with (
        eager_attention(model),
        pinned_rope(model, rope_length or len(ids)),
        other_masks(model, lookback_layers, mask, masks(lookback)),
    ):
        logits_1NV = model(
            input_ids=torch.tensor([[ids[position] for position in positions]]),
            attention_mask=mask,
            position_ids=positions_N[None],
            use_cache=True,
            **cached(model, cache),
        ).logits
    return logits_1NV[0, -T:]
