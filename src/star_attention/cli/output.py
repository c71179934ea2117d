"""Answer queries about one context, and print the answers as text (streamed) or as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from star_attention.cli.formatting import answer_summary, context_summary, format_seconds
from star_attention.cli.options import ReplyOptions
from star_attention.cli.progress import Status
from star_attention.cli.streams import say
from star_attention.cli.torchrun import is_rank_0

if TYPE_CHECKING:
    from star_attention.engine import StarLLM
    from star_attention.generation.result import Delta, Generation
    from star_attention.storage.context import EncodedContext

_HEADER_WIDTH = 100

FIELDS = {
    "query": "the query",
    "text": "the answer, without special tokens, cut before a stop string",
    "reasoning": "what the model marked as its reasoning, apart from the answer; null for none",
    "reasoning_tokens": "how many of `token_ids` the reasoning took, with the tags or the headers"
    " around it",
    "token_ids": "all generated tokens, including the one that ended the answer",
    "finish_reason": "`stop` or `length`",
    "stop_string": "the stop string that ended the answer; null for another reason",
    "logprobs": "with `--logprobs`: text, id and log probability of each token, and of the most"
    " likely ones in its place",
    "tool_calls": "with `--tools`: the tools that the answer calls, each with `name` and"
    " `arguments`; null without",
    "sources": "with `--sources`: the passages that the answer attended to most, the best first,"
    " each with tokens (`start`, `stop`), characters (`start_char`, `stop_char`; in a chat those of"
    " the message), `message`, `text` and `weight`; null without",
    "method": "attention method",
    "context_tokens": "tokens of the encoded text",
    "query_tokens": "tokens of the query, including what the chat template adds",
    "kept_tokens": "tokens of these whose keys and values were kept of earlier turns; 0 without",
    "block_size": "tokens per block",
    "anchor_size": "tokens of the anchor",
    "lookback": "blocks before its own that a block sees in the layers that look back",
    "lookback_layers": "the layers that look back",
    "blocks": "number of blocks",
    "ranks": "number of context-parallel ranks, which share the text; each consists of"
    " `tensor_parallel` processes",
    "tensor_parallel": "processes that share the heads and weights of a context-parallel rank",
    "reused_tokens": "tokens that `--reuse` copied from an older version of the text",
    "encode_s": "seconds of encoding (for a saved context: when it was encoded)",
    "ttft_s": "seconds from the query to the first token (with beams: to the whole answer)",
    "second_look_s": "seconds of these that the second look took; null without one",
    "sources_s": "seconds that the sources took, after the answer; null without them",
    "tokens_per_s": "tokens per second after the first; null for a single token, and with beams",
    "peak_bytes": "peak device memory while answering; null where it is not measured (CPU)",
    "wire_bytes_phase1": "bytes that all context-parallel ranks together sent while encoding;"
    " 0 on one",
    "wire_bytes_phase2": "the same while answering",
    "wire_calls_phase1": "collectives while encoding",
    "wire_calls_phase2": "collectives while answering",
    "wire_within_bytes_phase1": "bytes sent for tensor parallelism while encoding",
    "wire_within_bytes_phase2": "the same while answering",
    "per_rank": "for each context-parallel rank: stored tokens, seconds of encoding, and peak"
    " device memory while encoding",
}
"""The fields of `--json` of `generate` and `ask`, in order.

