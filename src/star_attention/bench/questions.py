"""`bench questions`: many questions on one text.

This library encodes the text once; transformers reads it again for each question.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig

from star_attention.bench.benchmark import Benchmark, Target
from star_attention.bench.decode_rows import WHOLE
from star_attention.bench.models import random_ids
from star_attention.bench.modes import (
    block_of,
    by_rule,
    ranks_of,
    weights_modes,
    weights_settings,
)
from star_attention.bench.ranks import NOT_HERE, Spent, attempt, in_short, measure
from star_attention.engine import StarLLM
from star_attention.planning.quality import QUALITIES
from star_attention.planning.sizes import format_size
from star_attention.storage.context import EncodedContext
from star_attention.tools import machine

STOCK = "stock"
METHODS = (STOCK, "dense", "star")
METHODS_ON_RANKS = ("star",)
"""Those of a run by default; all are methods of `StarLLM` but `STOCK`, which runs on one rank."""
PRESETS = tuple(QUALITIES)[1:]
"""Methods that are Star Attention with a preset of look-back."""


def engine_settings(method: str) -> dict[str, Any]:
    """Return the settings of an engine that a method's name stands for."""
    return dict(method="star", quality=method) if method in PRESETS else dict(method=method)


@dataclass(frozen=True, kw_only=True)
class QuestionsRow:
    """One method at one length.

    Attributes:
        method: `STOCK` is transformers; the others are methods of this library.
        context: length of the text in tokens.
        questions: number of questions on it.
        batch: questions answered at once.
        ranks: ranks that work together.
        tensor_parallel: those that share the weights of one model.
        weights: what a rank reads of them for a token, as in `bench decode`.
        encode_s: time to encode the text, once; 0 if nothing is kept between questions.
        edit_s: time to encode the text again with one block changed; None if not asked for, and for
            methods that cannot reuse blocks.
        question_s: time of a batch of questions with their answers, divided by its size; the
            median.
        first_token_s: time to the first tokens of a batch's answers.
        second_look: share of the context of a second look.
        second_look_s: what it adds to the time to the first token of one question; None if not
            asked for, and for methods that have none.
        tokens_per_s: tokens per second after these, of all answers of a batch.
        peak_bytes: peak device memory of each rank while answering; None where it is not measured.
        failed: the reason if there are no numbers.
    """

    method: str
    context: int
    questions: int
    batch: int = 1
    ranks: int = 1
    tensor_parallel: int = 1
    weights: str = WHOLE
    encode_s: float | None = None
    edit_s: float | None = None
    question_s: float | None = None
    first_token_s: float | None = None
    second_look: float = 0.0
    second_look_s: float | None = None
    tokens_per_s: float | None = None
    peak_bytes: tuple[int, ...] | None = None
    failed: str | None = None

    @property
    def total_s(self) -> float | None:
        """The time of all questions, with that of encoding the text."""
        if self.encode_s is None or self.question_s is None:
            return None
        return self.encode_s + self.questions * self.question_s


