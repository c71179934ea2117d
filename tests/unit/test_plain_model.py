"""The plain model stays plain, and threads on one model do not disturb each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from star_attention import StarLLM
from tests.engines import CONTEXT, as_stock, bundled_tokenizer, engine, ids, text_model, tiny
from tests.families import build

PROMPT = 60
QUERY = [5, 6, 7]


def plain_answer(model: PreTrainedModel) -> list[int]:
    """Answer a prompt by the stock model, greedily, in a batch with a second, padded row."""
    rows = torch.tensor([ids(PROMPT, seed=5), [0] * 20 + ids(PROMPT - 20, seed=6)])
    mask = torch.ones_like(rows)
    mask[1, :20] = 0
    return model.generate(rows, attention_mask=mask, max_new_tokens=6, do_sample=False).tolist()


def snapshot(model: PreTrainedModel) -> list[Any]:
    """List all that an engine might change: attributes, hooks, settings and buffers of modules."""
    rows: list[Any] = []
    for name, module in model.named_modules():
        state = {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        buffers = {key: value.tolist() for key, value in module.named_buffers(recurse=False)}
        config = getattr(module, "config", None)
        rows.append((name, type(module), sorted(vars(module)), state, hooks, buffers))
        rows.append(None if config is None else (config._attn_implementation, config.to_dict()))
    return rows


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "mistral",
        "gemma2",
        "gemma3_vlm",
        "gpt_oss",
        "deepseek_v3",
        "phi3_longrope",
        "llama_dynamic_ntk",
    ],
)
def test_the_plain_model_is_the_stock_one_before_between_and_after(name: str) -> None:
    # Two models, since dynamic NTK changes its own state.
    model, reference = build(name), build(name)
    with as_stock(reference), as_stock(model):
        expected = [plain_answer(reference) for _ in range(4)]
        assert plain_answer(model) == expected[0]
        star = StarLLM(model, bundled_tokenizer(), block_size=16, anchor_size=10)
        before = snapshot(model)
        context = star.encode(ids(CONTEXT))
        assert snapshot(model) == before
        assert plain_answer(model) == expected[1]
        between = snapshot(model)
        stream = star.stream(context, QUERY, max_new_tokens=20)
        next(stream)
        for settings in (
            {},
            dict(num_beams=2),
            dict(do_sample=True, seed=1),
            dict(prompt_lookup_num_tokens=2),
        ):
            star.generate(context, QUERY, max_new_tokens=4, **settings)
        star.extend(context, ids(20))
        assert snapshot(model) == between
        assert plain_answer(model) == expected[2]
        list(stream)
        assert plain_answer(model) == expected[3]
    assert type(model) is type(reference)


def fail_in(model: PreTrainedModel, nth: int) -> Callable[[], None]:
    """Make the `nth` attention layer that runs raise; return a function that undoes it."""
    calls = [0]

    def hook(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == nth:
            raise ArithmeticError("broken")

    handles = [
        module.register_forward_pre_hook(hook)
        for name, module in model.named_modules()
        if name.endswith(("self_attn", "attn"))
    ]
    return lambda: [handle.remove() for handle in handles] and None


@pytest.mark.parametrize("name", ["llama", "gemma3_vlm", "phi3_longrope", "deepseek_v3"])
@pytest.mark.parametrize("nth", [1, 2, 7])
def test_an_exception_inside_a_forward_leaves_no_trace(name: str, nth: int) -> None:
    model = tiny(name)
    star = StarLLM(model, block_size=16, anchor_size=16, tokens_per_forward=32)
    context, before = star.encode(ids(CONTEXT)), snapshot(model)
    expected = star.generate(context, QUERY, max_new_tokens=6).token_ids
    for call in (
        lambda: star.encode(ids(CONTEXT)),
        lambda: star.generate(context, QUERY, max_new_tokens=6),
        lambda: star.generate(context, QUERY, max_new_tokens=6, num_beams=2),
    ):
        undo = fail_in(model, nth)
        try:
            with pytest.raises(ArithmeticError, match="broken"):
                call()
        finally:
            undo()
        assert snapshot(model) == before
    assert star.generate(context, QUERY, max_new_tokens=6).token_ids == expected
    assert plain_answer(model) == plain_answer(build(name))


def test_a_forward_that_others_put_on_a_module_stays() -> None:
    """Forbids removing accelerate's, on modules that it moves between devices, with our own."""
    model = build("phi3_longrope")
    rotary = model.get_decoder().rotary_emb
    calls: list[int] = []
    stock = rotary.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return stock(*args, **kwargs)

    rotary.forward = counted
    star = StarLLM(model, block_size=16)
    star.generate(star.encode(ids(CONTEXT)), QUERY, max_new_tokens=2)
    assert rotary.forward is counted
    plain_answer(model)
    assert calls


