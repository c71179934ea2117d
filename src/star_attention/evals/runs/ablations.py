"""What the anchor is for: the paper's ablations (its Table 4), each block encoded behind an anchor of another kind.

In front of every block but the first stand `anchor_size` tokens, encoded anew for each block as the paper's own implementation
does, and dropped with it. With the first block's tokens at the first block's positions this is Star Attention. Windows of
sliding layers count places here, not positions.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from star_attention import encoding, inputs
from star_attention.engine import StarLLM
from star_attention.errors import InvalidInputError
from star_attention.methods.star import Star
from star_attention.phase1 import EncodeJob
from star_attention.storage.context import EncodedContext
from star_attention.storage.kv import ContextKV
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
    runtime = star.runtime
    if not runtime.method.shares_anchor or runtime.comm.size > 1:
        raise InvalidInputError("ablations of the anchor need method 'star' on one rank")
    if runtime.handle.rotaries:
        raise InvalidInputError(
            "ablations of the anchor do not work where rotary frequencies depend on the length"
        )
    _, (context,) = inputs.prepare_contexts(runtime, content)
    ids_L, plan = context.ids_L, runtime.plan_for(len(context.ids_L))
    ids_hash = hashlib.sha256(str(ids_L.tolist()).encode()).hexdigest()

    def anchor_of(start: int, stop: int) -> Anchor | None:
        size = 0 if anchor == "none" else plan.anchor_size
        if start == 0 or size == 0:
            return None
        rng = random.Random(f"anchor {anchor} {positions} {seed} {start} {size} {ids_hash}")
        return _content(star, ids_L, anchor, start, size, constant, rng), _places(
            positions, start, size, rng
        )

    (encoded,) = encoding.encode(runtime, [context], method=_AblatedStar(anchor_of))
    return encoded


class _AblatedStar(Star):
    """Star Attention with another anchor before each block, encoded again for each."""

    def __init__(self, anchor_of: Callable[[int, int], Anchor | None]) -> None:
        self._anchor_of = anchor_of

    def encode(self, job: EncodeJob) -> list[ContextKV]:
        return [
            official_encode(
                job.handle,
                ids_L,
                job.plan,
                job.tokens_per_forward,
                anchor_of=self._anchor_of,
                kv_format=job.kv_format,
            )
            for ids_L in job.ids_BL
        ]


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
        (token, *_) = star.runtime.need_tokenizer("a constant anchor")(
            constant, add_special_tokens=False
        ).input_ids
        return torch.full((size,), int(token), dtype=torch.int64)
    if anchor == "random":
        special = set() if star.tokenizer is None else set(star.tokenizer.all_special_ids)
        ordinary = [
            token for token in range(star.runtime.handle.vocab_size) if token not in special
        ]
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