@dataclass(frozen=True, kw_only=True)
class Questions(Benchmark[QuestionsRow]):
    """Settings of `bench questions`.

    Attributes:
        contexts: lengths in tokens.
        block: block size in tokens; of a shorter context each rank has one.
        questions: number of questions on each text. A batch is measured, and multiplied.
        batch: questions answered at once; transformers answers one after the other.
        query_tokens, answer_tokens: length of a question and of an answer.
        repeats: runs of each, of which the median counts.
        compile: as for `StarLLM`.
        slice_weights: as for `Decode`.
        alone: of several ranks, also measure rank 0 by itself.
        edit: also measure an edit of one block. It takes the memory of a second context.
        second_look: also measure a second look at this share of the context, which takes as much;
            0 for none.
        methods: None for `METHODS`, or `METHODS_ON_RANKS`.
    """

    name: ClassVar[str] = "questions"
    contexts: list[int]
    block: int
    questions: int
    query_tokens: int
    answer_tokens: int
    repeats: int
    batch: int = 1
    compile: bool | None = None
    slice_weights: bool | None = None
    alone: bool = True
    edit: bool = False
    second_look: float = 0.0
    methods: list[str] | None = None

    @property
    def longest_input(self) -> int:
        return max(self.contexts) + self.query_tokens + self.answer_tokens

    def run(self, target: Target) -> Iterator[QuestionsRow]:
        groups = [
            [
                QuestionsRow(
                    method=method,
                    context=context,
                    questions=self.questions,
                    batch=1 if method == STOCK else self.batch,
                    second_look=self.second_look,
                    ranks=ranks,
                    tensor_parallel=target.tensor_parallel,
                    weights=weights,
                )
                for weights in weights_modes(ranks, target, self.slice_weights)
            ]
            for context in self.contexts
            for method, ranks in self._methods(target)
        ]
        number, total = 0, sum(map(len, groups))
        for group in groups:
            encoded: list[EncodedContext] = []
            for row in group:
                number += 1
                where = f"{row.method}, context {format_size(row.context)}"
                where += f", {row.ranks} ranks, weights {row.weights}" if row.ranks > 1 else ""
                target.progress(f"{number} of {total}: {where}")
                yield self._measured(row, encoded, target)

    def _methods(self, target: Target) -> list[tuple[str, int]]:
        """Return each method with its number of ranks."""
        if target.ranks == 1:
            return [(method, 1) for method in self.methods or METHODS]
        alone = self.alone and target.tensor_parallel == 1
        return [
            (method, ranks)
            for method in self.methods or METHODS_ON_RANKS
            if method != STOCK or target.tensor_parallel == 1
            for ranks in ([1] if method == STOCK else ranks_of(target, alone))
        ]

    def _measured(
        self, row: QuestionsRow, encoded: list[EncodedContext], target: Target
    ) -> QuestionsRow:
        if row.ranks < target.ranks and not target.is_first:
            return replace(row, failed=NOT_HERE)
        comm = target.comm_of(alone=row.ranks < target.ranks)

        def timed() -> QuestionsRow:
            if row.method == STOCK:
                return self._time_stock(row, target)
            return self._time_ours(row, encoded, target)

        complete, reason = attempt(comm, timed)
        if complete is None:
            encoded.clear()
        return complete or replace(row, failed=reason)

    def _time_stock(self, row: QuestionsRow, target: Target) -> QuestionsRow:
        ids_L = random_ids(target.model, row.context)
        query = random_ids(target.model, self.query_tokens, seed=1)
        generate = partial(
            _stock_generate, target.model, torch.cat([ids_L, query]), self.answer_tokens
        )
        seconds = machine.time_repeatedly(generate, repeats=self.repeats, device=target.device)
        return replace(row, encode_s=0.0, question_s=median(seconds))

    def _time_ours(
        self, row: QuestionsRow, encoded: list[EncodedContext], target: Target
    ) -> QuestionsRow:
        star = target.engine(
            alone=row.ranks < target.ranks,
            compile=self.compile,
            block_size=block_of(self.block, row.context, target),
            **engine_settings(row.method),
            **weights_settings(row.ranks, row.weights),
        )
        star = by_rule(star, row.weights, self.slice_weights)
        comm, encode_s, edit_s = star.runtime.comm, None, None
        if not encoded:
            target.check_memory(star, row.context)
            ids_L = random_ids(target.model, row.context)

            def encode() -> None:
                # The memory of the one before is free before the next is begun.
                encoded.clear()
                encoded.append(star.encode(ids_L))

            runs = [measure(encode, target.device, comm) for _ in range(1 + self.repeats)][1:]
            encode_s = median(run.seconds for run in runs)
            if self.edit and star.runtime.method.why_not_reuse() is None:
                edit_s = self._time_edit(star, encoded[0], target)
        queries = [random_ids(target.model, self.query_tokens, 1 + i) for i in range(row.batch)]
        generate = partial(star.generate, encoded[0], queries, ignore_eos=True)

        def runs_of(tokens: int) -> list[Spent]:
            work = partial(generate, max_new_tokens=tokens)
            return [measure(work, target.device, comm) for _ in range(1 + self.repeats)][1:]

        whole, first = runs_of(self.answer_tokens), runs_of(1)
        whole_s = median(run.seconds for run in whole)
        first_s = median(run.seconds for run in first)
        later = row.batch * (self.answer_tokens - 1)
        return replace(
            row,
            # The same text, in the rows after the first.
            encode_s=encode_s if encode_s is not None else encoded[0].encode_s,
            edit_s=edit_s,
            question_s=whole_s / row.batch,
            first_token_s=first_s,
            second_look_s=self._time_second_look(star, encoded[0], target),
            tokens_per_s=later / (whole_s - first_s) if later and whole_s > first_s else None,
            peak_bytes=whole[-1].peak_bytes,
        )

    def _time_edit(self, star: StarLLM, context: EncodedContext, target: Target) -> float:
        """Return the time of changing a token of a block in the middle."""
        at = context.plan.num_blocks // 2 * context.plan.block_size
        changed_1 = (context.token_ids[at : at + 1] + 1) % target.model.config.vocab_size
        edit = partial(star.edit, context, at, at + 1, changed_1)
        comm = star.runtime.comm
        runs = [measure(edit, target.device, comm) for _ in range(1 + self.repeats)][1:]
        return median(run.seconds for run in runs)

    def _time_second_look(
        self, star: StarLLM, context: EncodedContext, target: Target
    ) -> float | None:
        """Return what a second look adds to a first token, by medians of questions in turn."""
        if not self.second_look or star.runtime.method.why_no_second_look() is not None:
            return None
        query = random_ids(target.model, self.query_tokens, 1)
        ask = partial(star.generate, context, query, ignore_eos=True, max_new_tokens=1)
        shares = (0.0, self.second_look)
        runs = [
            [
                measure(partial(ask, second_look=share), target.device, star.runtime.comm).seconds
                for share in shares
            ]
            for _ in range(1 + self.repeats)
        ][1:]
        plain, looking = zip(*runs, strict=True)
        return float(median(looking) - median(plain))

    def table(self, rows: list[QuestionsRow]) -> list[tuple[str, ...]]:
        on_ranks = any(row.ranks > 1 for row in rows)
        header = [
            "context",
            "method",
            *(["ranks", "weights"] if on_ranks else []),
            "text s",
            *(["edit / text"] if self.edit else []),
            "question s",
            "questions",
            "total s",
            "x one rank" if on_ranks else "x stock",
            "at once",
            "first tokens s",
            *([f"second look of {self.second_look:g} adds s"] if self.second_look else []),
            "tok/s",
        ]
        lines = [header, *(self._cells(row, rows, on_ranks) for row in rows)]
        return [tuple(line + [""] * (len(header) - len(line))) for line in lines]

    def _cells(self, row: QuestionsRow, rows: list[QuestionsRow], on_ranks: bool) -> list[str]:
        place = [str(row.ranks), row.weights] if on_ranks else []
        start = [format_size(row.context), row.method, *place]
        if row.total_s is None or row.encode_s is None or row.question_s is None:
            return [*start, in_short(row.failed)]
        return [
            *start,
            f"{row.encode_s:,.3g}",
            *(
                ["" if row.edit_s is None else f"{row.edit_s / row.encode_s:.3f}"]
                if self.edit
                else []
            ),
            f"{row.question_s:,.3g}",
            str(row.questions),
            f"{row.total_s:,.3g}",
            _ratio(row, rows, on_ranks),
            str(row.batch),
            _seconds(row.first_token_s),
            *([_seconds(row.second_look_s)] if self.second_look else []),
            "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
        ]


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:,.3g}"


@torch.no_grad()
def _stock_generate(model: Any, ids_L: Tensor, tokens: int) -> Any:
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ids_1L = ids_L[None].to(model.device)
    return model.generate(ids_1L, attention_mask=torch.ones_like(ids_1L), generation_config=config)


def _ratio(row: QuestionsRow, rows: list[QuestionsRow], on_ranks: bool) -> str:
    """Say how many times as fast a row is as one rank, or on one rank as transformers."""
    for other in rows:
        if other.context != row.context or other is row:
            continue
        if on_ranks and other.ranks == 1 and other.tokens_per_s and row.tokens_per_s:
            return f"{row.tokens_per_s / other.tokens_per_s:.2f}"
        if not on_ranks and other.method == STOCK and other.total_s and row.total_s:
            return f"{other.total_s / row.total_s:.2f}"
    return ""
