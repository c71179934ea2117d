"""What the anchor is for: the paper's ablations (its Table 4), each block encoded behind an anchor of another kind.

In front of every block but the first stand `anchor_size` tokens, encoded anew for each block as the paper's own implementation
does, and dropped with it. With the first block's tokens at the first block's positions this is Star Attention. Windows of
sliding layers count places here, not positions.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import torch
from torch import Tensor

from star_attention.engine import StarLLM
from star_attention.errors import InvalidInputError
from star_attention.methods.star import Star
from star_attention.storage.context import EncodedContext
from star_attention.tools.baselines import Anchor, official_encode

CONTENTS = ("first-block", "none", "constant", "random", "shuffled", "previous-block")
"""What stands in front of a block: the head of the first block; nothing; one token again and again; random tokens; the first
block's in another order; the tokens right before the block."""

POSITIONS = ("first-block", "previous-block", "random")
"""Where it says that it stands: at the context's head; right before the block; at random places before the block, in order."""


def encode(
    star: StarLLM,
    content: Any,
    *,
    anchor: str = CONTENTS[0],
    positions: str = POSITIONS[0],
    constant: str = " the",
    seed: int = 0,
) -> EncodedContext:
    """A context whose blocks saw another anchor; the sizes are the engine's, and answers run as on any other.

    constant: text whose first token "constant" repeats. seed: of what is random; the same for the same context and
    block, another for others.

    Raises `InvalidInputError` for unknown names, engines of other methods or of several ranks, and models whose rotary frequencies
    depend on the length.
    """
    for value, known in ((anchor, CONTENTS), (positions, POSITIONS)):
        if value not in known:
            raise InvalidInputError(
                f"anchor {value!r} is unknown; choose one of {', '.join(known)}"
            )
    if star.config.method != "star" or star._comm.size > 1:
        raise InvalidInputError("ablations of the anchor need method 'star' on one rank")
    if star._handle.rotaries:
        raise InvalidInputError(
            "ablations of the anchor do not work where rotary frequencies depend on the length"
        )
    (_, prepared) = star._prepare(content)
    ((ids_L, chat_state),) = prepared
    plan = star._plan(len(ids_L))
    drawn_for = hashlib.sha256(str(ids_L.tolist()).encode()).hexdigest()

    def anchor_of(start: int, stop: int) -> Anchor | None:
        size = 0 if anchor == "none" else plan.anchor_size
        if start == 0 or size == 0:
            return None
        rng = random.Random(f"anchor {anchor} {positions} {seed} {start} {size} {drawn_for}")
        return _content(star, ids_L, anchor, start, size, constant, rng), _places(
            positions, start, size, rng
        )

    with star._measured() as stats:
        kv = official_encode(
            star._handle,
            ids_L,
            plan,
            star.tokens_per_forward,
            anchor_of=anchor_of,
            kv_format=Star().kv_format(star.config),
        )
    return star._context(ids_L, plan, kv, plan.layout, None, chat_state, stats)


def _content(
    star: StarLLM,
    ids_L: Tensor,
    anchor: str,
    start: int,
    size: int,
    constant: str,
    rng: random.Random,
) -> Tensor:
    if anchor == "constant":
        (token, *_) = star._need_tokenizer("a constant anchor")(
            constant, add_special_tokens=False
        ).input_ids
        return torch.full((size,), int(token), dtype=torch.int64)
    if anchor == "random":
        special = set() if star.tokenizer is None else set(star.tokenizer.all_special_ids)
        ordinary = [token for token in range(star._handle.vocab_size) if token not in special]
        return torch.tensor(rng.choices(ordinary, k=size))
    if anchor == "previous-block":
        return ids_L[start - size : start]
    head = ids_L[:size].tolist()
    if anchor == "shuffled":
        rng.shuffle(head)
    return torch.tensor(head)


def _places(positions: str, start: int, size: int, rng: random.Random) -> Tensor:
    if positions == "previous-block":
        return torch.arange(start - size, start)
    if positions == "random":
        return torch.tensor(sorted(rng.sample(range(start), size)))
    return torch.arange(size)
