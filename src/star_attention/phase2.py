"""Phase 2: queries and their answers over an encoded context (paper, section 2.2).

Greedy search and sampling run in our own loop, a program that every rank runs: `Leader` on rank 0,
`Follower` on the others. transformers' `generate` prepares settings, logits processors and stopping
criteria on rank 0, which draws the tokens. Everything else needs one small packet for each step.
Beams and assisted decoding run in transformers' loops (`generation.stock`), over the same cache.

Axes: B queries (padded on the left to one length Q), R rows = B x answers each, S tokens of a
forward, T tokens of an answer and all before it, L context tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode

from star_attention.errors import explained_by
from star_attention.hf.execution import finite, second_look
from star_attention.hf.execution.drawing import Text, seen
from star_attention.hf.execution.processing import Processing
from star_attention.hf.execution.request import Program, Request
from star_attention.hf.execution.sampling import AsyncCopy, Sampler, highest
from star_attention.storage.kept import kept_row
from star_attention.storage.kv import Pair
from star_attention.storage.transfers import send

OWN_LOOP_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
"""Modes that run in our own loop; transformers runs all others."""

GO_ON, LAST, CLOSED, SUSPENDED, REFUSED = range(5)
"""Flags of packets: tokens that more may follow; the last tokens; no tokens, the answers have
ended; no tokens for now, rank 0 is in another call; no tokens, but an error that follows."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One decoded token per row.

    Attributes:
        tokens: the token of each row.
        ended: True for rows that end with it.
        logits_RV: unprocessed logits, fp32 `[R, V]`; None on ranks other than 0.
    """

    tokens: list[int]
    ended: list[bool]
    logits_RV: Tensor | None = None


def logits(request: Request) -> Tensor:
    """Return the logits of every token of a single query, fp32 `[Q, V]`."""
    cache = request.mirrored_cache()
    parts = [
        request.handle.logits(
            ids_BS, positions_BS, cache, request.rope_length, logits_to_keep=0
        ).float()
        for ids_BS, positions_BS in request.forwards(cache)
    ]
    return torch.cat(parts, 1)[0]


class Decoding:
    """The steps of a request on one rank. All ranks run the same forwards in the same order.

    A step is a token of each row and, unless it is the last, the forward of these tokens. A packet,
    `[tokens of R rows, R times ended, flag]`, takes its tokens from rank 0 to the others.

    Args:
        request: the request on this rank.
        program: what rank 0 decided about it.

    Attributes:
        tokens: tokens of each answer so far.
        finished: True once no step follows.
    """

    def __init__(self, request: Request, program: Program) -> None:
        self.request, self.program = request, program
        self.tokens = 0
        self.finished = False
        self._comm = request.comm
        self._rows = len(program.queries) * program.answers_per_query
        self._cache = request.cache(
            program.padded_tokens, program.kept_tokens, program.max_new_tokens
        )
        self._padding_R1: Tensor | None = None
        self._logits_RV: Tensor | None = None
        # Tokens whose forward comes next.
        self._due_R1: Tensor | None = None

    def _catch_up(self) -> None:
        """Run the forwards before the next token, as far as they have not been issued."""
        if self._padding_R1 is None:
            if self.request.looks_late and self.request.graphs is not None:
                self.request.graphs.look()
            self._read_queries()
        elif self._due_R1 is not None:
            due_R1, self._due_R1 = self._due_R1, None
            self._logits_RV = self._forward(due_R1)

    def _read_queries(self) -> None:
        if self.program.second_look:
            self.request = second_look.look(self.request)
            self._cache = self.request.cache(self.program.padded_tokens)
        cache, answers = self._cache, self.program.answers_per_query
        for ids_BS, positions_BS in self.request.forwards(cache):
            self._logits_RV = self.request.forward(ids_BS, positions_BS, cache)
        if answers > 1:
            cache.batch_repeat_interleave(answers)
            if self._logits_RV is not None:
                self._logits_RV = self._logits_RV.repeat_interleave(answers, 0)
        padding = cache.row_padding(self._rows)
        self._padding_R1 = send(padding, self.request.handle.device)[:, None]

    def _forward(self, tokens_R1: Tensor) -> Tensor | None:
        cache, padding_R1 = self._cache, self._padding_R1
        assert padding_R1 is not None, "the queries come first"
        return self.request.forward(tokens_R1, cache.seen_tokens - padding_R1, cache)

    @property
    def forwarded_tokens(self) -> int:
        """Tokens of each answer that have been through the model."""
        return self._cache.tail_tokens - self.program.padded_tokens

    def kept_row(self, row: int, tokens: int) -> list[Pair | None]:
        """Return each layer's keys and values of a row's first tokens after the context."""
        padding = self._cache.row_padding(self._rows)[row]
        return kept_row(self._cache.tails, row, padding, tokens)

    def release(self) -> None:
        """Drop the keys and values, after the last step."""
        del self.request, self._cache

    def _follows(self, number: int) -> bool:
        """True if another token follows an answer's token of this number, 1, 2, ..."""
        return number < self.program.max_new_tokens

    def _is_forwarded(self, number: int) -> bool:
        """True if a forward follows the packet of an answer's token of this number."""
        return self.program.keeps or self._follows(number)

    def _undo(self) -> None:
        """Drop the forward of a packet without tokens."""
        self._cache.crop(-1)


