"""Queries answered on one context, as text (streamed) or as JSON lines."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from star_attention.cli.options import AnswerOptions
from star_attention.cli.progress import Notes, answer_summary, context_summary, seconds

if TYPE_CHECKING:
    from star_attention.engine import StarLLM
    from star_attention.generation.result import Generation
    from star_attention.storage.context import EncodedContext

_HEADER_WIDTH = 100

FIELDS = {
    "query": "what was asked",
    "text": "the answer, without special tokens, cut before a stop text",
    "token_ids": "every generated token, with the one that ended the answer",
    "finish_reason": "`stop` or `length`",
    "method": "attention method",
    "context_tokens": "length of the encoded text",
    "query_tokens": "length of the query, with what the chat template adds",
    "block_size": "tokens of a block",
    "anchor_size": "tokens of the anchor",
    "blocks": "number of blocks",
    "ranks": "number of hosts that share the text: processes, or groups of `tensor_parallel` processes",
    "tensor_parallel": "processes of a host, which share its heads and weights",
    "encode_s": "seconds of encoding (of a saved text: when it was encoded)",
    "ttft_s": "seconds from the query to the first token (with beams: to the whole answer)",
    "tokens_per_s": "tokens a second after the first; null for one token, and for beams",
    "peak_bytes": "peak device memory while answering; null where it is not measured (CPU)",
    "wire_bytes_phase1": "bytes that the hosts exchanged while encoding, all together; 0 on one",
    "wire_bytes_phase2": "bytes that the hosts exchanged while answering, all together; 0 on one",
    "wire_calls_phase1": "collectives while encoding",
    "wire_calls_phase2": "collectives while answering",
    "wire_within_bytes_phase1": "bytes that the processes within hosts exchanged while encoding (tensor parallelism)",
    "wire_within_bytes_phase2": "the same while answering",
    "per_rank": "for each host: tokens kept, seconds of encoding, peak device memory while encoding",
}
"""The fields of `--json`, in order."""


class Answerer:
    """Answers queries on `context` and prints them.

    words: those of the options; encoded: whether the context was encoded just now.
    """

    def __init__(
        self,
        star: StarLLM,
        context: EncodedContext,
        options: AnswerOptions,
        words: dict[str, Any],
        notes: Notes,
        *,
        encoded: bool,
    ) -> None:
        self.star, self.context, self.options, self.words, self.notes = (
            star,
            context,
            options,
            words,
            notes,
        )
        self.head = context_summary(context) + (
            f", encode {seconds(context.encode_s)}" if encoded else ""
        )

    def answer_all(self, queries: list[str]) -> None:
        """One after another, or as one batch; with a header each where there are several."""
        if self.options.batch and len(queries) > 1:
            replies = self.star.generate(
                self.context, [self._query(query) for query in queries], **self.words
            )
            for number, (query, reply) in enumerate(zip(queries, replies, strict=True)):
                self._header(query, first=not number)
                self._print(query, reply)
            self._summary(replies[0], f"{len(queries)} answers at once, ")
            return
        for number, query in enumerate(queries):
            if len(queries) > 1:
                self._header(query, first=not number)
            self.answer(query)

    def answer(self, query: str) -> None:
        if self.options.json or self.options.no_stream or (self.options.num_beams or 1) > 1:
            reply = self.star.generate(self.context, self._query(query), **self.words)
            self._print(query, reply)
        else:
            reply = self._stream(query)
        self._summary(reply)

    def _query(self, query: str) -> Any:
        """A chat goes on with a user message."""
        return query if self.context.chat is None else [{"role": "user", "content": query}]

    def _stream(self, query: str) -> Generation:
        with self.star.stream(self.context, self._query(query), **self.words) as stream:
            for piece in stream:
                print(piece, end="", flush=True)
        print(flush=True)
        return stream.result

    def _header(self, query: str, *, first: bool) -> None:
        if self.options.json:
            return
        if not first:
            print()
        line = " ".join(query.split())
        print(
            "> " + (line if len(line) <= _HEADER_WIDTH else line[: _HEADER_WIDTH - 3] + "..."),
            flush=True,
        )

    def _print(self, query: str, reply: Generation) -> None:
        print(
            json.dumps({"query": query} | as_json(self.context, reply))
            if self.options.json
            else reply.text,
            flush=True,
        )

    def _summary(self, reply: Generation, note: str = "") -> None:
        head, self.head = self.head, ""
        self.notes.say((head + ", " if head else "") + note + answer_summary(reply))


def as_json(context: EncodedContext, reply: Generation) -> dict[str, Any]:
    """One line of `--json`, without the query."""
    values = context.as_dict() | {
        "text": reply.text,
        "token_ids": reply.token_ids,
        "finish_reason": reply.finish_reason,
        "query_tokens": reply.query_tokens,
        "ttft_s": reply.timings.ttft_s,
        "tokens_per_s": reply.timings.tokens_per_s,
        "peak_bytes": reply.peak_bytes,
        "wire_bytes_phase2": reply.wire.bytes,
        "wire_calls_phase2": reply.wire.calls,
        "wire_within_bytes_phase2": reply.wire_within.bytes,
    }
    return {name: values[name] for name in FIELDS if name != "query"}
