"""One call of `generate` or `stream` on rank 0, which leads: tokens on demand."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from star_attention import phase2
from star_attention.distributed.messages import END, SOURCES
from star_attention.generation import stock
from star_attention.generation.arguments import translate_generation_errors
from star_attention.generation.conversation import Conversation, LeadingKeeper, Sent, sent
from star_attention.generation.logprobs import LogprobRecorder
from star_attention.generation.result import Delta, Generation, Source, Timings, called
from star_attention.generation.settings import ResolvedSettings
from star_attention.generation.sources import SourceFinder
from star_attention.hf.execution import processing
from star_attention.hf.execution.request import Program, Request
from star_attention.hf.execution.sources import attention_of
from star_attention.hf.execution.timing import Clock
from star_attention.hf.text.answer import AnswerText, BeamStopCriteria
from star_attention.planning.traffic import Traffic
from star_attention.storage.oom import translate_oom


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Grouping of a call's answers: one or several queries, and the number of answers to each."""

    several_queries: bool
    answers_per_query: int

    def group(self, answers: list[Generation]) -> Any:
        """Return an answer for one query, a list for several; lists where each has several."""
        size = self.answers_per_query
        if size == 1:
            return answers if self.several_queries else answers[0]
        groups = [answers[i : i + size] for i in range(0, len(answers), size)]
        return groups if self.several_queries else groups[0]


SentAnswer = tuple[Generation, Sent | None]
"""An answer as rank 0 sends it to the others, and its conversation."""


def _sent(answer: Generation) -> SentAnswer:
    conversation = answer.conversation
    return (
        replace(answer, logits=None, conversation=None),
        None if conversation is None else sent(conversation),
    )


def delta_of(answer: AnswerText, text: str) -> Delta | None:
    """Return new text of an answer with its new reasoning; None for neither."""
    reasoning = answer.take_reasoning()
    return Delta(text=text, reasoning=reasoning) if text or reasoning else None


def out_of_memory(answers: int, context_tokens: int, tokens_per_forward: int) -> str:
    """Return the message for a call without memory for all of its answers."""
    return (
        f"out of memory in phase 2 with {answers:,} answers at once over"
        f" {context_tokens:,} context tokens: ask fewer queries at once, or"
        " lower num_beams, num_return_sequences or tokens_per_forward"
        f" (now {tokens_per_forward:,})"
    )


def warn_of_unanswered(answers: list[AnswerText], settings: ResolvedSettings) -> None:
    """Warn of answers that have tokens, but neither text nor calls of tools."""
    unsaid = [
        answer
        for answer in answers
        if answer.is_unsaid and not called(settings, answer).get("tool_calls")
    ]
    if any(answer.finish_reason == "length" and answer.reasoning for answer in unsaid):
        warnings.warn(
            "an answer ended inside the model's reasoning, so its text is empty; raise"
            f" max_new_tokens (now {settings.max_new_tokens:,})",
            stacklevel=2,
        )
    elif unsaid:
        warnings.warn(
            f"an answer of {len(unsaid[0].token_ids):,} tokens has no text: they are special"
            " tokens, reasoning or a tool's call, which skip_special_tokens=False shows",
            stacklevel=2,
        )


@dataclass
class _Measurements:
    """Times, memory and traffic of a run."""

    first_s: float = 0.0
    second_look_s: float | None = None
    sources_s: float | None = None
    end_s: float = 0.0
    peak_bytes: int | None = None
    wire: Traffic = field(default_factory=Traffic)
    wire_within: Traffic = field(default_factory=Traffic)


