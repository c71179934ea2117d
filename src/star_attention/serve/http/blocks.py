"""Streams of a single answer in blocks: what it thinks, and what it says."""

from __future__ import annotations

from typing import Any

from star_attention.generation.result import Delta
from star_attention.serve.http.objects import Shape
from star_attention.serve.http.tools import Answer, Call

REASONING, TEXT = "reasoning", "text"


class BlockShape(Shape):
    """What the protocols share whose answers are lists of blocks.

    Attributes:
        kind: the kind of the open block; None for none.
        number: the open block's place among the answer's blocks, from 0.
        written: the text of the open block.
        answer: the answer, once it has ended.
        more: further fields that come with its end.
        citations: where it came from, in the protocol's form.
    """

    def __init__(self) -> None:
        self.kind: str | None = None
        self.number = -1
        self.written = ""
        self.answer: Answer | None = None
        self.more: dict[str, Any] = {}
        self.citations: list[dict[str, Any]] = []

    def piece(self, index: int, delta: Delta) -> bytes:
        events = b""
        for kind, text in ((REASONING, delta.reasoning), (TEXT, delta.text)):
            if text:
                events += self._turn_to(kind) + self.add(text)
                self.written += text
        return events

    def ending(self, index: int, answer: Answer, more: dict[str, Any]) -> bytes:
        # An answer without text has a block without text, unless it calls tools.
        events = b"" if answer.calls else self._turn_to(TEXT)
        self.answer, self.more = answer, more
        self.take_citations(more)
        if self.kind == TEXT:
            events += b"".join(map(self.cite, range(len(self.citations))))
        events += self._end_block()
        for call in answer.calls:
            self.number += 1
            events += self.call(call)
        return events

    def call(self, call: Call) -> bytes:
        """Return the events of a block that is a call of a tool."""
        raise NotImplementedError

    def take_citations(self, more: dict[str, Any]) -> None:
        """Take the citations from the further fields of an answer."""
        star = more.get("star", {})
        found = (self.citation(source, star) for source in star.get("sources", ()))
        self.citations = [each for each in found if each is not None]

    def citation(self, source: dict[str, Any], star: dict[str, Any]) -> dict[str, Any] | None:
        """Return a source as the protocol cites it; None for one that it cannot cite."""
        raise NotImplementedError

    def cite(self, number: int) -> bytes:
        """Return an event with a citation of the open block."""
        raise NotImplementedError

    def begin_block(self) -> bytes:
        """Return events that say that a block begins."""
        raise NotImplementedError

    def add(self, text: str) -> bytes:
        """Return an event with what the open block goes on with."""
        raise NotImplementedError

    def end_block(self) -> bytes:
        """Return events that say that the open block has ended."""
        raise NotImplementedError

    def _turn_to(self, kind: str) -> bytes:
        """Open a block of a kind, unless one is open."""
        if self.kind == kind:
            return b""
        events = self._end_block()
        self.kind, self.number, self.written = kind, self.number + 1, ""
        return events + self.begin_block()

    def _end_block(self) -> bytes:
        events = b"" if self.kind is None else self.end_block()
        self.kind = None
        return events
