"""One row: what it is to answer, where its keys and values are, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor

from star_attention.errors import release_frames
from star_attention.generation import requests
from star_attention.generation.arguments import translate_generation_errors
from star_attention.generation.batching.answer import RowAnswer
from star_attention.generation.batching.leading import Keep, Lead, ReadAgain, numbers
from star_attention.generation.conversation import (
    Conversation,
    LeadingKeeper,
    reusable,
    said_tokens,
    sent,
)
from star_attention.generation.result import Delta
from star_attention.generation.settings import ResolvedSettings
from star_attention.generation.sources import SourceFinder
from star_attention.hf.cache.decode import AnswerCache
from star_attention.hf.cache.rows import RowKV
from star_attention.hf.execution import processing
from star_attention.hf.execution.drawing import Noise, RowDraw, Text
from star_attention.hf.execution.processing import Processing
from star_attention.hf.execution.request import Request
from star_attention.hf.execution.sources import attention_of
from star_attention.inputs import Prepared
from star_attention.runtime import Runtime
from star_attention.storage.context import EncodedContext
from star_attention.storage.kept import kept_row


@dataclass(kw_only=True, eq=False)
class RowTask:
    """One row, from its query to its last token.

    Attributes:
        lead: tells the other ranks.
        context: its context; None once it has ended.
        request: its query, on its context; None once it has ended.
        draw: how its tokens are drawn; None once it has ended.
        answer: its answer.
        max_new_tokens: most tokens of the answer.
        finder: finds its sources; None for none.
        keeper: keeps its answer for a next turn; None to keep none.
        kind: what it has in common with rows that share its forwards; None for a row alone.
        kv: its keys and values, between its first forward and its end.
        cache: the cache of a row alone, likewise.
        error: why it ended without an answer; None if it did not.
        reads_alone: True if its query has a forward without the rows under way, since a step could
            not read it.
    """

    lead: Lead
    context: EncodedContext | None
    request: Request | None
    draw: RowDraw | None
    answer: RowAnswer
    max_new_tokens: int
    finder: SourceFinder | None = None
    keeper: LeadingKeeper | None = None
    kind: Hashable | None = None
    kv: RowKV | None = None
    cache: AnswerCache | None = None
    error: Exception | None = None
    reads_alone: bool = False
    number: int = field(default_factory=lambda: next(numbers))
    """Age: the youngest row has the largest number."""

    @property
    def done(self) -> bool:
        return self.error is not None or self.answer.ended

    @property
    def query_tokens(self) -> int:
        """Tokens of the query, until the row has ended."""
        assert self.request is not None
        return len(self.request.queries[0])

    @property
    def unread_tokens(self) -> int:
        """Tokens of the query that no earlier turn has kept."""
        assert self.request is not None
        return self.query_tokens - self.request.kept_tokens

    def shares_query(self, other: RowTask) -> bool:
        """True if both answer one query of a call."""
        if self.request is None or other.request is None:
            return False
        return self.request.queries[0] is other.request.queries[0]

    @property
    def goes_on(self) -> bool:
        """True if another token follows, unless one that ends the answer comes before."""
        return len(self.answer.text.token_ids) + 1 < self.max_new_tokens

    def begin_text(self) -> None:
        """Give the text before the answer to processors and criteria, if any read it."""
        assert self.request is not None and self.draw is not None
        if self.draw.reads_text:
            self.draw.text = Text(self.request.text(), self.max_new_tokens)

    def push(self, token: int, logits_1V: Tensor, *, ended: bool) -> Delta | None:
        """Add a token; at the end of the answer, find its sources and release what it held."""
        delta = self.answer.push(token, logits_1V, ended=ended)
        if self.answer.ended:
            if self.finder is not None:
                self._find_sources(self.finder)
            self._end()
        return delta

    def end(self, reason: str) -> None:
        """End the answer here, and release what it held."""
        self.answer.end(reason)
        self._end()

    def _end(self) -> None:
        if self.keeper is not None and self.request is not None:
            try:
                self.answer.conversation = self._conversation(self.keeper, self.request.queries[0])
            except Exception as error:
                if self.lead.has_failed:
                    raise
                # Whatever it is, it is this row's: the others go on.
                self.fail(error)
        self.release()

    def _conversation(self, keeper: LeadingKeeper, prompt: list[int]) -> Conversation:
        text, kv = self.answer.text, self.kv
        if kv is None or not text.token_ids or self.answer.looked is not None:
            return keeper.after(0, prompt, text, prompt, None)
        # The last token may not have been through the model.
        ids = prompt + text.token_ids[: kv.tail_tokens - len(prompt)]
        layers = kept_row(kv.tails, 0, 0, len(ids), copies=True)
        conversation = keeper.after(0, prompt, text, ids, layers)
        key = sent(conversation).key
        with self.lead.command(lambda: Keep(row=self.number, tokens=len(ids), key=key)):
            return conversation

    def go_on_from(self, talk: Conversation) -> None:
        """Take over what a conversation keeps of the turns before the query."""
        request = self.request
        assert request is not None and self.kv is None, "it has not begun"
        prompt = request.queries[0]
        if not request.second_look:
            kept, kept_tokens = reusable(talk, prompt)
            self.request = replace(request, kept=kept, kept_tokens=kept_tokens)
        if self.finder is not None:
            self.finder = replace(self.finder, earlier_tokens=said_tokens(talk, prompt))

    def _find_sources(self, finder: SourceFinder) -> None:
        started = time.perf_counter()
        request = self.request
        assert request is not None
        try:
            readings = finder.readings([(request.queries[0], self.answer.text.token_ids)])
            with self.lead.command(lambda: ReadAgain(row=self.number, readings=readings)):
                attention = attention_of(request, readings)
            (self.answer.sources,) = finder.sources(attention)
        except Exception as error:
            if self.lead.has_failed:
                raise
            # As above.
            self.fail(error)
        self.answer.sources_s = time.perf_counter() - started

    def fail(self, error: Exception) -> None:
        """End the row without an answer."""
        release_frames(error)
        self.error = error
        self.release()

    def release(self) -> None:
        """Drop the context, keys and values, and what draws tokens."""
        if self.kv is not None:
            self.lead.drop(self.number)
        self.context = None
        self.request = self.draw = self.kv = self.cache = self.finder = self.keeper = None


def tasks_of(
    runtime: Runtime,
    context: EncodedContext,
    prepared: Prepared,
    lead: Lead,
    *,
    with_sources: bool = True,
) -> Iterator[RowTask]:
    """Make the rows of one call: those of a query next to each other.

    Args:
        runtime: the engine's.
        context: the context to ask.
        prepared: checked queries on it, with their settings.
        lead: the batch's.
        with_sources: find the sources of each row, where they are wanted.

    Raises:
        InvalidInputError: settings that transformers refuses.
        ContextLengthError: there are too few positions.
    """
    settings = prepared.settings
    assert settings is not None, "rank 0 prepares"
    runtime.positions.check_room(
        len(context), context.rope_length, prepared.prompts, settings.max_new_tokens
    )
    several, settings = settings.answers_per_query, settings.for_one_answer()
    device, seed = runtime.handle.device, settings.arguments.seed
    finder = requests.source_finder(runtime, context, settings) if with_sources else None
    made: Processing | None = None
    for prompt in prepared.prompts:
        noise = Noise(seed, several, device)
        for number in range(several):
            request = requests.for_answers(runtime, context, [prompt], settings)
            if made is None or made.remembers:
                with translate_generation_errors():
                    made = processing.of(request)
            draw = RowDraw(
                processors=made.processors,
                criteria=made.criteria,
                noise=noise if made.samples else None,
                number=number,
            )
            yield RowTask(
                lead=lead,
                context=context,
                request=request,
                draw=draw,
                answer=_answer(runtime, context, prompt, settings),
                max_new_tokens=settings.max_new_tokens,
                finder=finder,
            )


def _answer(
    runtime: Runtime, context: EncodedContext, prompt: list[int], settings: ResolvedSettings
) -> RowAnswer:
    reading = settings.text.reading(runtime.tokenizer)
    (text,) = settings.text.answers(reading, [prompt])
    return RowAnswer(
        text,
        settings,
        tokenizer=runtime.tokenizer,
        query_tokens=len(prompt),
        encode_s=context.encode_s,
        vocab_size=runtime.handle.vocab_size,
    )
