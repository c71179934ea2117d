"""Sources: the passages of a context that an answer attended to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from star_attention.generation.result import Source
from star_attention.hf.execution.sources import Readings
from star_attention.hf.text import passages, special
from star_attention.hf.text.conversation import ChatContext
from star_attention.hf.text.passages import Place
from star_attention.hf.text.rendered import RenderedText
from star_attention.inputs import ContextInput


@dataclass(frozen=True, kw_only=True)
class SourceFinder:
    """Finds the sources of a call's answers, on rank 0.

    Attributes:
        tokenizer: the model's, or None.
        context: the context.
        most: the most sources of an answer.
        tokens_per_forward: most tokens of one forward.
        earlier_tokens: tokens of earlier turns, which the queries begin with.
    """

    tokenizer: Any
    context: ContextInput
    most: int
    tokens_per_forward: int
    earlier_tokens: int = 0

    def readings(self, answers: list[tuple[list[int], list[int]]]) -> Readings:
        """Return what is to be read once more, for queries and their answers."""
        # A line break asks for nothing, in any language. Of thirteen neutral texts it did best.
        neutral = [int(self.context.ids_L[-1])]
        if self.tokenizer is not None:
            neutral = special.continued_ids(self.tokenizer, RenderedText("\n")) or neutral
        start = self.earlier_tokens
        rows = [(query[:start], query[start:], answer) for query, answer in answers]
        return Readings(neutral=neutral, rows=rows, tokens_per_forward=self.tokens_per_forward)

    def sources(self, attention: list[Tensor]) -> list[tuple[Source, ...]]:
        """Return the sources of each answer, from the attention to each context token."""
        ids: list[int] = self.context.ids_L.tolist()
        spans = passages.passages(self.tokenizer, ids)
        if not spans:
            return [() for _ in attention]
        starts, stops = torch.tensor(spans, device="cpu").T
        return [self._best(ids, spans, _sums(row_L, starts, stops)) for row_L in attention]

    def _best(
        self, ids: list[int], spans: list[tuple[int, int]], sums_P: Tensor
    ) -> tuple[Source, ...]:
        whole = float(sums_P.sum())
        order = sums_P.sort(descending=True, stable=True).indices[: self.most].tolist()
        chosen = sorted(number for number in order if sums_P[number] > 0)
        merged: list[tuple[int, int, float]] = []
        for number in chosen:
            start, stop = spans[number]
            weight = float(sums_P[number]) / whole
            if merged and merged[-1][1] == start:
                start, _, more = merged.pop()
                weight += more
            merged.append((start, stop, weight))
        places = self._places(ids, [(start, stop) for start, stop, _ in merged])
        sources = [
            Source(start=start, stop=stop, weight=weight, **vars(place))
            for (start, stop, weight), place in zip(merged, places, strict=True)
        ]
        return tuple(sorted(sources, key=lambda source: -source.weight))

    def _places(self, ids: list[int], spans: list[tuple[int, int]]) -> list[Place]:
        if self.tokenizer is None:
            return [Place() for _ in spans]
        if self.context.chat is None:
            return passages.places(self.tokenizer, ids, spans, self.context.text)
        end = self.context.end
        messages = ChatContext.from_dict(self.context.chat).messages
        held = "" if end is None else end["text"][end["encoded"] :]
        return passages.chat_places(self.tokenizer, ids, spans, messages, held)


def _sums(row_L: Tensor, starts_P: Tensor, stops_P: Tensor) -> Tensor:
    """Return the attention that each passage got."""
    until_L = torch.cat([row_L.new_zeros(1), row_L]).double().cumsum(0)
    return until_L[stops_P] - until_L[starts_P]
