"""A question-answering pipeline with kvpress' interface: context, questions, answer_prefix."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from star_attention.config import MAX_NEW_TOKENS
from star_attention.engine import StarLLM
from star_attention.errors import InvalidInputError, TokenError


class StarPipeline:
    """A callable that answers questions on a context; made by `pipeline`.

    Attributes:
        star: the engine that encodes and answers.
    """

    def __init__(self, star: StarLLM) -> None:
        self.star = star

    def __call__(
        self,
        context: str,
        question: str | None = None,
        questions: Sequence[str] | None = None,
        *,
        answer_prefix: str = "",
        max_new_tokens: int | None = None,
        chat: bool | None = None,
        **generation_kwargs: Any,
    ) -> dict[str, Any]:
        """Answer one question or several on one context, which is encoded once.

        Args:
            context: the text to read.
            question: one question; give either this or `questions`.
            questions: several questions, answered independently.
            answer_prefix: text that every answer begins with; not part of the result.
            max_new_tokens: most tokens of an answer; None takes `generate`'s default (256), and
                warns where an answer needed more.
            chat: True puts context and question into one user message of the model's chat template;
                False appends the question to the context as it is; None chooses True if the model
                has a template.
            generation_kwargs: further arguments of `StarLLM.generate`.

        Returns:
            `{"answer": text, "finish_reason": reason}` for `question`, and `{"answers": [text,
            ...], "finish_reasons": [reason, ...]}` for `questions`: why each answer ended, "stop"
            or "length" (`max_new_tokens`). With num_return_sequences above 1 each question has a
            list of them.

        Raises:
            InvalidInputError: neither or both of `question` and `questions`, or an invalid setting.
            TokenError: an empty question or context.
            ContextLengthError: context, question and answer exceed the model's positions.
        """
        if not isinstance(context, str):
            raise InvalidInputError(
                f"context: expected a str, got {type(context).__name__}; call the pipeline once for"
                " each text, and use StarLLM for chat messages and token ids"
            )
        if (question is None) == (questions is None):
            raise InvalidInputError("give either question (a str) or questions (a list of str)")
        if isinstance(questions, str):
            raise InvalidInputError(
                "questions: expected a list of str, got str; give one question as question="
            )
        queries: list[Any] = list(questions) if questions is not None else [question]
        if not queries or not all(isinstance(query, str) and query for query in queries):
            raise TokenError("a question is empty or not a str; give at least one word")
        if chat is None:
            chat = bool(getattr(self.star.tokenizer, "chat_template", None))
        settings: dict[str, Any] = dict(
            answer_prefix=answer_prefix,
            max_new_tokens=MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens,
            **generation_kwargs,
        )
        content = [{"role": "user", "content": context}] if chat else context
        prepared = self.star.prepare(content, queries, **settings)
        replies = self.star.generate(self.star.encode(prepared), prepared)
        texts, reasons = _each(replies, "text"), _each(replies, "finish_reason")
        if max_new_tokens is None and "length" in str(reasons):
            warnings.warn(
                f"an answer ended at the default of {MAX_NEW_TOKENS} tokens; give max_new_tokens",
                stacklevel=2,
            )
        if questions is not None:
            return {"answers": texts, "finish_reasons": reasons}
        return {"answer": texts[0], "finish_reason": reasons[0]}


def _each(replies: list[Any], name: str) -> list[Any]:
    """Return an attribute of each answer; a list for a question with several answers."""
    return [
        _each(reply, name) if isinstance(reply, list) else getattr(reply, name) for reply in replies
    ]


def pipeline(
    model: str | os.PathLike[str] | nn.Module | StarLLM, tokenizer: Any = None, **settings: Any
) -> StarPipeline:
    """Return a question-answering pipeline for a model.

        pipe = star_attention.pipeline("models/needle-17m", block_size=4096)
        pipe(text, questions=["What is ...?", "Where is ...?"])["answers"]

    Args:
        model: a model folder, a hub id, a loaded model, or a `StarLLM`.
        tokenizer: the tokenizer of a loaded model; for a path, replaces the model's own.
        settings: keywords of `StarLLM.from_pretrained` (for a path) or of `StarLLM` (for a model):
            block_size, anchor_size, method, ...

    Raises:
        InvalidInputError: settings or a tokenizer together with a `StarLLM`.
        StarAttentionError: whatever `StarLLM` or `StarLLM.from_pretrained` raises.
    """
    if isinstance(model, StarLLM):
        if settings or tokenizer is not None:
            raise InvalidInputError(
                "a StarLLM has a tokenizer and settings of its own; give no others, or pass the"
                " model instead"
            )
        return StarPipeline(model)
    if isinstance(model, nn.Module):
        return StarPipeline(StarLLM(model, tokenizer, **settings))
    star = StarLLM.from_pretrained(model, **settings)
    if tokenizer is not None:
        star.tokenizer = tokenizer
    return StarPipeline(star)
