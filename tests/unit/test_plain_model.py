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
    """The stock model's own greedy answer to a prompt, with a second, padded row beside it."""
    rows = torch.tensor([ids(PROMPT, seed=5), [0] * 20 + ids(PROMPT - 20, seed=6)])
    mask = torch.ones_like(rows)
    mask[1, :20] = 0
    return model.generate(rows, attention_mask=mask, max_new_tokens=6, do_sample=False).tolist()


def everything(model: PreTrainedModel) -> list[Any]:
    """All that an engine might leave behind: attributes, hooks, settings and buffers of every module."""
    found: list[Any] = []
    for name, module in model.named_modules():
        state = {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        buffers = {key: value.tolist() for key, value in module.named_buffers(recurse=False)}
        config = getattr(module, "config", None)
        found.append((name, type(module), sorted(vars(module)), state, hooks, buffers))
        found.append(None if config is None else (config._attn_implementation, config.to_dict()))
    return found


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
    model, reference = build(name), build(name)  # (dynamic NTK changes its own state as it goes)
    with as_stock(reference), as_stock(model):
        expected = [plain_answer(reference) for _ in range(4)]
        assert plain_answer(model) == expected[0]
        star = StarLLM(model, bundled_tokenizer(), block_size=16, anchor_size=10)
        before = everything(model)
        context = star.encode(ids(CONTEXT))
        assert everything(model) == before
        assert plain_answer(model) == expected[1]
        between = everything(model)
        stream = star.stream(context, QUERY, max_new_tokens=20)
        next(stream)
        for words in (
            {},
            dict(num_beams=2),
            dict(do_sample=True, seed=1),
            dict(prompt_lookup_num_tokens=2),
        ):
            star.generate(context, QUERY, max_new_tokens=4, **words)
        star.extend(context, ids(20))
        assert everything(model) == between
        assert plain_answer(model) == expected[2]
        list(stream)
        assert plain_answer(model) == expected[3]
    assert type(model) is type(reference)


def fail_in(model: PreTrainedModel, when: int) -> Callable[[], None]:
    """Make the `when`-th attention layer that runs raise; returns what undoes it."""
    calls = [0]

    def hook(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == when:
            raise ArithmeticError("broken")

    handles = [
        m.register_forward_pre_hook(hook)
        for n, m in model.named_modules()
        if n.endswith(("self_attn", "attn"))
    ]
    return lambda: [handle.remove() for handle in handles] and None


@pytest.mark.parametrize("name", ["llama", "gemma3_vlm", "phi3_longrope", "deepseek_v3"])
@pytest.mark.parametrize("when", [1, 2, 7])
def test_an_exception_inside_a_forward_leaves_nothing_behind(name: str, when: int) -> None:
    model = tiny(name)
    star = StarLLM(model, block_size=16, anchor_size=16, tokens_per_forward=32)
    context, before = star.encode(ids(CONTEXT)), everything(model)
    expected = star.generate(context, QUERY, max_new_tokens=6).token_ids
    for call in (
        lambda: star.encode(ids(CONTEXT)),
        lambda: star.generate(context, QUERY, max_new_tokens=6),
        lambda: star.generate(context, QUERY, max_new_tokens=6, num_beams=2),
    ):
        undo = fail_in(model, when)
        try:
            with pytest.raises(ArithmeticError, match="broken"):
                call()
        finally:
            undo()
        assert everything(model) == before
    assert star.generate(context, QUERY, max_new_tokens=6).token_ids == expected
    assert plain_answer(model) == plain_answer(build(name))


def test_a_forward_that_someone_put_on_a_module_stays_there() -> None:
    """accelerate does so to modules that it moves between devices; ours used to take it off with its own."""
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
    """(Otherwise the tests above would have nothing to see.)"""
    model = tiny("llama")
    seen: list[str] = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args: seen.append(module.config._attn_implementation)
    )
    try:
        engine("llama", block_size=16).encode(ids(20))
        model(torch.tensor([ids(5)]))
    finally:
        handle.remove()
    ours, stock = seen[0], seen[-1]
    assert ours.startswith("star_attention")
    assert ours in ALL_ATTENTION_FUNCTIONS
    assert stock == model.config._attn_implementation == "sdpa"


ITERATIONS = 25


def repeat(work: Callable[[], Any], barrier: threading.Barrier) -> list[Any]:
    barrier.wait()
    return [work() for _ in range(ITERATIONS)]


def together(*works: Callable[[], Any]) -> list[list[Any]]:
    """What each work gives when all run at once, many times over."""
    barrier = threading.Barrier(len(works))
    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(repeat, work, barrier) for work in works]
        return [future.result() for future in futures]


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3_longrope", "deepseek_v3"])
def test_threads_on_one_model_get_the_answers_of_one_thread(name: str) -> None:
    """Two engines that encode and answer, and the plain model, all at once: each as alone."""
    model = tiny(name)
    first = StarLLM(model, block_size=16, anchor_size=16, tokens_per_forward=32)
    second = StarLLM(model, block_size=24, anchor_size=8)
    shared = first.encode(ids(CONTEXT))

    def star() -> list[int]:
        return first.generate(shared, QUERY, max_new_tokens=5).token_ids

    def sampled() -> list[int]:
        return first.generate(shared, QUERY, max_new_tokens=5, do_sample=True, seed=3).token_ids

    def other() -> list[int]:
        context = second.encode(ids(70, seed=9))
        return second.generate(context, QUERY, max_new_tokens=5).token_ids

    def beams() -> list[int]:
        return second.generate(shared_2, QUERY, max_new_tokens=4, num_beams=2).token_ids

    def plain() -> list[int]:
        return plain_answer(model)

    shared_2 = second.encode(ids(40))
    works = (star, sampled, other, beams, plain)
    alone = [work() for work in works]
    for results, expected in zip(together(*works), alone, strict=True):
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
    for results, expected in zip(together(*works), alone, strict=True):
        assert all(result == expected for result in results)
