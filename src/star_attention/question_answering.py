"""A question-answering pipeline in the words that kvpress made familiar: context, question or questions, answer_prefix."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from star_attention.engine import StarLLM
from star_attention.errors import InvalidInputError, TokenError


class StarPipeline:
    """Called with a context and questions; see `pipeline`."""

    def __init__(self, star: StarLLM) -> None:
        self.star = star

    def __call__(
        self,
        context: str,
        question: str | None = None,
        questions: Sequence[str] | None = None,
        *,
        answer_prefix: str = "",
        max_new_tokens: int = 50,
        chat: bool | None = None,
        **generation: Any,
    ) -> dict[str, Any]:
        """`{"answer": text}` for a question, `{"answers": [text, ...]}` for questions, all on one encoding of the context.

        chat: put context and question into one user message of the model's chat template; None does so where the model has
            a template. Without one the question follows the context as it is.
        generation: the words of `StarLLM.generate`.
        """
        if (question is None) == (questions is None):
            raise InvalidInputError(
                "give either question (one text) or questions (a list of texts)"
            )
        if isinstance(questions, str):
            raise InvalidInputError(
                "questions is one text; give a list of texts, or give it as question"
            )
        queries: list[Any] = list(questions) if questions is not None else [question]
        if not queries or not all(isinstance(query, str) and query for query in queries):
            raise TokenError("a question is empty or not a str; give at least one word")
        if chat is None:
            chat = bool(getattr(self.star.tokenizer, "chat_template", None))
        settings: dict[str, Any] = dict(
            answer_prefix=answer_prefix, max_new_tokens=max_new_tokens, **generation
        )
        content = [{"role": "user", "content": context}] if chat else context
        prepared = self.star.prepare(content, queries, **settings)
        replies = self.star.generate(self.star.encode(prepared), prepared)
        texts = [reply.text for reply in replies]
        return {"answers": texts} if questions is not None else {"answer": texts[0]}


def pipeline(
    model: str | os.PathLike[str] | nn.Module | StarLLM, tokenizer: Any = None, **settings: Any
) -> StarPipeline:
    """A pipeline around a model folder, a hub id, a loaded model (with its tokenizer), or a `StarLLM`.

    settings: those of `StarLLM.from_pretrained` (for a path) or of `StarLLM` (block_size, anchor_size, method, ...).

        pipe = star_attention.pipeline("models/needle-17m", block_size=4096)
        pipe(text, questions=["What is ...?", "Where is ...?"])["answers"]
    """
    if isinstance(model, StarLLM):
        if settings or tokenizer is not None:
            raise InvalidInputError(
                "a StarLLM brings its own tokenizer and settings; give no others"
            )
        return StarPipeline(model)
    if isinstance(model, nn.Module):
        return StarPipeline(StarLLM(model, tokenizer, **settings))
    star = StarLLM.from_pretrained(model, **settings)
    if tokenizer is not None:
        star.tokenizer = tokenizer
    return StarPipeline(star)
