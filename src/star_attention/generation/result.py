"""The result of answering a query."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from star_attention.errors import InvalidInputError, quote
from star_attention.generation.conversation import Ask, Conversation, Keeper, answer_to
from star_attention.generation.settings import ResolvedSettings
from star_attention.hf.text.answer import AnswerText
from star_attention.hf.text.calls import ToolCall
from star_attention.planning import html
from star_attention.planning.sizes import counted
from star_attention.planning.traffic import Traffic
from star_attention.storage.context import EncodedContext


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Times that an answer took.

    Attributes:
        encode_s: seconds of phase 1, when the context was encoded.
        ttft_s: seconds from the call to the first token (with beams: to the whole answer).
        tokens_per_s: tokens per second after the first; None for one token, and for beams.
        second_look_s: seconds of `ttft_s` that the second look took; None without one.
        sources_s: seconds that the sources of all answers of the call took, after the last token;
            None without them.
    """

    encode_s: float
    ttft_s: float
    tokens_per_s: float | None
    second_look_s: float | None = None
    sources_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token of an answer and how likely the model found it, before penalties and temperature.

    Attributes:
        token: its text ("" without a tokenizer).
        id: its id.
        logprob: natural logarithm of its probability.
        top: the most likely tokens in its place, as many as were asked for.
    """

    token: str
    id: int
    logprob: float
    top: list[TokenLogprob] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        top = [{"token": t.token, "id": t.id, "logprob": t.logprob} for t in self.top]
        return {"token": self.token, "id": self.id, "logprob": self.logprob, "top": top}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A passage of the context that an answer attended to.

    Attributes:
        start, stop: its tokens in the context: `context.token_ids[start:stop]`.
        start_char, stop_char: its characters in the text of the context, or in the content of its
            message (in parts: their texts, joined), as the tokenizer writes it; None where the
            context came as token ids, and for what a chat template wrote.
        message: number of its message in a chat, from 0; None in other contexts.
        text: its text, without white space around it ("" without a tokenizer).
        weight: its share of the attention to all passages, 0 to 1.
    """

    start: int
    stop: int
    start_char: int | None = None
    stop_char: int | None = None
    message: int | None = None
    text: str = ""
    weight: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one step of a stream added to an answer; usually one of its fields is empty.

    Servers of OpenAI's chat format send them as `delta.content` and `delta.reasoning_content`.

    Attributes:
        text: text of the answer.
        reasoning: what the model marked as its reasoning.
    """

    text: str = ""
    reasoning: str = ""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Generation:
    """One answer; `str(answer)` is its text.

    Every rank has the same answer, but only rank 0 has logits.

    Attributes:
        text: the answer without special tokens, cut before a stop string ("" without a tokenizer).
        reasoning: what the model marked as its reasoning, which is not part of the text; None for
            none.
        reasoning_tokens: how many of `token_ids` the reasoning took, with the tags or the headers
            around it.
        token_ids: every generated id, including the one that ended the answer.
        tool_calls: the calls of tools in an answer to a prompt with tools; None without tools. The
            text has them, too, as the model writes them (gpt-oss apart).
        content: the text without these calls; None without tools.
        finish_reason: "stop" (end-of-sequence token, stop string or stopping criterion), "length"
            (`max_new_tokens`) or "canceled" (a row of a batch that was canceled).
        stop_string: the stop string that ended the answer; None for another reason.
        query_tokens: length of the query in tokens; of a conversation, with all turns before.
        kept_tokens: tokens of these whose keys and values were kept of earlier turns.
        timings: seconds and rates.
        logprobs: of each token of `token_ids`; None unless asked for.
        sources: passages of the context that query and answer attended to most, the best first;
            None unless asked for, and for a stream that was closed before its end.
        conversation: what a next turn continues (`continue_with`); None unless asked for by
            `keep`.
        logits: fp32 `[tokens, vocabulary]` on CPU, before any processing; None unless asked for.
        peak_bytes: peak device memory of the call; None on a CPU.
        wire: traffic between context-parallel ranks during the call, all ranks together.
        wire_within: traffic between tensor-parallel ranks during the call, all ranks together.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    query_tokens: int
    timings: Timings
    reasoning: str | None = None
    reasoning_tokens: int = 0
    stop_string: str | None = None
    logprobs: list[TokenLogprob] | None = None
    sources: tuple[Source, ...] | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    content: str | None = None
    kept_tokens: int = 0
    conversation: Conversation | None = None
    logits: Tensor | None = None
    peak_bytes: int | None = None
    wire: Traffic = field(default_factory=Traffic)
    wire_within: Traffic = field(default_factory=Traffic)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        """Return e.g. `Generation('It is 42.', 5 tokens, stop)`; a long text is cut."""
        tokens = counted(len(self.token_ids), "token")
        return f"Generation({quote(self.text)}, {tokens}, {self.finish_reason})"

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message of a chat, with its calls of tools.

        To give the results of tools, begin the next query of the conversation with it.
        """
        content = self.text if self.content is None else self.content
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        return message

    def continue_with(self, query: Any = None, **settings: Any) -> Any:
        """Answer the next query of the conversation. This answer must be generated with `keep`.

        Earlier turns keep their keys and values, so that only new tokens are computed. The new
        answer is kept, too. This one does not change, and can be continued in other directions.
        `StarLLM.stream(reply, query)` does the same piece by piece.

        Args:
            query: text, in a chat also messages; token ids where the queries before were. In a
                chat, messages that begin with one of the assistant give the answer before it
                another form, such as tool calls.
            settings: keywords of `generate`.

        Returns:
            What `generate` returns.

        Raises:
            InvalidInputError: the answer was not kept, or a query in another form than before.
            ContextLengthError: context, conversation and answer exceed the positions.
        """
        return answer_to(conversation_of(self), query, settings)

    def _repr_html_(self) -> str:
        """Return the answer for a notebook: its text, and a line about it."""
        reasoning = "" if self.reasoning is None else html.folded("reasoning", self.reasoning)
        rate = self.timings.tokens_per_s
        second_look_s = self.timings.second_look_s
        facts = [
            counted(len(self.token_ids), "token"),
            self.finish_reason,
            f"first token {self.timings.ttft_s:.2f} s",
            *([] if second_look_s is None else [f"second look {second_look_s:.2f} s of it"]),
            *([] if rate is None else [f"{rate:,.0f} tok/s"]),
        ]
        sources = "".join(
            html.folded(f"source, weight {source.weight:.2f}", source.text or str(source))
            for source in self.sources or ()
        )
        return reasoning + html.prose(self.text) + sources + html.note(", ".join(facts))

    def as_dict(self) -> dict[str, Any]:
        """Return the answer's part of a line of `--json`, without logits."""
        return {
            "text": self.text,
            "reasoning": self.reasoning,
            "reasoning_tokens": self.reasoning_tokens,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stop_string": self.stop_string,
            "logprobs": self.logprobs and [token.as_dict() for token in self.logprobs],
            "tool_calls": None
            if self.tool_calls is None
            else [{"name": call.name, "arguments": call.arguments} for call in self.tool_calls],
            "sources": None
            if self.sources is None
            else [source.as_dict() for source in self.sources],
            "query_tokens": self.query_tokens,
            "kept_tokens": self.kept_tokens,
            "encode_s": self.timings.encode_s,
            "ttft_s": self.timings.ttft_s,
            "second_look_s": self.timings.second_look_s,
            "sources_s": self.timings.sources_s,
            "tokens_per_s": self.timings.tokens_per_s,
            "peak_bytes": self.peak_bytes,
            "wire_bytes_phase2": self.wire.bytes,
            "wire_calls_phase2": self.wire.calls,
            "wire_within_bytes_phase2": self.wire_within.bytes,
        }


