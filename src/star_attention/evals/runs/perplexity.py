"""Perplexity of a text's tails given their heads: what a method costs where nothing is to be found, only to be gone on from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from star_attention.engine import StarLLM
from star_attention.errors import ContextLengthError, SizeError
from star_attention.evals.reports import stats
from star_attention.evals.reports.stats import Difference, Mean, Scored
from star_attention.evals.runs.runner import Progress, encoded, engine_of
from star_attention.evals.runs.variants import Variant
from star_attention.hf.text.tokens import context_ids, query_ids


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """One variant on all windows.

    windows: mean negative log-likelihood of each window's tail, in nats a token. nll: their mean with its standard error.
    difference: nll minus the first variant's, paired by window (None for the first): exp of it is the ratio of perplexities.
    block_size, anchor_size: as they were resolved.
    """

    variant: str
    windows: tuple[float, ...]
    nll: Mean
    difference: Difference | None
    block_size: int
    anchor_size: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll.value)


def windows_of(tokenizer: Any, text: str, *, length: int, count: int | None) -> list[list[int]]:
    """Token ids of windows of a text, each of `length` tokens, one after another from the start: the tokenizer's BOS where it has
    one, then text. What is left at the end and fills no window is not used.

    count: the first so many; None takes all.

    Raises `SizeError` for a text that is shorter than `count` windows, or than one.
    """
    ids = query_ids(tokenizer, text)
    bos = tokenizer.bos_token_id
    opening = [bos] if bos is not None and context_ids(tokenizer, "a")[:1] == [bos] else []
    step = length - len(opening)
    fitting = len(ids) // step if step > 0 else 0
    if fitting < (count or 1):
        raise SizeError(
            f"the text has {len(ids):,} tokens, enough for {fitting:,} windows of {length:,} and not for {count or 1:,}; give a"
            " longer text, fewer windows, or a smaller length"
        )
    return [opening + ids[at * step : (at + 1) * step] for at in range(count or fitting)]


def run(
    star: StarLLM,
    windows: Sequence[Sequence[int]],
    variants: Sequence[Variant],
    *,
    tail: int,
    batch: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Perplexity]:
    """Perplexity of the last `tail` tokens of each window, whose other tokens are encoded as the context.

    (The context's last token goes with the tail, because only what phase 2 reads has logits: exactly `tail` tokens are scored, and
    all variants do the same.) windows: of one length; on several ranks all ranks need the same. batch: windows encoded at once, as
    far as they fit in a forward. Differences are against the first variant.

    Raises `SizeError` for a tail that leaves no context, `ContextLengthError` for windows beyond the model's positions.
    """
    length = len(windows[0])
    if not 1 <= tail <= length - 2:
        raise SizeError(
            f"tail {tail:,} leaves windows of {length:,} tokens no context; give 1 to {length - 2:,}"
        )
    limit = star.runtime.handle.max_positions
    if limit is not None and length > limit:
        raise ContextLengthError(
            f"windows have {length:,} tokens, more than the model's {limit:,} positions; give a smaller length"
        )
    found: list[Perplexity] = []
    first: list[Scored] = []
    for variant in variants:
        engine = engine_of(star, variant, variant.sizes(length))
        losses: list[float] = []
        sizes = (0, 0)
        for at in range(0, len(windows), batch):
            some = windows[at : at + batch]
            heads = [list(window[: -tail - 1]) for window in some]
            alone = (
                [encoded(engine, variant, head, seed=seed) for head in heads]
                if variant.ablates
                else None
            )
            contexts = engine.encode(heads) if alone is None else alone
            for context, window in zip(contexts, some, strict=True):
                logits_QV = engine.logits(context, list(window[-tail - 1 :]))
                if logits_QV is not None:
                    targets_Q = torch.tensor(window[-tail:], device=logits_QV.device)
                    losses.append(
                        torch.nn.functional.cross_entropy(logits_QV[:-1], targets_Q).item()
                    )
                sizes = (context.plan.block_size, context.plan.anchor_size)
            del contexts
            if progress is not None:
                progress(
                    f"{variant.name}: {min(at + batch, len(windows)):,} of {len(windows):,} windows"
                )
        if not losses:  # (rank 0 has them)
            continue
        scored = [
            Scored(sample=str(index), cell="", context=str(index), score=loss)
            for index, loss in enumerate(losses)
        ]
        found.append(
            Perplexity(
                variant=variant.key,
                windows=tuple(losses),
                nll=stats.mean(scored),
                difference=stats.paired(scored, first) if first else None,
                block_size=sizes[0],
                anchor_size=sizes[1],
            )
        )
        first = first or scored
    return found
