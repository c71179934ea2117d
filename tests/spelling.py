"""Answers that spell given texts with any model: for tests of endings and streams."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from star_attention import EncodedContext
from tests.engines import bundled_tokenizer

CONTEXT = "Stars come out one after another.\nThe secret number for petal-signature is 5335582.\n"
QUERY = "<|q|>What is the secret number for petal-signature?<|a|>"


class _Spell(LogitsProcessor):
    """Force the rows of a batch to given ids, one answer each, then to `then` forever."""

    def __init__(self, prompt_tokens: int, answers: list[list[int]], then: int) -> None:
        self.prompt_tokens, self.answers, self.then = prompt_tokens, answers, then

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_tokens
        forced = torch.full_like(scores, -1e4)
        rows = input_ids.shape[0] // len(self.answers)
        for row in range(input_ids.shape[0]):
            answer = self.answers[row // rows]
            forced[row, answer[step] if step < len(answer) else self.then] = 0.0
        return forced


def ids_of(text: str) -> list[int]:
    """The token ids of a text, without special tokens."""
    return bundled_tokenizer()(text, add_special_tokens=False).input_ids


def spell(context: EncodedContext, *texts: str, then: str = ".") -> dict[str, Any]:
    """Arguments of `generate` that make the answers to QUERY spell `texts`, then `then` forever."""
    prompt_tokens = len(context) + len(ids_of(QUERY))
    [last] = ids_of(then) if then != "<eos>" else [bundled_tokenizer().eos_token_id]
    processor = _Spell(prompt_tokens, [ids_of(text) for text in texts], last)
    return dict(logits_processor=LogitsProcessorList([processor]))
