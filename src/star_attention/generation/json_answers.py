"""Answers in JSON that follow a schema: xgrammar says which tokens may come next.

Axes: R rows, W words of 32 bits, one bit for each token.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from star_attention.errors import InvalidInputError, MissingPackageError, first_line
from star_attention.hf.text.answer import Reader
from star_attention.hf.text.call_grammar import CallSchema, TagGrammar
from star_attention.hf.text.reasoning import ReasoningReader

_BITS = [
    torch.tensor(1 << bit, dtype=torch.int64, device="cpu").to(torch.int32) for bit in range(32)
]
"""Words with one bit set, as int32."""
_CACHE_BYTES = 64 * 2**20
"""Most bytes of grammars that are kept for one vocabulary."""
_PLACE = re.compile(r"^\[[\d:]+\] \S+: ")
"""The time and the place in xgrammar's own code, before its messages."""

_SCHEMA_REMEDY = "give a JSON schema as a dict, or a pydantic model"


def compile_schema(
    schema: dict[str, Any] | type, tokenizer: Any, vocab_size: int, eos_ids: set[int]
) -> Any:
    """Return the grammar of a schema, for a tokenizer.

    Its JSON is on a single line: white space without end would be JSON, too.

    Args:
        schema: a JSON schema, a pydantic model, or what a call of a tool follows.
        tokenizer: a transformers tokenizer.
        vocab_size: the model's number of token ids.
        eos_ids: token ids that end an answer.

    Raises:
        MissingPackageError: xgrammar is not installed.
        InvalidInputError: no schema, no tokenizer, or nothing that ends an answer.
    """
    if tokenizer is None:
        raise InvalidInputError("json_schema needs a tokenizer; give one to StarLLM")
    is_call = isinstance(schema, (CallSchema, TagGrammar))
    if not eos_ids:
        name = "tool_choice" if is_call else "json_schema"
        raise InvalidInputError(
            f"{name} needs an end-of-sequence token, which this model's settings do not name or"
            " ignore_eos ignores; give eos_token_id, and leave ignore_eos out"
        )
    # A grammar that was compiled for a copy of the tokenizer, in another thread, is not again.
    compiler = _compiler(_vocabulary(tokenizer, vocab_size, tuple(sorted(eos_ids))))
    try:
        if isinstance(schema, TagGrammar):
            return compiler.compile_structural_tag(schema)
        return compiler.compile_json_schema(_as_text(schema), any_whitespace=False)
    except Exception as error:
        # The library raises RuntimeError and several others of its own.
        what = "the tools' parameters" if is_call else "json_schema"
        remedy = "change them, or leave tool_choice out" if is_call else _SCHEMA_REMEDY
        reason = _PLACE.sub("", first_line(error))
        raise InvalidInputError(f"{what} cannot be followed: {reason}; {remedy}") from error


def _as_text(schema: Any) -> str:
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if not isinstance(schema, dict):
        raise TypeError(f"expected a dict or a pydantic model, got {type(schema).__name__}")
    return json.dumps(schema)


def _xgrammar() -> Any:
    try:
        return importlib.import_module("xgrammar")
    except ImportError as error:
        raise MissingPackageError(
            "xgrammar, which json_schema and tools that have to be called need, is not installed;"
            ' run: pip install "star-attention[json]"'
        ) from error


@dataclass(frozen=True)
class _Vocabulary:
    """What a grammar depends on besides its schema: alike for copies of a tokenizer.

    Attributes:
        text: all of it, to compare.
        info: what xgrammar reads it from.
    """

    text: str
    info: Any = field(compare=False)


@functools.lru_cache(maxsize=8)
def _vocabulary(tokenizer: Any, vocab_size: int, eos_ids: tuple[int, ...]) -> _Vocabulary:
    info = _xgrammar().TokenizerInfo.from_huggingface(
        tokenizer, vocab_size=vocab_size, stop_token_ids=list(eos_ids)
    )
    return _Vocabulary(info.serialize_json(), info)


@functools.lru_cache(maxsize=4)
def _compiler(vocabulary: _Vocabulary) -> Any:
    return _xgrammar().GrammarCompiler(vocabulary.info, cache_limit_bytes=_CACHE_BYTES)


class _Row:
    """The JSON of one answer, and what comes before it.

    Args:
        matcher: xgrammar's state of the JSON.
        reader: reads the answer's tokens; None where nothing can come before the JSON.
    """

    def __init__(self, matcher: Any, reader: ReasoningReader | None) -> None:
        self._matcher, self._reader = matcher, reader
        # What is left of a tag that the model has begun to write.
        self._rest: tuple[int, ...] = ()

    def fill(self, bitmask_RW: Tensor, row: int, ends: list[int]) -> None:
        """Set the row's bits of the tokens that may come next; an ended row keeps its own."""
        bits_W = bitmask_RW[row]
        if self._rest:
            bits_W.zero_()
            bits_W[self._rest[0] // 32] = _BITS[self._rest[0] % 32]
        elif self._reader is not None and not self._reader.in_text:
            bits_W.fill_(-1)
            for token in ends:
                bits_W[token // 32] &= ~_BITS[token % 32]
        elif not self._matcher.is_terminated():
            self._matcher.fill_next_token_bitmask(bitmask_RW, row)
            for first, *_ in self._openings():
                bits_W[first // 32] |= _BITS[first % 32]

    def accept(self, token: int) -> bool:
        """Add a token; False if it does not continue the JSON."""
        if self._reader is None:
            return bool(self._matcher.is_terminated() or self._matcher.accept_token(token))
        if self._rest:
            if token != self._rest[0]:
                return False
            self._rest = self._rest[1:]
        elif self._reader.in_text:
            # JSON first: a bracket may begin an array or a tag.
            if self._matcher.accept_token(token):
                self._reader = None
                return True
            opening = next((ids for ids in self._openings() if ids[0] == token), None)
            if opening is None:
                return False
            self._rest = opening[1:]
        text = self._reader.push(token)
        if not text:
            return True
        self._reader = None
        return bool(self._matcher.accept_string(text))

    def _openings(self) -> list[tuple[int, ...]]:
        return [] if self._reader is None else self._reader.openings


class JsonProcessor(LogitsProcessor):
    """Leave each row the tokens that continue its JSON; for one call.

    The JSON begins after the model's reasoning, where the prompt has opened it or the model begins
    with it, and in the last message of a model that writes several.

    Args:
        grammar: what `compile_schema` returned.
        readers: reads the tokens of each row.
    """

    def __init__(self, grammar: Any, readers: list[Reader | None]) -> None:
        self._xgrammar = _xgrammar()
        self._rows = [
            _Row(
                self._xgrammar.GrammarMatcher(grammar),
                reader if isinstance(reader, ReasoningReader) else None,
            )
            for reader in readers
        ]
        # It takes torch's default device, but fills the mask on the host.
        with torch.device("cpu"):
            self._bitmask_RW = self._xgrammar.allocate_token_bitmask(
                len(readers), grammar.tokenizer_info.vocab_size
            )
        self._ends = list(grammar.tokenizer_info.stop_token_ids)
        self._has_begun = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._has_begun:
            for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
                if not row.accept(token):
                    raise InvalidInputError(
                        f"token {token} does not continue the JSON of json_schema; leave out the"
                        " logits processor that forces it"
                    )
        self._has_begun = True
        for number, row in enumerate(self._rows):
            row.fill(self._bitmask_RW, number, self._ends)
        self._xgrammar.apply_token_bitmask_inplace(scores, self._bitmask_RW.to(scores.device))
        return scores
