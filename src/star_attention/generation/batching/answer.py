"""What one row has answered so far, and the `Generation` that becomes of it."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from star_attention.generation.conversation import Conversation
from star_attention.generation.logprobs import LogprobRecorder
from star_attention.generation.result import Delta, Generation, Source, Timings, called
from star_attention.generation.run import delta_of
from star_attention.generation.settings import ResolvedSettings
from star_attention.hf.execution.timing import Lap
from star_attention.hf.text.answer import AnswerText

CANCELED = "canceled"
"""Why an answer ended that was canceled."""


class RowAnswer:
    """Collects the tokens of one row.

    Args:
        text: the answer's text, empty so far.
        settings: the settings of the answer.
        tokenizer: the model's, or None.
        query_tokens: tokens of the query.
        encode_s: seconds that the context took.
        vocab_size: token ids of the model.
    """

    def __init__(
        self,
        text: AnswerText,
        settings: ResolvedSettings,
        *,
        tokenizer: Any,
        query_tokens: int,
        encode_s: float,
        vocab_size: int,
    ) -> None:
        self.text, self.settings = text, settings
        self._query_tokens, self._encode_s, self._vocab_size = query_tokens, encode_s, vocab_size
        self._logits: list[Tensor] | None = [] if settings.arguments.return_logits else None
        alternatives = settings.arguments.logprobs
        self._logprobs = None if alternatives is None else LogprobRecorder(tokenizer, alternatives)
        self._started = time.perf_counter()
        self._first_s = self._end_s = 0.0
        self.looked: Lap | None = None
        """The time of the second look, if there was one."""
        self.sources: tuple[Source, ...] | None = None
        """The sources, once they are found."""
        self.sources_s: float | None = None
        self.kept_tokens = 0
        """Tokens of the query that earlier turns of a conversation kept."""
        self.conversation: Conversation | None = None
        """What a next turn continues, once the answer has ended; None to keep none."""

    @property
    def ended(self) -> bool:
        return self.text.finish_reason is not None

    def push(self, token: int, logits_1V: Tensor, *, ended: bool) -> Delta | None:
        """Add a token, and return what it adds to the text.

        Args:
            token: the token.
            logits_1V: the logits that it was drawn from.
            ended: True if a criterion ends the answer with it.
        """
        self._first_s = self._first_s or self._elapsed()
        if self._logprobs is not None:
            self._logprobs.push(logits_1V, [token])
        if self._logits is not None:
            self._logits.append(logits_1V[0].cpu())
        text = self.text.push(token)
        if not self.ended:
            if len(self.text.token_ids) >= self.settings.max_new_tokens:
                text += self.text.end("length")
            elif ended:
                text += self.text.end("stop")
        if self.ended:
            self._end_s = self._elapsed()
        return delta_of(self.text, text)

    def end(self, reason: str) -> Delta | None:
        """End the answer early, and return the text held back."""
        self._end_s = self._elapsed()
        return delta_of(self.text, self.text.end(reason))

    def _elapsed(self) -> float:
        return time.perf_counter() - self._started

    def generation(self) -> Generation:
        """Return the answer, which has ended."""
        answer = self.text
        assert answer.finish_reason is not None, "the row has not ended"
        later_tokens, later_s = len(answer.token_ids) - 1, self._end_s - self._first_s
        recorded = self._logprobs
        return Generation(
            text=answer.text,
            reasoning=answer.reasoning,
            reasoning_tokens=answer.reasoning_tokens,
            token_ids=answer.token_ids,
            finish_reason=answer.finish_reason,
            stop_string=answer.stop_string,
            **called(self.settings, answer),
            query_tokens=self._query_tokens,
            kept_tokens=self.kept_tokens,
            conversation=self.conversation,
            timings=Timings(
                encode_s=self._encode_s,
                ttft_s=self._first_s,
                tokens_per_s=later_tokens / later_s if later_tokens > 0 and later_s > 0 else None,
                second_look_s=None if self.looked is None else self.looked.seconds,
                sources_s=self.sources_s,
            ),
            logprobs=None if recorded is None else recorded.of_row(0, answer.token_ids),
            sources=self.sources,
            logits=None if self._logits is None else self._stacked(self._logits),
        )

    def _stacked(self, rows: list[Tensor]) -> Tensor:
        return torch.stack(rows) if rows else torch.empty(0, self._vocab_size, device="cpu")
