"""A sample as the engine takes it: content to encode, query and answer prefix, and their tokens."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.evals.samples.sample import Sample
from star_attention.hf.text import chat as chat_text
from star_attention.hf.text.joining import ContextEnd, following_ids
from star_attention.hf.text.reading import Reader
from star_attention.hf.text.template import ChatTemplate
from star_attention.hf.text.tokens import context_ids, query_ids


def content_of(sample: Sample, *, chat: bool) -> Any:
    """Return the content to encode; a chat's user message stays open for the query."""
    return chat_text.user_message(sample.context) if chat else sample.context


def query_kwargs(sample: Sample) -> dict[str, Any]:
    """Return the sample's part of the arguments of `StarLLM.generate`.

    The engine requires a query; without one, the answer prefix is the query.
    """
    if not sample.query:
        return {"query": sample.answer_prefix}
    return {"query": sample.query, "answer_prefix": sample.answer_prefix}


def check_template(tokenizer: Any) -> None:
    """Refuse with `InvalidInputError` if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInputError("this model has no chat template; leave out --chat")


def chat_tokens(tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> int:
    """Count the tokens that the chat template adds to context and query, for `Size.reserve`.

    Args:
        tokenizer: The model's.
        template_kwargs: What the template reads beside messages.

    Raises:
        InvalidInputError: If the tokenizer has no chat template.
    """
    check_template(tokenizer)
    context, query = "A context.\n", "A question?"
    plain = len(context_ids(tokenizer, context)) + len(query_ids(tokenizer, query))
    opened = chat_text.open_context(
        tokenizer, chat_text.user_message(context), dict(template_kwargs or {})
    )
    tail = chat_text.continue_context(tokenizer, opened, query).text
    rendered = len(query_ids(tokenizer, opened.head)) + len(query_ids(tokenizer, tail))
    # Where text meets the template, each side may take one more token.
    return max(0, rendered - plain) + 2


class TemplateMarks:
    """The marks that a chat template writes around a message, to find texts that have them.

    Data sets with whole prompts often hold the output of a model's template.
    """

    def __init__(self, tokenizer: Any) -> None:
        head, _, tail = _rendered(tokenizer).partition(_MESSAGE)
        tokens = [token for token in _special_tokens(tokenizer) if token in head + tail]
        self._tokens = tuple(tokens)
        # Templates without special tokens write words, which a text may have by chance, but hardly
        # on both sides.
        self._words = (head.strip(), tail.strip())

    def mark_of(self, sample: Sample) -> str:
        """Return the mark that a sample's context begins with, or its query; "" if there is none.

        Marks at the end of the query count too.
        """
        context, query = sample.context.lstrip(), sample.query.strip()
        for token in self._tokens:
            if context.startswith(token) or query.startswith(token) or query.endswith(token):
                return token
        head, tail = self._words
        return head if head and tail and context.startswith(head) and query.endswith(tail) else ""

    def check(self, sample: Sample) -> None:
        """Refuse a sample whose text has been through the template, with `InvalidInputError`."""
        mark = self.mark_of(sample)
        if mark:
            raise InvalidInputError(
                f"sample {sample.id} has been through a chat template ({quote(mark)}), and --chat"
                " would apply it again; leave --chat out"
            )


_MESSAGE = "\u2063message\u2063"


def _rendered(tokenizer: Any) -> str:
    """Return a user message in the template, with the start of an answer; "" if that fails."""
    # Whether the template can be used is found elsewhere.
    with contextlib.suppress(InvalidInputError):
        text = ChatTemplate(tokenizer).render(chat_text.user_message(_MESSAGE))
        if _MESSAGE in text:
            return text
    return ""


def _special_tokens(tokenizer: Any) -> list[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return [str(token) for token in added if str(token).strip()]


class PromptCounter:
    """Counts the tokens of samples; those on one context in a row tokenize it once."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat: bool,
        template_kwargs: Mapping[str, Any] | None = None,
        allow_special_tokens: bool | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._reader = Reader(tokenizer, allow_special_tokens)
        self._chat = chat
        self._template_kwargs = dict(template_kwargs or {})
        self._context: str | None = None
        self._context_tokens = 0
        self._end: ContextEnd | None = None
        self._opened: chat_text.ChatContext | None = None

    def count(self, sample: Sample) -> tuple[int, int]:
        """Return the tokens of the context, and of query and answer prefix, as the engine does.

        What is held back of the context counts with the query.
        """
        # The engine repeats its warnings when it reads the sample.
        with warnings.catch_warnings(action="ignore"):
            return self._count(sample)

    def _count(self, sample: Sample) -> tuple[int, int]:
        if sample.context != self._context:
            self._context = sample.context
            self._read_context(sample)
        query = self._reader.raw(sample.query, "query")
        if self._opened is not None:
            tail = chat_text.continue_context(self._tokenizer, self._opened, sample.query)
            query = self._reader.rendered(tail)
        query += self._reader.raw(sample.answer_prefix, "answer prefix")
        ids, _ = following_ids(self._tokenizer, self._end, query)
        return self._context_tokens, len(ids)

    def _read_context(self, sample: Sample) -> None:
        if self._chat:
            content = content_of(sample, chat=True)
            self._opened = chat_text.open_context(self._tokenizer, content, self._template_kwargs)
            ids, self._end = self._reader.chat_context(self._opened.rendered)
        else:
            ids, self._end = self._reader.raw_context(self._reader.raw(sample.context, "context"))
        self._context_tokens = len(ids)
