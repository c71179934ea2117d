"""The logic of CUDA graphs: everything but the capture, which needs a GPU.

A stand-in for a graph runs the captured work at each replay, and kernels run in Triton's
interpreter. tests/gpu/test_fast_cuda.py tests real graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo

from star_attention import EncodedContext, StarLLM
from star_attention.generation import requests
from star_attention.hf.cache.decode import AnswerCache
from star_attention.hf.cache.graph import TailBuffers, parts
from star_attention.hf.execution import graphs
from star_attention.hf.execution.handle import ModelHandle
from star_attention.storage import tail
from tests.engines import bundled_tokenizer, engine, ids, tiny
from tests.recorders import CountingGraphs, few_runs, refuse, with_graphs

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)


SIZES: dict[str, Any] = dict(block_size=24, anchor_size=10, tokens_per_forward=48)
SHORT: dict[str, Any] = dict(max_new_tokens=2, ignore_eos=True)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, since the interpreter takes a millisecond for each."""
    few_runs(monkeypatch)
    monkeypatch.setattr(graphs, "BUCKETS", (1, 4, 8))
    monkeypatch.setattr(tail, "_INITIAL_CAPACITY", 1)


def pair(name: str) -> tuple[StarLLM, StarLLM, CountingGraphs]:
    """Make the same engine without graphs and with them."""
    plain, fast = engine(name, **SIZES), engine(name, **SIZES)
    return plain, fast, with_graphs(fast)


# A window with softcap, a window with sinks, compressed keys: each kernel and each of its rules.
QUICK = ("gemma2", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize(
    "name",
    [
        *QUICK,
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "llama",
                "qwen3",
                "gemma3",
                "gemma3n",
                "mistral",
                "deepseek_v2",
                "minicpm3",
                "longcat_flash",
            )
        ),
    ],
)
def test_families(name: str) -> None:
    """Windows, softcap, sinks, shared keys, MLA: tokens and logits are those without graphs."""
    plain, fast, counting = pair(name)
    settings: dict[str, Any] = dict(max_new_tokens=3, ignore_eos=True, return_logits=True)
    expected, reply = (
        star.generate(star.encode(ids(101)), ids(7, seed=2), **settings) for star in (plain, fast)
    )
    assert counting.recorder.replays == 3
    assert set(counting.captured) == {(1, 8, False, True, ()), (1, 1, False, True, ())}
    assert reply.token_ids == expected.token_ids
    torch.testing.assert_close(reply.logits, expected.logits, atol=2e-4, rtol=1e-4)


