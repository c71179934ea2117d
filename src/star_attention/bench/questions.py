"""Many questions on one text: encoded once, against transformers reading it again for each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from star_attention.bench.subject import random_ids
from star_attention.engine import StarLLM
from star_attention.planning.plan import format_size
from star_attention.tools import machine
from star_attention.tools.machine import Progress

METHODS = ("stock", "dense", "star")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one length. encode_s: once a text; question_s: median of one further question with its answer."""

    method: str
    context: int
    questions: int
    encode_s: float | None = None
    question_s: float | None = None
    failed: str | None = None

    @property
    def total_s(self) -> float | None:
        """Of all questions: the text once, where it is kept, and each question."""
        if self.encode_s is None or self.question_s is None:
            return None
        return self.encode_s + self.questions * self.question_s


def run(
    model: Any,
    *,
    contexts: list[int],
    block: int,
    questions: int,
    query_tokens: int,
    tokens: int,
    repeats: int,
    compile: bool | None,
    progress: Progress,
) -> list[Row]:
    """Star Attention, our dense attention, and stock `generate` over text and question, at every length."""
    device = next(model.parameters()).device
    query = random_ids(model, query_tokens, seed=1)
    rows: list[Row] = []
    for context in contexts:
        ids_L = random_ids(model, context)
        for method in METHODS:
            progress(
                f"{len(rows) + 1} of {len(contexts) * len(METHODS)}: {method}, context {format_size(context)}"
            )
            row: dict[str, Any] = dict(method=method, context=context, questions=questions)
            try:
                if method == "stock":
                    stock = partial(_stock, model, torch.cat([ids_L, query]), tokens)
                    times: dict[str, Any] = dict(
                        encode_s=0.0,
                        question_s=median(machine.timed(stock, repeats=repeats, device=device)),
                    )
                else:
                    star = StarLLM(
                        model,
                        block_size=min(block, context),
                        method=method,
                        compile=compile,
                        comm="solo",
                    )
                    times = _times(star, ids_L, query, tokens, repeats, device)
            except machine.OUT_OF_MEMORY:
                rows.append(Row(**row, failed="out of memory"))
                continue
            rows.append(Row(**row, **times))
    return rows


def _times(
    star: StarLLM, ids_L: Tensor, query: Tensor, tokens: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """The times of a `Row` of ours. (A function, so that the context's memory is free when it ends, however it does.)"""
    encode_s = median(machine.timed(partial(star.encode, ids_L), repeats=repeats, device=device))
    ask = partial(star.generate, star.encode(ids_L), query, max_new_tokens=tokens, ignore_eos=True)
    return dict(
        encode_s=encode_s, question_s=median(machine.timed(ask, repeats=repeats, device=device))
    )


@torch.no_grad()
def _stock(model: Any, ids_L: Tensor, tokens: int) -> Any:
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ids_1L = ids_L[None].to(model.device)
    return model.generate(ids_1L, attention_mask=torch.ones_like(ids_1L), generation_config=config)


def table(rows: list[Row]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [
        ("context", "method", "text s", "a question s", "questions", "all s", "x stock")
    ]
    for row in rows:
        head = (format_size(row.context), row.method)
        if row.total_s is None or row.encode_s is None or row.question_s is None:
            lines.append((*head, row.failed or "", "", "", "", ""))
            continue
        stock = next(
            (one.total_s for one in rows if (one.method, one.context) == ("stock", row.context)),
            None,
        )
        lines.append(
            (
                *(
                    *head,
                    f"{row.encode_s:,.3g}",
                    f"{row.question_s:,.3g}",
                    str(row.questions),
                    f"{row.total_s:,.3g}",
                ),
                "" if stock is None or row.method == "stock" else f"{stock / row.total_s:.2f}",
            )
        )
    return lines
