"""Answers of equal settings share what transformers prepares; others have their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LogitsProcessor, LogitsProcessorList

from star_attention import StarLLM
from star_attention.errors import InvalidInputError
from star_attention.hf.execution import processing
from tests.engines import engine, ids, stock_generate

SAMPLED: dict[str, Any] = dict(do_sample=True, temperature=0.7, top_k=20, seed=1)
PLAIN: dict[str, Any] = dict(max_new_tokens=6, ignore_eos=True)
PENALTY: dict[str, Any] = dict(repetition_penalty=1.5)
QUERY = ids(4, seed=3)


class Nothing(LogitsProcessor):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The token counts of the texts that transformers prepared."""
    lengths: list[int] = []
    stock = processing.prepare

    def prepare(request: Any) -> Any:
        lengths.append(request.text().shape[1])
        return stock(request)

    monkeypatch.setattr(processing, "prepare", prepare)
    processing._known.clear()
    return lengths


def as_row(star: StarLLM, context: Any, **settings: Any) -> list[int]:
    batch = star.batch()
    tokens = batch.add(context, QUERY, **PLAIN | settings).result().token_ids
    batch.close()
    return tokens


def alone(star: StarLLM, context: Any, **settings: Any) -> list[int]:
    tokens: list[int] = star.generate(context, QUERY, **PLAIN | settings).token_ids
    return tokens


@pytest.mark.parametrize("answered", [alone, as_row])
def test_equal_settings_are_prepared_once(
    prepared: list[int], answered: Callable[..., list[int]]
) -> None:
    star = engine("llama", block_size=64)
    texts = [ids(length, seed=length) for length in (40, 50)]
    contexts = [star.encode(text) for text in texts]
    for settings in ({}, PENALTY, {"no_repeat_ngram_size": 2}):
        for text, context in zip(texts, contexts, strict=True):
            # One block is dense attention. Penalties look at this context, not the one before.
            stock = stock_generate(
                star.model, text + QUERY, max_new_tokens=6, eos_token_id=None, **settings
            )
            assert answered(star, context, **settings) == stock[0][0]
    sampled = [answered(star, context, **SAMPLED) for context in contexts]
    assert [answered(star, context, **SAMPLED) for context in contexts] == sampled
    # One text for each of the settings.
    assert prepared == [44, 44, 44, 44]


def test_answers_alone_and_rows_share_it(prepared: list[int]) -> None:
    star = engine("llama", block_size=16)
    context = star.encode(ids(40))
    for settings in ({}, SAMPLED, PENALTY):
        assert alone(star, context, **settings) == as_row(star, context, **settings)
    assert len(prepared) == 3


def test_other_settings_are_prepared_anew(
    prepared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    star = engine("llama", block_size=16)
    context = star.encode(ids(40))
    greedy, sampled = alone(star, context), alone(star, context, **SAMPLED)
    prepared.clear()
    assert alone(star, context, **(SAMPLED | {"temperature": 9.0})) != sampled
    # The model's own settings may be edited.
    monkeypatch.setattr(star.model.generation_config, "do_sample", True)
    monkeypatch.setattr(star.model.generation_config, "temperature", 9.0)
    assert alone(star, context, seed=1) not in (greedy, sampled)
    assert len(prepared) == 2
    with pytest.raises(InvalidInputError, match="temperature"):
        alone(star, context, **(SAMPLED | {"temperature": -1.0}))


@pytest.mark.parametrize("answered", [alone, as_row])
@pytest.mark.parametrize(
    "settings",
    [
        {"min_new_tokens": 3, "ignore_eos": False, "eos_token_id": 7},
        {"max_time": 100.0},
        {"logits_processor": LogitsProcessorList([Nothing()])},
    ],
    ids=["a length", "the time", "a user's"],
)
def test_what_may_remember_an_answer_serves_that_one_alone(
    prepared: list[int], answered: Callable[..., list[int]], settings: dict[str, Any]
) -> None:
    star = engine("llama", block_size=16)
    context = star.encode(ids(40))
    for _ in range(2):
        answered(star, context, **settings)
    assert len(prepared) == 2


class Touched(TorchDispatchMode):
    """Counts the elements that operations read and write, views and attention left out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, int]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if not op.is_view and "attention" not in str(op):
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.elements.append((str(op), sum(x.numel() for x in tensors)))
        return result


def touched(context_tokens: int, answered: Callable[..., Any], **settings: Any) -> Any:
    """Return what a second answer on a context of that length touches."""
    star = engine("llama", block_size=64)
    context = star.encode(ids(context_tokens))
    answered(star, context, **settings)
    with Touched() as counted:
        answered(star, context, **settings)
    return counted.elements


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("answered", [alone, as_row])
def test_a_further_answer_touches_nothing_of_the_context_but_in_attention(
    answered: Callable[..., Any], settings: dict[str, Any]
) -> None:
    """Each answer copied the ids of the whole context, and let transformers count them."""
    assert touched(448, answered, **settings) == touched(128, answered, **settings)


def test_a_penalty_reads_the_text_after_the_query_is_on_its_way() -> None:
    """transformers counted the positions of the whole text before each answer."""
    long, short = (touched(tokens, alone, **PENALTY) for tokens in (448, 128))
    query = next(at for at, (op, _) in enumerate(long) if "embedding" in op)
    assert long[:query] == short[:query]
    grows = {a[0] for a, b in zip(long, short, strict=True) if a != b}
    assert "aten.gather.default" in grows
    assert "aten.cumsum.default" not in grows
