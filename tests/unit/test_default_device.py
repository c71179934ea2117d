"""Contexts and answers do not depend on torch's default device, which notebooks set to a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import EncodedContext, StarLLM
from tests.engines import bundled_tokenizer, text_model

TEXT = "The hill is tall. " * 20


@pytest.fixture
def star() -> StarLLM:
    return StarLLM(text_model(), bundled_tokenizer(), block_size=32)


@pytest.fixture
def elsewhere(star: StarLLM) -> Iterator[None]:
    """Put tensors without a device where nothing can be read, which is no place for any of ours."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def saved(star: StarLLM, context: EncodedContext, folder: Path) -> EncodedContext:
    context.save(folder / "x.star")
    return star.load_context(folder / "x.star")


FEW = dict(max_new_tokens=8)
CALLS: dict[str, Callable[[StarLLM, EncodedContext, Path], Any]] = {
    "greedy": lambda star, c, _: star.generate(c, "A dog", **FEW).token_ids,
    "batch": lambda star, c, _: [r.token_ids for r in star.generate(c, ["A", "A long dog"], **FEW)],
    "sample": lambda star, c, _: (
        star.generate(c, "A", do_sample=True, seed=1, top_p=0.9, **FEW).token_ids
    ),
    "penalties": lambda star, c, _: (
        star.generate(
            c, "A", repetition_penalty=1.2, no_repeat_ngram_size=2, bad_words_ids=[[5]], **FEW
        ).token_ids
    ),
    "lookup": lambda star, c, _: star.generate(c, "A", prompt_lookup_num_tokens=2, **FEW).token_ids,
    "logprobs": lambda star, c, _: star.generate(c, "A", logprobs=2, **FEW).logprobs,
    "logits": lambda star, c, _: star.logits(c, "A dog").tolist(),
    "stream": lambda star, c, _: list(star.stream(c, "A dog", **FEW)),
    "extend": lambda star, c, _: star.generate(star.extend(c, "The cat."), "A", **FEW).token_ids,
    "save": lambda star, c, folder: star.generate(saved(star, c, folder), "A", **FEW).token_ids,
    "fp8": lambda star, _, __: encoded_by(star.with_config(kv_dtype="fp8")),
    "look-back": lambda star, _, __: encoded_by(star.with_config(lookback=1)),
}


def encoded_by(star: StarLLM) -> list[int]:
    return star.generate(star.encode(TEXT), "A", **FEW).token_ids


@pytest.mark.parametrize("name", CALLS)
def test_another_default_device(
    name: str, star: StarLLM, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expected = CALLS[name](star, star.encode(TEXT), tmp_path)
    request.getfixturevalue("elsewhere")
    assert CALLS[name](star, star.encode(TEXT), tmp_path) == expected


def test_json_answers_on_another_default_device(
    star: StarLLM, request: pytest.FixtureRequest
) -> None:
    # It makes a tensor when it is imported.
    pytest.importorskip("xgrammar.matcher")
    request.getfixturevalue("elsewhere")
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    reply = star.generate(star.encode(TEXT), "A", json_schema=schema, max_new_tokens=3)
    assert reply.text.startswith("{")
