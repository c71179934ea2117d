"""Requests of lm-evaluation-harness, as contexts and the questions on them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from star_attention.engine import StarLLM
from star_attention.errors import ContextLengthError, InvalidInputError, TokenError, quote
from star_attention.evals.splitting import LAST_BLOCK, Split, split
from star_attention.hf.text.joining import ContextEnd, following_ids, warn_about_cut
from star_attention.hf.text.reading import Reader
from star_attention.hf.text.rendered import RenderedText
from star_attention.hf.text.tokens import context_ids

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

# The harness shows only logs below this name.
_logger = logging.getLogger("lm_eval.star_attention")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One request on an encoded context.

    Attributes:
        index: Place of the request in the harness's list.
        query: Token ids of the query.
        continuation: Token ids to score.
        answer_tokens: Tokens to leave room for after both.
    """

    index: int
    query: list[int]
    continuation: list[int]
    answer_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens after the context."""
        return len(self.query) + len(self.continuation) + self.answer_tokens


@dataclass(frozen=True, kw_only=True)
class Job:
    """The token ids of one context, and all questions on it."""

    context: list[int]
    questions: list[Question]

    @property
    def longest(self) -> Question:
        """The question that needs the most tokens."""
        return max(self.questions, key=lambda question: question.tokens)


class JobBuilder:
    """Splits prompts, tokenizes them and groups them by context.

    Args:
        star: The engine that answers.
        context_column: The column that holds a document's context.
        sentinel: Text of a prompt in whose place the query begins.
    """

    def __init__(self, star: StarLLM, *, context_column: str, sentinel: str) -> None:
        self.splits: dict[str, list[str]] = {}
        """How the prompts of each task were split."""
        self._star = star
        self._context_column, self._sentinel = context_column, sentinel
        # Requests on one context follow one another, with and without a continuation.
        self._context_ids = functools.lru_cache(maxsize=2)(
            functools.partial(context_ids, star.tokenizer)
        )
        # The harness's own tokens in a prompt are meant as they are.
        self._reader = Reader(star.tokenizer, allow_special_tokens=True)
        self._cut_context = functools.lru_cache(maxsize=2)(self._reader.raw_context)

    def build(
        self, requests: list[Instance], *, answer_tokens: Sequence[int], scored: bool = False
    ) -> list[Job]:
        """Group requests by context; the same on all ranks.

        Args:
            requests: The harness's.
            answer_tokens: Tokens to leave room for, for each request.
            scored: True if the second argument of a request is a continuation to score.
        """
        questions: dict[tuple[int, ...], list[Question]] = {}
        for index, request in enumerate(requests):
            prompt, second = arguments(request)
            context, query, continuation = self._ids(request, prompt, second if scored else None)
            question = Question(
                index=index,
                query=query,
                continuation=continuation,
                answer_tokens=answer_tokens[index],
            )
            self._check_positions(request, len(context) + question.tokens)
            questions.setdefault(tuple(context), []).append(question)
        jobs = [
            Job(context=list(context), questions=on_context)
            for context, on_context in questions.items()
        ]
        return self._star.from_rank_0(jobs)

    def _ids(
        self, request: Instance, prompt: str, continuation: str | None
    ) -> tuple[list[int], list[int], list[int]]:
        """Return the token ids of context, query and continuation.

        As everywhere in the harness, spaces at the end of a prompt belong to the continuation.
        """
        task = request.task_name or ""
        parts = split(
            prompt,
            request.doc,
            task,
            context_column=self._context_column,
            sentinel=self._sentinel,
        )
        self._report_split(task, parts)
        if parts.query:
            context, end = self._cut_context(RenderedText(parts.context))
            query, continued = _continued(
                lambda text: self._following_ids(end, text), parts.query, continuation
            )
        else:
            query = []
            context, continued = _continued(self._context_ids, parts.context, continuation)
        if continuation is not None and not continued:
            raise TokenError(
                f"{name_of(request)} has an empty continuation, {quote(continuation)}; give"
                " it at least"
                " 1 token"
            )
        kept = max(0, len(context) - self._tokens_to_move(parts, len(context), len(query)))
        context, query = context[:kept], context[kept:] + query
        if not context or not query:
            raise TokenError(
                f"{name_of(request)} has a prompt of {len(context) + len(query)} tokens, and Star"
                " Attention needs 1 of context and 1 of query; leave out metrics that score answers"
                " without a prompt, such as acc_mutual_info"
            )
        return context, query, continued

    def _following_ids(self, end: ContextEnd | None, text: str) -> list[int]:
        return following_ids(self._star.tokenizer, end, RenderedText(text))[0]

    def _tokens_to_move(self, parts: Split, context_tokens: int, query_tokens: int) -> int:
        """Count the tokens at the end of the context that become the beginning of the query."""
        if parts.how == LAST_BLOCK and context_tokens:
            block_size = self._star.runtime.plan_for(context_tokens).block_size
            return block_size if block_size < context_tokens else 1
        # The first token of an answer is predicted by the last one of a query.
        return 0 if query_tokens else 1

    def _report_split(self, task: str, parts: Split) -> None:
        """Log once for each task how its prompts are split."""
        splits = self.splits.setdefault(task, [])
        if parts.how in splits:
            return
        splits.append(parts.how)
        if self._star.rank > 0:
            return
        if parts.how != LAST_BLOCK:
            _logger.info("%s: prompts are split into context and query by %s", task, parts.how)
            _, end = self._cut_context(RenderedText(parts.context))
            query = RenderedText(parts.query)
            if not following_ids(self._star.tokenizer, end, query)[1]:
                warn_about_cut(end, query, "query", set())
            return
        _logger.warning(
            "%s: the beginning of the query is unknown, so the last block of each prompt is the"
            " query; to mark it, give documents a column %r, or write %s into doc_to_text",
            task,
            self._context_column,
            self._sentinel or "a sentinel",
        )

    def _check_positions(self, request: Instance, tokens: int) -> None:
        limit = self._star.runtime.handle.max_positions
        if limit is not None and tokens > limit:
            raise ContextLengthError(
                f"{name_of(request)} needs {tokens:,} tokens including its answer, more than the"
                f" model's {limit:,} positions; leave it out (--samples), use shorter documents, or"
                " lower max_gen_toks"
            )


def _continued(
    ids_of: Callable[[str], list[int]], text: str, continuation: str | None
) -> tuple[list[int], list[int]]:
    """Return the token ids of a text and of its continuation, tokenized together."""
    if continuation is None:
        return ids_of(text), []
    stripped = text.rstrip()
    ids = ids_of(stripped) if stripped else []
    return ids, ids_of(text + continuation)[len(ids) :]


def arguments(request: Instance) -> tuple[Any, Any]:
    """Return prompt and second argument; raises `InvalidInputError` for images and sound."""
    if len(request.args) != 2:
        raise InvalidInputError(
            f"{name_of(request)} contains more than text, which cannot be encoded; leave the task"
            " out"
        )
    prompt, second = request.args
    return prompt, second


def name_of(request: Instance) -> str:
    return f"document {request.doc_id} of task {request.task_name}"
