"""Log probabilities of the tokens of an answer.

Axes: R rows, V vocabulary, N alternatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_attention.generation.result import TokenLogprob
from star_attention.hf.text.tokens import decode


class LogprobRecorder:
    """Records the log probabilities of every step; they stay on the device until the end.

    Args:
        tokenizer: a transformers tokenizer; None leaves the tokens' texts empty.
        alternatives: number of most likely tokens to record for each step.
    """

    def __init__(self, tokenizer: Any, alternatives: int) -> None:
        self._tokenizer, self._alternatives = tokenizer, alternatives
        self._top_ids: list[Tensor] = []
        self._top: list[Tensor] = []
        self._chosen: list[Tensor] = []

    def push(self, logits_RV: Tensor, tokens: list[int]) -> None:
        """Record a step: the unprocessed logits, and the token of each row."""
        logprobs_RV = torch.log_softmax(logits_RV, -1)
        top_RN, ids_RN = logprobs_RV.topk(self._alternatives, -1)
        # `tokens` are on the host already, so the device need not be waited for.
        columns = [logprobs_RV[row, token] for row, token in enumerate(tokens)]
        self._chosen.append(torch.stack(columns))
        self._top.append(top_RN)
        self._top_ids.append(ids_RN)

    def of_row(self, row: int, tokens: list[int]) -> list[TokenLogprob]:
        """Return what was recorded for a row's tokens."""
        steps = len(tokens)
        if not steps:
            return []
        chosen, top, top_ids = (
            torch.stack(recorded[:steps])[:, row].tolist()
            for recorded in (self._chosen, self._top, self._top_ids)
        )
        return [
            TokenLogprob(
                token=self._text(token),
                id=token,
                logprob=logprob,
                top=[
                    TokenLogprob(token=self._text(other), id=other, logprob=value)
                    for other, value in zip(other_ids, others, strict=True)
                ],
            )
            for token, logprob, others, other_ids in zip(tokens, chosen, top, top_ids, strict=True)
        ]

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            return ""
        return decode(self._tokenizer, [token], skip_special_tokens=False)