class Leader(Decoding):
    """Rank 0's steps: it draws the tokens, and decides when the answers end.

    Args:
        request: the request on this rank.
        program: what rank 0 decided about it.
        processing: what becomes of the scores.
        check: raises an error if the model is not the one that encoded the context; None where
            nothing is to be checked.
    """

    def __init__(
        self,
        request: Request,
        program: Program,
        processing: Processing,
        check: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(request, program)
        self._check = check
        self._processing, self._device = processing, request.handle.device
        self._text: Text | None = None
        self._ended_R = torch.zeros(self._rows, dtype=torch.bool, device=self._device)
        self._flag = send([GO_ON], self._device)
        self._sampler = Sampler(
            request.seed if processing.samples else None, len(request.queries), self._device
        )
        self._values: list[int] = []
        self._all_ended = False

    def _read_queries(self) -> None:
        check = self._check
        if check is not None and not self.request.is_ready:
            # The weights have moved since the stream was made.
            self._check = None
            check()
        # A changed model may be the reason why a forward fails.
        with explained_by(check):
            super()._read_queries()

    def _check_model(self) -> None:
        """Check the model before the first token; all ranks raise the error."""
        check, self._check = self._check, None
        if check is None:
            return
        try:
            check()
        except Exception as error:
            self._send_flag(REFUSED)
            self._comm.run_on_rank_0(partial(_raise, error))

    @torch.no_grad()
    def step(self) -> Step:
        """Draw the next token of each row; `settle` is to follow."""
        self._catch_up()
        self._check_model()
        logits_RV = self._logits_RV
        assert logits_RV is not None and not self.finished
        # On the way before the packet, it has arrived when the packet has.
        checked = AsyncCopy(finite.are_finite(logits_RV)) if not self.tokens else None
        tokens_R1 = self._draw(logits_RV)
        packet = torch.cat([tokens_R1[:, 0], self._ended_R.long(), self._flag])
        copied = AsyncCopy(packet)
        self.tokens += 1
        if self._is_forwarded(self.tokens):
            self._due_R1 = tokens_R1
        if self.program.is_ahead:
            self._comm.broadcast_step(packet).wait()
            # The device works on the next token while Python looks at this one. If this one was the
            # last, that forward was for nothing.
            self._catch_up()
        with self._comm.waiting():
            values = copied.wait()
        if checked is not None:
            finite.check(self.request.handle, checked.wait())
        self._values = values[: 2 * self._rows]
        ended = [bool(value) for value in values[self._rows : 2 * self._rows]]
        self._all_ended = all(ended)
        return Step(tokens=values[: self._rows], ended=ended, logits_RV=logits_RV)

    def _draw(self, logits_RV: Tensor) -> Tensor:
        """Return the next token of each row, `[R, 1]`, and note which rows end with it."""
        processing, text = self._processing, self._read_text()
        scores_RV = logits_RV
        if processing.processors:
            scores_RV = processing.processors(seen(text, logits_RV), logits_RV.clone())
        if processing.samples and not self.tokens:
            # A GPU never recovers from drawing by NaN; `step` refuses them.
            scores_RV = scores_RV.nan_to_num(0.0, neginf=float("-inf"))
        tokens_R1 = (
            self._sampler.draw(scores_RV) if processing.samples else highest(scores_RV)[:, None]
        )
        if text is not None:
            text.add(tokens_R1[:, 0])
        # A row that has ended continues unseen next to the others, and criteria that look at the
        # last token alone would forget its end.
        if not self._follows(self.tokens + 1):
            self._ended_R = torch.ones_like(self._ended_R)
        if processing.ends:
            self._ended_R = self._ended_R | processing.ends(tokens_R1, scores_RV)
        if processing.criteria:
            self._ended_R = self._ended_R | processing.criteria(seen(text, scores_RV), scores_RV)
        return tokens_R1

    def _read_text(self) -> Text | None:
        """Return the tokens so far, if something reads them.

        The text is put together while the device reads the queries.
        """
        if self._text is None and self._processing.reads_text:
            program = self.program
            text_RS = self.request.text().repeat_interleave(program.answers_per_query, 0)
            self._text = Text(text_RS, program.max_new_tokens)
        return self._text

    def settle(self, *, goes_on: bool) -> None:
        """Let all ranks know if more steps follow the last one, once Python has looked at it."""
        known = self._all_ended or not self._follows(self.tokens)
        self.finished = known or not goes_on
        if not self.program.is_ahead:
            self._send(self._values, LAST if self.finished else GO_ON)
        elif self.finished and not known:
            self._send_flag(CLOSED)
        if self.finished:
            self._due_R1 = None

    def close(self) -> None:
        """End the answers after the last step."""
        if not self.finished:
            self._catch_up()
            self._send_flag(CLOSED)
            self.finished = True

    def suspend(self) -> None:
        """Let the other ranks leave the answers for another call."""
        if not self.finished:
            self._catch_up()
            self._send_flag(SUSPENDED)

    @torch.no_grad()
    def _send_flag(self, flag: int) -> None:
        """Send a packet without tokens, and run the forward that others have issued after it."""
        self._send([0] * 2 * self._rows, flag)
        if self._comm.size > 1 and self.program.is_ahead and self._is_forwarded(self.tokens + 1):
            self._forward(torch.zeros(self._rows, 1, dtype=torch.int64, device=self._device))
            self._undo()

    def _send(self, values: list[int], flag: int) -> None:
        if self._comm.size > 1:
            device = self._device if self.program.is_ahead else torch.device("cpu")
            self._comm.broadcast_step(send([*values, flag], device)).wait()


class Follower(Decoding):
    """The steps on every other rank."""

    @torch.no_grad()
    def step(self) -> tuple[int, Step]:
        """Run a step with rank 0; return the packet's flag and tokens."""
        self._catch_up()
        rows, is_ahead = self._rows, self.program.is_ahead
        device = self.request.handle.device
        packet = torch.empty(2 * rows + 1, dtype=torch.int64, device=device if is_ahead else None)
        self._comm.broadcast_step(packet).wait()
        copied = AsyncCopy(packet)
        number = self.tokens + 1
        if self._is_forwarded(number):
            self._due_R1 = packet[:rows, None].to(device)
        if is_ahead:
            self._catch_up()
        with self._comm.waiting():
            values = copied.wait()
        flag = values.pop()
        if flag == REFUSED:
            self._comm.run_on_rank_0(lambda: None)
        step = Step(tokens=values[:rows], ended=[bool(value) for value in values[rows:]])
        if flag in (GO_ON, LAST):
            self.tokens = number
            self.finished = flag == LAST or all(step.ended) or not self._follows(number)
        else:
            self.finished = flag == CLOSED
            if is_ahead and self._is_forwarded(number):
                self._undo()
            self._due_R1 = None
        return flag, step


def _raise(error: Exception) -> None:
    raise error
