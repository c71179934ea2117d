"""Answers in JSON that follow a schema: xgrammar says which tokens may come next.

Axes: R rows, S tokens so far, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib
import json
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor

from star_attention.errors import InvalidInputError, MissingPackageError, first_line
from star_attention.hf.text.answer import Reader
from star_attention.hf.text.reasoning import ReasoningReader


def compile_schema(
    schema: dict[str, Any] | type, tokenizer: Any, vocab_size: int, eos_ids: set[int]
) -> Any:
    """Return the grammar of a schema, for a tokenizer.

    Its JSON is on a single line: white space without end would be JSON, too.

    Args:
        schema: a JSON schema, or a pydantic model.
        tokenizer: a transformers tokenizer.
        vocab_size: the model's number of token ids.
        eos_ids: token ids that end an answer.

    Raises:
        MissingPackageError: xgrammar is not installed.
        InvalidInputError: no schema, no tokenizer, or nothing that ends an answer.
    """
    if tokenizer is None:
        raise InvalidInputError("json_schema needs a tokenizer; give one to StarLLM")
    if not eos_ids:
        raise InvalidInputError(
            "json_schema needs an end-of-sequence token, which this model's settings do not name or"
            " ignore_eos ignores; give eos_token_id, and leave ignore_eos out"
        )
    compiler = _compiler(tokenizer, vocab_size, tuple(sorted(eos_ids)))
    try:
        return compiler.compile_json_schema(_as_text(schema), any_whitespace=False)
    except Exception as error:
        # The library raises RuntimeError and several others of its own.
        raise InvalidInputError(
            f"json_schema cannot be followed: {first_line(error)}; give a JSON schema as a dict, or"
            " a pydantic model"
        ) from error


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
            "xgrammar, which json_schema needs, is not installed;"
            ' run: pip install "star-attention[json]"'
        ) from error


@functools.lru_cache(maxsize=2)
def _compiler(tokenizer: Any, vocab_size: int, eos_ids: tuple[int, ...]) -> Any:
    xgrammar = _xgrammar()
    info = xgrammar.TokenizerInfo.from_huggingface(
        tokenizer, vocab_size=vocab_size, stop_token_ids=list(eos_ids)
    )
    return xgrammar.GrammarCompiler(info)


class JsonProcessor(LogitsProcessor):
    """Leave each row the tokens that continue its JSON; for one call.

    Where the prompt has opened the model's reasoning, the JSON begins after it.

    Args:
        grammar: what `compile_schema` returned.
        readers: reads the tokens of each row.
    """

    def __init__(self, grammar: Any, readers: list[Reader | None]) -> None:
        self._xgrammar = _xgrammar()
        self._matchers = [self._xgrammar.GrammarMatcher(grammar) for _ in readers]
        self._bitmask = self._xgrammar.allocate_token_bitmask(
            len(readers), grammar.tokenizer_info.vocab_size
        )
        # Readers of rows whose reasoning has not ended.
        self._waiting = {
            row: reader
            for row, reader in enumerate(readers)
            if isinstance(reader, ReasoningReader) and reader.in_reasoning
        }
        self._has_begun = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._has_begun:
            for row, token in enumerate(input_ids[:, -1].tolist()):
                self._accept(row, token)
        self._has_begun = True
        for row, matcher in enumerate(self._matchers):
            if row in self._waiting:
                self._bitmask[row] = -1
            elif not matcher.is_terminated():
                matcher.fill_next_token_bitmask(self._bitmask, row)
        # Rows that have ended keep the mask of their end.
        self._xgrammar.apply_token_bitmask_inplace(scores, self._bitmask.to(scores.device))
        return scores

    def _accept(self, row: int, token: int) -> None:
        matcher, reader = self._matchers[row], self._waiting.get(row)
        if reader is not None:
            text = reader.push(token)
            if not reader.in_reasoning:
                del self._waiting[row]
                accepted = not text or matcher.accept_string(text)
            else:
                accepted = True
        else:
            accepted = matcher.is_terminated() or matcher.accept_token(token)
        if not accepted:
            raise InvalidInputError(
                f"token {token} does not continue the JSON of json_schema; leave out the logits"
                " processor that forces it"
            )
