"""Answers of tokens that have a text: models may have rows for more tokens than their tokenizer."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

_unknown: weakref.WeakKeyDictionary[Any, tuple[tuple[int, int], Tensor]] = (
    weakref.WeakKeyDictionary()
)


class KnownTokens(LogitsProcessor):
    """Forbids token ids that the tokenizer does not know, which would be answers without a text.

    Args:
        unknown_ids: the token ids, int64.
    """

    def __init__(self, unknown_ids: Tensor) -> None:
        self._unknown_ids = unknown_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._unknown_ids = self._unknown_ids.to(scores.device)
        return scores.index_fill(1, self._unknown_ids, -torch.inf)


def known_tokens(tokenizer: Any, vocab_size: int, ends: set[int]) -> list[LogitsProcessor]:
    """Return the processors that an answer needs: none where the tokenizer knows all ids.

    Args:
        tokenizer: a transformers tokenizer; None for answers of token ids.
        vocab_size: token ids of the model.
        ends: token ids that end an answer, and need no text.
    """
    if tokenizer is None or vocab_size <= len(tokenizer):
        return []
    version = (len(tokenizer), vocab_size)
    cached = _unknown.get(tokenizer)
    if cached is None or cached[0] != version:
        unknown = sorted(set(range(vocab_size)) - set(tokenizer.get_vocab().values()))
        cached = _unknown[tokenizer] = (version, torch.tensor(unknown, dtype=torch.int64))
    ids = cached[1]
    if ends:
        ids = ids[~torch.isin(ids, torch.tensor(sorted(ends)))]
    return [KnownTokens(ids)] if len(ids) else []