def called(settings: ResolvedSettings, answer: AnswerText) -> dict[str, Any]:
    """Return the fields of a `Generation` about calls of tools."""
    reader, prefix = settings.tool_reader, settings.answer_prefix
    if reader is None:
        return {}
    has_reasoning = answer.reasoning is not None
    calls = reader.calls(
        answer.text, answer.token_ids, has_reasoning=has_reasoning, answer_prefix=prefix
    )
    said = reader.said(answer.text, prefix) if calls else answer.text
    return {"tool_calls": calls, "content": said}


def conversation_of(reply: Generation) -> Conversation:
    """Return the conversation of an answer.

    Raises:
        InvalidInputError: the answer was not asked for with `keep`.
    """
    if reply.conversation is None:
        raise InvalidInputError(
            "this answer cannot be continued, because it was not kept; ask with keep=True"
        )
    return reply.conversation


Asked = EncodedContext | Conversation | Generation
"""What a query can follow: a context, a conversation, or the answer that is its last turn."""


def talk_after(asked: Any, ask: Ask) -> Conversation:
    """Return the conversation that a query follows; on a context one without turns.

    `ask` answers the queries after it. `Runtime.check_context` refuses what is not a context.
    """
    if isinstance(asked, Conversation):
        return asked
    if isinstance(asked, Generation):
        return conversation_of(asked)
    return Keeper(context=asked, ask=ask).conversation((), [], None)
