"""`bench questions`: many questions on one text.

This library encodes the text once; transformers reads it again for each question.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig

from star_attention.bench.benchmark import Benchmark, Target
from star_attention.bench.models import random_ids
from star_attention.engine import StarLLM
from star_attention.planning.plan import format_size
from star_attention.tools import machine

STOCK = "stock"
METHODS = (STOCK, "dense", "star")


@dataclass(frozen=True, kw_only=True)
class QuestionsRow:
    """One method at one length.

    Attributes:
        method: `STOCK` is transformers; the others are methods of this library.
        context: length of the text in tokens.
        questions: number of questions on it.
        encode_s: time to encode the text, once; 0 if nothing is kept between questions.
        question_s: time of one question with its answer; the median.
        failed: the reason if there are no numbers.
    """

    method: str
    context: int
    questions: int
    encode_s: float | None = None
    question_s: float | None = None
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
        block: block size in tokens; shorter contexts are one block.
        questions: number of questions on each text. One is measured, and multiplied by this number.
        query_tokens, answer_tokens: length of a question and of an answer.
        repeats: runs of each, of which the median counts.
        compile: as for `StarLLM`.
    """

    name: ClassVar[str] = "questions"
    contexts: list[int]
    block: int
    questions: int
    query_tokens: int
    answer_tokens: int
    repeats: int
    compile: bool | None = None

    @property
    def longest_input(self) -> int:
        return max(self.contexts) + self.query_tokens + self.answer_tokens

    def run(self, target: Target) -> list[QuestionsRow]:
        query = random_ids(target.model, self.query_tokens, seed=1)
        rows = []
        cases = [(context, method) for context in self.contexts for method in METHODS]
        for number, (context, method) in enumerate(cases, 1):
            target.progress(f"{number} of {len(cases)}: {method}, context {format_size(context)}")
            row = QuestionsRow(method=method, context=context, questions=self.questions)
            complete = self._time_stock if method == STOCK else self._time_ours
            try:
                rows.append(complete(row, random_ids(target.model, context), query, target))
            except machine.OUT_OF_MEMORY:
                rows.append(replace(row, failed="out of memory"))
        return rows

    def _time_stock(
        self, row: QuestionsRow, ids_L: Tensor, query: Tensor, target: Target
    ) -> QuestionsRow:
        generate = partial(
            _stock_generate, target.model, torch.cat([ids_L, query]), self.answer_tokens
        )
        return replace(row, encode_s=0.0, question_s=self._median(generate, target))

    def _time_ours(
        self, row: QuestionsRow, ids_L: Tensor, query: Tensor, target: Target
    ) -> QuestionsRow:
        """Complete a row. The context's memory is free after this call, whether or not it fails."""
        star = StarLLM(
            target.model,
            block_size=min(self.block, row.context),
            method=row.method,
            compile=self.compile,
            comm="solo",
        )
        encode_s = self._median(partial(star.encode, ids_L), target)
        generate = partial(
            star.generate,
            star.encode(ids_L),
            query,
            max_new_tokens=self.answer_tokens,
            ignore_eos=True,
        )
        return replace(row, encode_s=encode_s, question_s=self._median(generate, target))

    def _median(self, work: partial[Any], target: Target) -> float:
        return median(machine.time_repeatedly(work, repeats=self.repeats, device=target.device))

    def table(self, rows: list[QuestionsRow]) -> list[tuple[str, ...]]:
        header = ("context", "method", "text s", "question s", "questions", "total s", "x stock")
        stock_s = {row.context: row.total_s for row in rows if row.method == STOCK}
        return [header, *(_cells(row, stock_s.get(row.context)) for row in rows)]


@torch.no_grad()
def _stock_generate(model: Any, ids_L: Tensor, tokens: int) -> Any:
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ids_1L = ids_L[None].to(model.device)
    return model.generate(ids_1L, attention_mask=torch.ones_like(ids_1L), generation_config=config)


def _cells(row: QuestionsRow, stock_s: float | None) -> tuple[str, ...]:
    context = format_size(row.context)
    if row.total_s is None or row.encode_s is None or row.question_s is None:
        return context, row.method, row.failed or "", "", "", "", ""
    is_baseline = row.method == STOCK
    return (
        context,
        row.method,
        f"{row.encode_s:,.3g}",
        f"{row.question_s:,.3g}",
        str(row.questions),
        f"{row.total_s:,.3g}",
        "" if stock_s is None or is_baseline else f"{stock_s / row.total_s:.2f}",
    )
