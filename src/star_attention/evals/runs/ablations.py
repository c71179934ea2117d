"""The paper's ablations of the anchor (its Table 4): blocks encoded after another anchor.

Every block but the first is preceded by `anchor_size` tokens, which are encoded again for each
block, as in the paper's own implementation, and dropped afterwards. With the first block's tokens
at the first block's positions this is Star Attention. Windows of sliding layers count places, not
positions.
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
from star_attention.errors import InvalidInputError, quote
from star_attention.evals.runs.anchors import CONTENTS, POSITIONS
from star_attention.methods.star import Star
from star_attention.phase1 import EncodeJob, Steps
from star_attention.storage.context import EncodedContext
from star_attention.storage.kv import ContextKV
from star_attention.tools.baselines import Anchor, official_encode

CONSTANT = " the"
"""The anchor "constant" repeats the first token of this text."""


class AblatedStar(Star):
    """Star Attention with another anchor.

    Args:
        content: Tokens of the anchor, one of `CONTENTS`.
        positions: Positions of the anchor, one of `POSITIONS`.
        tokenizer: For the constant token, and to leave special tokens out of random ones.
        seed: Seed of random anchors: the same for the same context and block, different for others.

    Raises:
        InvalidInputError: For unknown names, and for a constant anchor without a tokenizer.
    """

    def __init__(
        self,
        *,
        content: str = CONTENTS[0],
        positions: str = POSITIONS[0],
        tokenizer: Any = None,
        seed: int = 0,
    ) -> None:
        for name, value, known in (
            ("anchor", content, CONTENTS),
            ("positions", positions, POSITIONS),
        ):
            if value not in known:
                raise InvalidInputError(
                    f"{name} {quote(value)} is unknown; choose one of {', '.join(known)}"
                )
        if content == "constant" and tokenizer is None:
            raise InvalidInputError("a constant anchor needs a tokenizer; give one to StarLLM")
        self._content, self._positions, self._seed = content, positions, seed
        self._tokenizer = tokenizer

    def encode(self, job: EncodeJob) -> Steps[list[ContextKV]]:
        # In a single step.
        yield from ()
        return [
            official_encode(
                job.handle,
                ids_L,
                job.plan,
                job.tokens_per_forward,
                anchor_of=self._anchor_of(ids_L, job.plan.anchor_size, job.handle.vocab_size),
                kv_format=job.kv_format,
                cp_rank=job.comm.cp_rank,
            )
            for ids_L in job.ids_BL
        ]

    def _anchor_of(
        self, ids_L: Tensor, anchor_size: int, vocab_size: int
    ) -> Callable[[int, int], Anchor | None]:
        """Return token ids and positions of the anchor, by start and stop of a block."""
        context_sha256 = hashlib.sha256(str(ids_L.tolist()).encode()).hexdigest()
        size = 0 if self._content == "none" else anchor_size

        def anchor_of(start: int, stop: int) -> Anchor | None:
            if start == 0 or size == 0:
                return None
            rng = random.Random(
                f"anchor {self._content} {self._positions} {self._seed} {start} {size}"
                f" {context_sha256}"
            )
            ids_A = anchor_ids(self._content, ids_L, start, size, rng, self._tokenizer, vocab_size)
            return ids_A, anchor_positions(self._positions, start, size, rng)

        return anchor_of


def anchor_ids(
    content: str,
    ids_L: Tensor,
    start: int,
    size: int,
    rng: random.Random,
    tokenizer: Any,
    vocab_size: int,
) -> Tensor:
    """Return the token ids of the anchor of the block at `start`, int64 `[size]`."""
    if content == "constant":
        (token, *_) = tokenizer(CONSTANT, add_special_tokens=False).input_ids
        return torch.full((size,), int(token), dtype=torch.int64)
    if content == "random":
        special = set() if tokenizer is None else set(tokenizer.all_special_ids)
        ordinary = [token for token in range(vocab_size) if token not in special]
        return torch.tensor(rng.choices(ordinary, k=size))
    if content == "previous-block":
        return ids_L[start - size : start]
    head = ids_L[:size].tolist()
    if content == "shuffled":
        rng.shuffle(head)
    return torch.tensor(head)


def anchor_positions(positions: str, start: int, size: int, rng: random.Random) -> Tensor:
    """Return the positions of the anchor of the block at `start`, int64 `[size]`."""
    if positions == "previous-block":
        return torch.arange(start - size, start)
    if positions == "random":
        return torch.tensor(sorted(rng.sample(range(start), size)))
    return torch.arange(size)


def encode(
    star: StarLLM,
    content: Any,
    *,
    anchor: str = CONTENTS[0],
    positions: str = POSITIONS[0],
    seed: int = 0,
    template_kwargs: dict[str, Any] | None = None,
) -> EncodedContext:
    """Encode one context with another anchor; it is answered like any other.

    Args:
        star: An engine of method "star" on one rank; its sizes apply.
        content: Text, token ids or messages, as for `StarLLM.encode`.
        anchor: Tokens of the anchor, one of `CONTENTS`.
        positions: Positions of the anchor, one of `POSITIONS`.
        seed: Seed of random anchors: the same for the same context and block, different for others.
        template_kwargs: What the chat template reads beside messages.

    Raises:
        InvalidInputError: For unknown names, engines of other methods or of several ranks, and
            models whose rotary frequencies depend on the length.
    """
    runtime = star.runtime
    method = AblatedStar(
        content=anchor, positions=positions, tokenizer=runtime.tokenizer, seed=seed
    )
    if not runtime.method.shares_anchor or runtime.comm.size > 1:
        raise InvalidInputError(
            "ablations of the anchor need method 'star' on one rank; leave them out"
        )
    if runtime.handle.rotaries:
        raise InvalidInputError(
            "ablations of the anchor do not work if rotary frequencies depend on the length; use"
            " another model"
        )
    _, contexts = inputs.prepare_contexts(runtime, content, template_kwargs=template_kwargs)
    (context,) = encoding.encode(runtime, contexts, method=method)
    return context