def test_inside_a_forward_our_function_is_named_and_outside_it_is_not() -> None:
    """Without this, the tests above would prove nothing."""
    model = tiny("llama")
    names: list[str] = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args: names.append(module.config._attn_implementation)
    )
    try:
        engine("llama", block_size=16).encode(ids(20))
        model(torch.tensor([ids(5)]))
    finally:
        handle.remove()
    ours, stock = names[0], names[-1]
    assert ours.startswith("star_attention")
    assert ours in ALL_ATTENTION_FUNCTIONS
    assert stock == model.config._attn_implementation == "sdpa"


ITERATIONS = 25


def repeat(work: Callable[[], Any], barrier: threading.Barrier) -> list[Any]:
    barrier.wait()
    return [work() for _ in range(ITERATIONS)]


def run_at_once(*works: Callable[[], Any]) -> list[list[Any]]:
    """Run all at once, many times over; return the results of each."""
    barrier = threading.Barrier(len(works))
    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(repeat, work, barrier) for work in works]
        return [future.result() for future in futures]


@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("llama", "deepseek_v3", "phi3_longrope")
        ),
    ],
)
def test_threads_on_one_model_get_the_answers_of_one_thread(name: str) -> None:
    """Two engines and the plain model, all at once, answer as each does alone."""
    model = tiny(name)
    first = StarLLM(model, block_size=16, anchor_size=16, tokens_per_forward=32)
    second = StarLLM(model, block_size=24, anchor_size=8)
    shared = first.encode(ids(CONTEXT))

    def star() -> list[int]:
        return first.generate(shared, QUERY, max_new_tokens=5).token_ids

    def sampled() -> list[int]:
        return first.generate(shared, QUERY, max_new_tokens=5, do_sample=True, seed=3).token_ids

    def second_engine() -> list[int]:
        context = second.encode(ids(70, seed=9))
        return second.generate(context, QUERY, max_new_tokens=5).token_ids

    def beams() -> list[int]:
        return second.generate(second_shared, QUERY, max_new_tokens=4, num_beams=2).token_ids

    def plain() -> list[int]:
        return plain_answer(model)

    second_shared = second.encode(ids(40))
    works = (star, sampled, second_engine, beams, plain)
    alone = [work() for work in works]
    for results, expected in zip(run_at_once(*works), alone, strict=True):
        assert all(result == expected for result in results)


def test_threads_may_share_one_engine_and_its_tokenizer() -> None:
    star = StarLLM(text_model(), bundled_tokenizer(), block_size=16, anchor_size=16)
    text = "Stars come out one after another.\n" * 4

    def answer(question: str) -> Callable[[], str]:
        return lambda: star.generate(star.encode(text), question, max_new_tokens=4, stop="zzz").text

    def stream() -> str:
        return "".join(star.stream(star.encode(text), "How?", max_new_tokens=4))

    works = (answer("What?"), answer("Where?"), stream)
    alone = [work() for work in works]
    for results, expected in zip(run_at_once(*works), alone, strict=True):
        assert all(result == expected for result in results)
