"""Answers of tokens that have a text: models may have rows for more tokens than their tokenizer."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

_unknown: weakref.WeakKeyDictionary[Any, tuple[tuple[int, int], Tensor]] = (
    weakref.WeakKeyDictionary()
)
_processors: weakref.WeakKeyDictionary[Any, tuple[Any, list[KnownTokens]]] = (
    weakref.WeakKeyDictionary()
)
"""The last processor of each tokenizer, if it needs one, and what it was made for."""


class KnownTokens(LogitsProcessor):
    """Forbids token ids that the tokenizer does not know, which would be answers without a text.

    Args:
        unknown_ids: the token ids, int64.
    """

    reads_scores_only = True
    """True: rows that share this object may be processed in one call."""

    def __init__(self, unknown_ids: Tensor) -> None:
        self._unknown_ids = unknown_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._unknown_ids = self._unknown_ids.to(scores.device)
        return scores.index_fill(1, self._unknown_ids, -torch.inf)


def unknown_ids(tokenizer: Any, vocab_size: int) -> Tensor:
    """Return the token ids of a model that its tokenizer does not know, int64, ascending."""
    if vocab_size <= len(tokenizer):
        return torch.empty(0, dtype=torch.int64, device="cpu")
    version = (len(tokenizer), vocab_size)
    cached = _unknown.get(tokenizer)
    if cached is None or cached[0] != version:
        unknown = sorted(set(range(vocab_size)) - set(tokenizer.get_vocab().values()))
        cached = _unknown[tokenizer] = (
            version,
            torch.tensor(unknown, dtype=torch.int64, device="cpu"),
        )
    return cached[1]


def warn_about_unknown_ids(tokenizer: Any, vocab_size: int, ids_L: Tensor) -> None:
    """Warn of token ids in a context that have no text: of another tokenizer, perhaps."""
    if tokenizer is None or vocab_size <= len(tokenizer):
        return
    unknown = ids_L[torch.isin(ids_L, unknown_ids(tokenizer, vocab_size))]
    if len(unknown):
        warnings.warn(
            f"the context has {len(unknown):,} token ids that the tokenizer does not know (the"
            f" first is {int(unknown[0])}); check that they are the model's own tokenizer's",
            stacklevel=2,
        )


def known_tokens(tokenizer: Any, vocab_size: int, ends: set[int]) -> list[LogitsProcessor]:
    """Return the processors that an answer needs: none where the tokenizer knows all ids.

    Args:
        tokenizer: a transformers tokenizer; None for answers of token ids.
        vocab_size: token ids of the model.
        ends: token ids that end an answer, and need no text.
    """
    if tokenizer is None or vocab_size <= len(tokenizer):
        return []
    # One object for all calls, so that rows of different calls are processed together.
    version = (len(tokenizer), vocab_size, frozenset(ends))
    known = _processors.get(tokenizer)
    if known is None or known[0] != version:
        ids = unknown_ids(tokenizer, vocab_size)
        if ends and len(ids):
            ids = ids[~torch.isin(ids, torch.tensor(sorted(ends), device="cpu"))]
        made = [KnownTokens(ids)] if len(ids) else []
        known = _processors[tokenizer] = (version, made)
    return [*known[1]]