class GenerationRun:
    """A call on rank 0: `pieces` yields the first answer's text and completes all answers."""

    def __init__(
        self,
        request: Request,
        settings: ResolvedSettings,
        shape: Shape,
        *,
        tokenizer: Any,
        encode_s: float,
        number: int,
        finder: SourceFinder | None = None,
        keeper: LeadingKeeper | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Begin the call.

        Args:
            request: what to answer.
            settings: settings of the answers.
            shape: their grouping.
            tokenizer: the model's, or None.
            encode_s: seconds that the context took.
            number: the call's number on all ranks.
            finder: finds the answers' sources; None for none.
            keeper: keeps the answers for a next turn; None to keep none.
            check: what is left to check of the model once the queries' forward has been issued.
        """
        self._clock = Clock(request.handle.device)
        self._comm, self.number = request.comm, number
        self._wire_before = copy.copy(request.comm.cp_traffic)
        self._wire_within_before = copy.copy(request.comm.tp_traffic)
        self._encode_s, self._finder, self._keeper = encode_s, finder, keeper
        self.settings, self.shape = settings, shape
        reading = settings.text.reading(tokenizer)
        if settings.stops and not settings.uses_own_loop:
            request.stop_after = lambda prompt_tokens: BeamStopCriteria(reading, prompt_tokens)
        self._request = request
        # The request after its answers: a second look gives it another shard.
        self._answered: Request | None = None
        self._sources: list[tuple[Source, ...]] | None = None
        self._conversations: list[Conversation] | None = None
        self.program: Program | None = None
        if settings.uses_own_loop:
            program = request.program(settings.answers_per_query)
            self.program = replace(program, keeps=keeper is not None)
        self._check = check
        self._leader: phase2.Leader | None = None
        prompts = [prompt for prompt in request.queries for _ in range(settings.answers_per_query)]
        self._answers = settings.text.answers(reading, prompts)
        rows = len(prompts)
        keeps_logits = settings.arguments.return_logits
        self._logits: list[list[Tensor]] | None = (
            [[] for _ in range(rows)] if keeps_logits else None
        )
        alternatives = settings.arguments.logprobs
        self._logprobs = None if alternatives is None else LogprobRecorder(tokenizer, alternatives)
        self._measured = _Measurements()
        self.ended = self._end_sent = False
        # A stream begins suspended, and is resumed for its first piece.
        self.is_suspended = True

    def pieces(self) -> Generator[Delta]:
        """Yield what of the first answer is final; running to the end completes all."""
        with translate_oom(self._out_of_memory):
            for text in self._own_loop() if self.settings.uses_own_loop else self._stock_loop():
                if delta := delta_of(self._answers[0], text):
                    yield delta
        tail = delta_of(self._answers[0], self._close())
        warn_of_unanswered(self._answers, self.settings)
        with translate_oom(self._out_of_memory):
            self._find_sources()
            self._keep()
        self._send_end()
        self._release()
        if tail:
            yield tail

    def _out_of_memory(self) -> str:
        request = self._request
        return out_of_memory(
            len(self._answers), len(request.context_ids_L), request.tokens_per_forward
        )

    def _send_end(self) -> None:
        if self._comm.size > 1 and not self._end_sent:
            self._end_sent = True
            answers = [_sent(answer) for answer in self.generations()]
            self._comm.broadcast_object((END, self.number, answers))

    def _own_loop(self) -> Iterator[str]:
        assert self.program is not None
        # transformers makes its logits processors in here.
        with translate_generation_errors():
            self._leader = leader = phase2.Leader(
                self._request, self.program, processing.of(self._request), self._check
            )
        while not leader.finished:
            step = leader.step()
            self._measured.first_s = self._measured.first_s or self._clock.elapsed()
            piece = self._push(step)
            leader.settle(goes_on=any(answer.finish_reason is None for answer in self._answers))
            yield piece
        self._answered = leader.request

    def _push(self, step: phase2.Step) -> str:
        """Append one step's tokens to all unfinished answers; return the first answer's text."""
        piece = ""
        assert step.logits_RV is not None
        if self._logprobs is not None:
            self._logprobs.push(step.logits_RV, step.tokens)
        for row, answer in enumerate(self._answers):
            if answer.finish_reason is not None:
                continue
            text = answer.push(step.tokens[row])
            if self._logits is not None:
                self._logits[row].append(step.logits_RV[row].cpu())
            if step.ended[row] and answer.finish_reason is None:
                text += answer.end(self._finish_reason(len(answer.token_ids)))
            if row == 0:
                piece = text
        return piece

    def _stock_loop(self) -> Iterator[str]:
        request = self._request
        if request.second_look:
            request = stock.look(request)
        with translate_generation_errors():
            rows = stock.stock(request)
        self._answered = request
        self._note_look(request)
        for answer, row in zip(self._answers, rows, strict=True):
            for token in row:
                if answer.finish_reason is None:
                    answer.push(token)
            if answer.finish_reason is None:
                answer.end(self._finish_reason(len(row)))
        self._measured.first_s = self._clock.elapsed()
        yield ""

    def _finish_reason(self, answer_tokens: int) -> str:
        return "length" if answer_tokens >= self.settings.max_new_tokens else "stop"

    def suspend(self) -> bool:
        """Let all ranks leave the stream for another call, after its last piece."""
        self.is_suspended = True
        if self._leader is not None:
            self._leader.suspend()
        return True

    def finish(self) -> None:
        """End all answers early, with reason "length"; the other ranks end theirs."""
        self._close()
        # The other ranks wait for no step of a suspended stream.
        if self._leader is not None and not self.is_suspended:
            self._leader.close()
        with translate_oom(self._out_of_memory):
            self._keep()
        self._send_end()
        self._release()

    def _release(self) -> None:
        """Drop keys and values: a stream that has ended may be kept for its result."""
        self._leader = self._answered = None

    def repeat(self) -> None:
        raise AssertionError("rank 0 leads")

    def leave(self) -> None:
        raise AssertionError("rank 0 leads")

    def end(self, answers: Any) -> None:
        raise AssertionError("rank 0 leads")

    def _close(self) -> str:
        """Take the measurements, end all answers; return the first answer's text held back."""
        if self.ended:
            return ""
        self.ended = True
        measured = self._measured
        measured.end_s, measured.peak_bytes = self._clock.stop()
        if self._leader is not None:
            self._note_look(self._leader.request)
        self._count_traffic()
        tails = [
            answer.end("length") if answer.finish_reason is None else "" for answer in self._answers
        ]
        return tails[0]

    def _count_traffic(self) -> None:
        measured, comm = self._measured, self._comm
        measured.wire = comm.cp_traffic.since(self._wire_before)
        # The tensor-parallel ranks of every context-parallel rank exchange the same amount.
        within = comm.tp_traffic.since(self._wire_within_before)
        measured.wire_within = Traffic(within.calls * comm.cp_size, within.bytes * comm.cp_size)

    def _find_sources(self) -> None:
        """Read queries and answers once more, with all ranks, for what they attend to."""
        if self._finder is None:
            return
        assert self._answered is not None, "sources come after the answers"
        started = self._clock.elapsed()
        rows = [(self._query(row), answer.token_ids) for row, answer in enumerate(self._answers)]
        readings = self._finder.readings(rows)
        if self._comm.size > 1:
            self._comm.broadcast_object((SOURCES, self.number, readings))
        self._sources = self._finder.sources(attention_of(self._answered, readings))
        _, self._measured.peak_bytes = self._clock.stop()
        self._measured.sources_s = self._clock.elapsed() - started
        self._count_traffic()

    def _keep(self) -> None:
        """Make the conversations that next turns go on from."""
        if self._keeper is None or self._conversations is not None:
            return
        self._conversations = [
            self._keeper.after_answer(row, self._query(row), answer, self._leader)
            for row, answer in enumerate(self._answers)
        ]

    def _query(self, row: int) -> list[int]:
        return self._request.queries[row // self.settings.answers_per_query]

    def _note_look(self, request: Request) -> None:
        """Note how long a second look took, once the answer is there."""
        if request.looked is not None:
            self._measured.second_look_s = request.looked.seconds

    def generations(self) -> list[Generation]:
        """Return the answers, those to one query next to each other."""
        return [self._generation(row, answer) for row, answer in enumerate(self._answers)]

    def _generation(self, row: int, answer: AnswerText) -> Generation:
        assert answer.finish_reason is not None, "the run has not ended"
        measured = self._measured
        later_tokens = len(answer.token_ids) - 1
        later_s = measured.end_s - measured.first_s
        has_rate = self.settings.uses_own_loop and later_tokens > 0 and later_s > 0
        return Generation(
            text=answer.text,
            reasoning=answer.reasoning,
            reasoning_tokens=answer.reasoning_tokens,
            token_ids=answer.token_ids,
            finish_reason=answer.finish_reason,
            stop_string=answer.stop_string,
            **called(self.settings, answer),
            query_tokens=len(self._query(row)),
            kept_tokens=0 if self.program is None else self.program.kept_tokens,
            conversation=None if self._conversations is None else self._conversations[row],
            timings=Timings(
                encode_s=self._encode_s,
                ttft_s=measured.first_s,
                tokens_per_s=later_tokens / later_s if has_rate else None,
                second_look_s=measured.second_look_s,
                sources_s=measured.sources_s,
            ),
            logprobs=None
            if self._logprobs is None
            else self._logprobs.of_row(row, answer.token_ids),
            sources=None if self._sources is None else self._sources[row],
            logits=None
            if self._logits is None
            else _stacked(self._logits[row], self._request.handle.vocab_size),
            peak_bytes=measured.peak_bytes,
            wire=measured.wire,
            wire_within=measured.wire_within,
        )


def _stacked(rows: list[Tensor], vocab_size: int) -> Tensor:
    if not rows:
        return torch.empty(0, vocab_size, device="cpu")
    return torch.stack(rows)