A new key of `as_dict` must be listed here.
"""


class Answerer:
    """Answers queries about `context` and prints the answers.

    Args:
        star: The engine.
        context: The encoded text.
        options: How to print.
        kwargs: Keyword arguments of `StarLLM.generate`.
        status: Receives a one-line summary of each answer.
        show_encode_time: True if the context was encoded by this command.

    Attributes:
        asked: What queries follow: the context, or a conversation about it.
    """

    def __init__(
        self,
        star: StarLLM,
        context: EncodedContext,
        options: ReplyOptions,
        kwargs: dict[str, Any],
        status: Status,
        *,
        show_encode_time: bool,
    ) -> None:
        self.star, self.context = star, context
        self.asked: Any = context
        self.options, self.kwargs, self.status = options, kwargs, status
        self.summary_head = context_summary(context) + ", "
        if show_encode_time:
            self.summary_head += f"encode {format_seconds(context.encode_s)}, "

    def answer_all(self, queries: list[str], *, batch: bool) -> None:
        """Answer queries one after another, or as one batch. Several get a header each."""
        if batch and len(queries) > 1:
            replies = self.star.generate(
                self.context, [self._content(query) for query in queries], **self.kwargs
            )
            for number, (query, reply) in enumerate(zip(queries, replies, strict=True)):
                self._print_header(query, first=not number)
                self._print(query, reply)
            self._print_summary(replies, f"batch of {len(queries)}, ")
            return
        for number, query in enumerate(queries):
            if len(queries) > 1:
                self._print_header(query, first=not number)
            self.answer(query)

    def answer(self, query: str) -> Generation:
        """Answer one query, streaming it unless the options or a beam search forbid it."""
        if self.options.json or self.options.no_stream or (self.options.num_beams or 1) > 1:
            reply: Generation = self.star.generate(self.asked, self._content(query), **self.kwargs)
            self._print(query, reply)
        else:
            reply = self._stream(query)
        self._print_summary([reply])
        return reply

    def _content(self, query: str) -> Any:
        """Return the query as the engine takes it: a user message if the context is a chat."""
        return query if self.context.chat is None else [{"role": "user", "content": query}]

    def _stream(self, query: str) -> Generation:
        with self.star.stream(self.asked, self._content(query), **self.kwargs) as stream:
            self._print_deltas(stream.deltas())
        print(flush=True)
        self._print_notes(stream.result)
        return stream.result

    def _print_deltas(self, deltas: Iterable[Delta]) -> None:
        """Print text to stdout, and reasoning to stderr in paragraphs of its own."""
        is_inside = False
        for delta in deltas:
            if delta.reasoning and self.options.show_reasoning and is_rank_0():
                print(delta.reasoning, end="", file=sys.stderr, flush=True)
                is_inside = True
            if delta.text:
                if is_inside:
                    print("\n", file=sys.stderr, flush=True)
                is_inside = False
                print(delta.text, end="", flush=True)
        if is_inside:
            print(file=sys.stderr, flush=True)

    def _print_header(self, query: str, *, first: bool) -> None:
        if self.options.json:
            return
        if not first:
            print()
        line = " ".join(query.split())
        if len(line) > _HEADER_WIDTH:
            line = line[: _HEADER_WIDTH - 3] + "..."
        print("> " + line, flush=True)

    def _print(self, query: str, reply: Generation) -> None:
        if self.options.json:
            values = {"query": query} | self.context.as_dict() | reply.as_dict()
            print(json.dumps({name: values[name] for name in FIELDS}), flush=True)
        else:
            # Imports torch, which commands that print answers have loaded by now.
            from star_attention.generation.result import Delta

            self._print_deltas([Delta(reasoning=reply.reasoning or "", text=reply.text)])
            print(flush=True)
            self._print_notes(reply)

    def _print_notes(self, reply: Generation) -> None:
        """Print calls of tools and sources to stderr, a line each."""
        for call in reply.tool_calls or () if is_rank_0() else ():
            say(f"calls {call.name} {json.dumps(call.arguments, ensure_ascii=False)}")
        for source in reply.sources or () if is_rank_0() else ():
            place = f"tokens {source.start:,} to {source.stop:,}"
            say(f"source, weight {source.weight:.2f}, {place}: {source.text}")

    def _print_summary(self, replies: list[Generation], note: str = "") -> None:
        summary = answer_summary(*replies, shows_reasoning=self.options.show_reasoning)
        self.status.say(self.summary_head + note + summary)
        # The context is described once.
        self.summary_head = ""