# The kernel over compressed keys in fp8 has fast tests of its own.
@pytest.mark.parametrize("name", ["llama", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_contexts_in_fp8_have_graphs_of_their_own(name: str) -> None:
    plain, fast = (engine(name, kv_dtype="fp8", **SIZES) for _ in range(2))
    counting = with_graphs(fast)
    settings: dict[str, Any] = dict(max_new_tokens=2, ignore_eos=True, return_logits=True)
    expected, reply = (
        star.generate(star.encode(ids(101)), ids(4), **settings) for star in (plain, fast)
    )
    assert reply.token_ids == expected.token_ids
    torch.testing.assert_close(reply.logits, expected.logits, atol=2e-4, rtol=1e-4)
    unquantized = engine(name, **SIZES).encode(ids(101))
    unquantized_reply = fast.generate(unquantized, ids(4), **settings)
    assert not torch.equal(unquantized_reply.logits, reply.logits)
    kinds = {(1, size, fp8, True, ()) for size in (4, 1) for fp8 in (True, False)}
    assert set(counting.captured) == kinds


def test_a_model_that_graphs_cannot_serve_runs_without() -> None:
    """Weights that expand compressed keys, and cannot be read as a matrix at the moment."""
    plain, fast, counting = pair("deepseek_v3")
    kwargs: dict[str, Any] = dict(max_new_tokens=2, ignore_eos=True)
    right = plain.generate(plain.encode(ids(101)), ids(7), **kwargs).token_ids
    context = fast.encode(ids(101))
    assert fast.generate(context, ids(7), **kwargs).token_ids == right
    assert (counting.recorder.captures, counting.recorder.replays) == (2, 2)
    attention: Any = tiny("deepseek_v3").model.layers[1].self_attn
    hook = attention.kv_b_proj.register_forward_hook(lambda *_: None)
    try:
        assert fast.generate(context, ids(7), **kwargs).token_ids == right
        assert counting.recorder.replays == 2
    finally:
        hook.remove()
    assert fast.generate(context, ids(7), **kwargs).token_ids == right
    assert counting.recorder.replays == 4


def test_a_long_query_of_compressed_keys_expands_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many tokens, expanding the context once is less work than a graph's forward."""
    monkeypatch.setattr(graphs, "BUCKETS", (1, 64))
    _, fast, counting = pair("deepseek_v3")
    assert fast.generate(fast.encode(ids(101)), ids(60), max_new_tokens=2, ignore_eos=True)
    assert set(counting.captured) == {(1, 1, False, True, ())}


def test_a_forward_that_cannot_be_captured_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast, counting = pair("llama")
    monkeypatch.setattr(counting.recorder, "record", refuse)
    expected, reply = (
        star.generate(star.encode(ids(101)), ids(7), max_new_tokens=4) for star in (plain, fast)
    )
    assert reply.token_ids == expected.token_ids
    assert set(counting.captured.values()) == {False}


def test_a_graph_that_compiled_layers_cannot_be_in_holds_plain_ones(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, fast, counting = pair("llama")
    stock, record = ModelHandle.logits, counting.recorder.record

    def logits(*args: Any, compiled_for: str | None = None, **kwargs: Any) -> Any:
        if compiled_for is not None:
            raise RuntimeError("no such code")
        return stock(*args, **kwargs)

    def warm_recorded(*args: Any, warm_up: Any, **kwargs: Any) -> Any:
        warm_up()
        return record(*args, warm_up=warm_up, **kwargs)

    monkeypatch.setattr(ModelHandle, "logits", logits)
    monkeypatch.setattr(counting.recorder, "record", warm_recorded)
    settings: dict[str, Any] = dict(max_new_tokens=4, ignore_eos=True)
    context = fast.encode(ids(101))
    with caplog.at_level("INFO", logger="star_attention"):
        replies = [fast.generate(context, [ids(7)] * rows, **settings) for rows in (1, 2)]
    expected = plain.generate(plain.encode(ids(101)), ids(7), **settings)
    assert [reply.token_ids for reply in (replies[0][0], *replies[1])] == [expected.token_ids] * 3
    assert {key[:2] for key, made in counting.captured.items() if made} == {(1, 8), (1, 1), (2, 8)}
    assert {key[0] for key, made in counting.of_rows.captured.items() if made} == {2}
    said = [record.message for record in caplog.records if "compiled layers" in record.message]
    assert said == [
        f"no compiled layers in the CUDA graph for {subject}, plain ones take longer: no such code"
        for subject in ("1 x 1 tokens", "2 rows")
    ]


def test_queries_of_all_lengths_share_compiled_layers() -> None:
    plain, fast = engine("llama", **SIZES), engine("llama", compile=True, **SIZES)
    counting = with_graphs(fast)
    counting.recorder.always_warms_up = True
    settings: dict[str, Any] = dict(max_new_tokens=1, ignore_eos=True, return_logits=True)
    context = fast.encode(ids(101))
    torch._dynamo.utils.counters.clear()
    for tokens in (3, 7):
        reply = fast.generate(context, ids(tokens), **settings)
        expected = plain.generate(plain.encode(ids(101)), ids(tokens), **settings)
        torch.testing.assert_close(reply.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert {key[:2] for key, made in counting.captured.items() if made} == {(1, 4), (1, 8)}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


ANSWERS: dict[str, Callable[[StarLLM, EncodedContext], Any]] = {
    # The tail, which has room for the query and a token, moves as it grows.
    "long": lambda star, context: star.generate(context, ids(5), max_new_tokens=3, ignore_eos=True),
    "rows": lambda star, context: star.generate(
        context, [ids(3), ids(2, seed=4), ids(4, seed=5)], **SHORT
    ),
    "no graph": lambda star, context: star.generate(context, ids(300), max_new_tokens=2),
    "sampled": lambda star, context: star.generate(
        context, ids(3), num_return_sequences=2, do_sample=True, seed=5, **SHORT
    ),
    "one token": lambda star, context: star.generate(context, ids(1), max_new_tokens=1),
    "penalties": lambda star, context: star.generate(
        context, ids(5), repetition_penalty=1.5, no_repeat_ngram_size=2, **SHORT
    ),
    "beams": lambda star, context: star.generate(context, ids(5), num_beams=2, **SHORT),
    "extended": lambda star, context: star.generate(
        star.extend(context, ids(30, seed=9)), ids(5), **SHORT
    ),
}
"""Ways that step token by token, and some that do not."""


@pytest.mark.parametrize(
    "ways", [["long", "rows", "no graph"], pytest.param(list(ANSWERS), marks=pytest.mark.slow)]
)
def test_every_way_to_answer(ways: list[str]) -> None:
    plain, fast, counting = pair("llama")
    contexts = [star.encode(ids(101)) for star in (plain, fast)]
    for way in ways:
        expected, found = (
            ANSWERS[way](star, context)
            for star, context in zip((plain, fast), contexts, strict=True)
        )
        assert tokens_of(found) == tokens_of(expected), way
    captures = counting.recorder.captures
    second = [
        star.generate(star.encode(ids(77, seed=8)), ids(5), **SHORT).token_ids
        for star in (plain, fast)
    ]
    assert second[0] == second[1]
    assert counting.recorder.captures == captures, "no graph is captured for a second context"


def tokens_of(replies: Any) -> list[list[int]]:
    return [each.token_ids for each in (replies if isinstance(replies, list) else [replies])]


@pytest.mark.slow
def test_streams_over_two_contexts_take_turns() -> None:
    """They share a graph, which loads each of them before its turn."""
    star = StarLLM(tiny("llama"), bundled_tokenizer(), **SIZES)
    counting = with_graphs(star)
    contexts = [star.encode(ids(101)), star.encode(ids(53, seed=3))]
    settings: dict[str, Any] = dict(max_new_tokens=4, ignore_eos=True)
    alone = [star.generate(context, ids(4), **settings).token_ids for context in contexts]
    streams = [star.stream(context, ids(4), **settings) for context in contexts]
    while any([next(stream, None) is not None for stream in streams]):
        pass
    assert [stream.result.token_ids for stream in streams] == alone
    assert (counting.recorder.captures, counting.recorder.replays) == (2, 16)


@pytest.mark.slow
def test_an_end_before_the_last_token_leaves_no_trace() -> None:
    """The forward of the next token has begun by the time the end is noticed."""
    plain, fast, _ = pair("llama")
    contexts = [star.encode(ids(101)) for star in (plain, fast)]
    free = plain.generate(contexts[0], ids(7), max_new_tokens=5, ignore_eos=True).token_ids
    ends = [
        star.generate(context, ids(7), max_new_tokens=5, eos_token_id=free[2]).token_ids
        for star, context in zip((plain, fast), contexts, strict=True)
    ]
    assert ends[0] == ends[1] == free[: free.index(free[2]) + 1]
    assert fast.generate(contexts[1], ids(7), max_new_tokens=5, ignore_eos=True).token_ids == free


def test_a_query_is_launched_in_parts_that_double() -> None:
    """Forbids a device that waits until all layers of a query are launched."""
    assert parts(1) == parts(2) == frozenset()
    assert parts(3) == {1}
    assert parts(32) == {1, 3, 7, 15}
    star = engine("llama", **SIZES)
    assert parts(len(star.runtime.handle.layer_shapes)) == {1}
    recorder = with_graphs(star).recorder
    context = star.encode(ids(40))
    star.generate(context, ids(3), max_new_tokens=1)
    assert (recorder.replays, recorder.interludes) == (1, 2), "in the warm-up, too"
    star.generate(context, ids(4), max_new_tokens=4, ignore_eos=True)
    assert (recorder.replays, recorder.interludes) == (5, 3), "steps are launched ahead"


def test_buffers_of_tails_are_parts_of_one_tensor() -> None:
    """Forbids an allocation for each layer's keys and values, which a first token waits for."""
    star = engine("llama", **SIZES)
    shapes = star.runtime.handle.layer_shapes
    request = requests.on(star.runtime, star.encode(ids(40)), queries=[ids(3)])
    cache = request.cache_for([0])
    buffers = TailBuffers(cache, shapes, star.device)
    buffers.reserve(1, 8)
    assert buffers.capacity(1) == 9
    used = [torch.full_like(k[:, :, :8], layer) for layer, (k, _) in enumerate(pairs(cache))]
    for each, tensor in zip(cache.tails, used, strict=True):
        each.append(tensor, tensor + 0.5)
    buffers.reserve(1, 4)
    assert buffers.capacity(1) == 18
    tensors = [tensor for pair in pairs(cache) for tensor in pair]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert len({tensor.data_ptr() for tensor in tensors}) == 2 * len(shapes)
    for each, tensor in zip(cache.tails, used, strict=True):
        assert all(map(torch.equal, each.pair(), (tensor, tensor + 0.5)))


def pairs(cache: AnswerCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [each.buffers() for each in cache.tails]
