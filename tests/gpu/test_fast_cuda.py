"""Compiled layers, CUDA graphs and our kernels, against the oracle and against plain forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from star_attention import StarLLM, phase1
from star_attention.attention.attend import Rule
from star_attention.attention.state import merge
from star_attention.errors import OutOfMemoryError
from star_attention.hf.cache import graph as graph_cache
from tests.answer_oracle import (
    CASES,
    SHARDED_CASES,
    SHARDS,
    expected,
    real_rows,
    setup,
    tables,
)
from tests.families import FIRST_TOKEN, LAST_TOKEN, build
from tests.model_oracle import oracle_forward, oracle_generate

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parents[2] / "models" / "needle-17m"
TEXT = (
    "The secret number for otter is 12345.\n" + "Rain falls on the hill and the dog sleeps.\n" * 600
)


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


QUESTION = chat("What is the secret number for otter?")


# ---------------------------------------------------------------------- kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_attention_of_phase_2(name: str, dtype: torch.dtype) -> None:
    """Within twice the error of a plain implementation in that precision."""
    from star_attention.attention.kernels import triton_answer

    torch.manual_seed(0)
    case = CASES[name]
    tensors = setup(case, dtype, "cuda")
    kv_tables, _addressed = tables(tensors)
    triton_answer.append(tensors.k_RGQD, tensors.v_RGQD, tables=kv_tables, layer=1)
    assert torch.equal(tensors.tail_k_RGCD[:, :, case.T : case.T + case.Q], tensors.k_RGQD)
    rule = Rule(scale=0.2, window=case.window, softcap=case.softcap, dtype=dtype)
    out, lse = triton_answer.attend(
        tensors.q_RQHD, case.G, tables=kv_tables, layer=1, rule=rule, fp8=case.fp8
    )
    right, real = expected(tensors, 0.2), real_rows(case)
    # q, k, v and the result are rounded once each.
    unit = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert (out.double().cpu() - right.out_BQHD)[real].norm() <= 2 * unit * right.out_BQHD[
        real
    ].norm()
    torch.testing.assert_close(lse.double().cpu()[real], right.lse_BQH[real], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("name", SHARDED_CASES)
def test_attention_of_phase_2_over_shards(name: str, shards: str, dtype: torch.dtype) -> None:
    """The merged states of all ranks are those of the whole context."""
    from star_attention.attention.kernels import triton_answer

    torch.manual_seed(0)
    case = SHARDED_CASES[name]
    tensors, states = setup(case, dtype, "cuda"), []
    for rank, segments in enumerate(SHARDS[shards], start=1):
        kv_tables, _addressed = tables(tensors, segments, holds_tail=rank == len(SHARDS[shards]))
        triton_answer.append(tensors.k_RGQD, tensors.v_RGQD, tables=kv_tables, layer=1)
        rule = Rule(scale=0.2, window=case.window)
        states.append(
            triton_answer.attend(
                tensors.q_RQHD, case.G, tables=kv_tables, layer=1, rule=rule, fp8=case.fp8
            )
        )
    torch.cuda.synchronize()
    assert not any(tensor.isnan().any() for state in states for tensor in state)
    out, lse = merge(states)
    right, real = expected(tensors, 0.2), real_rows(case)
    unit = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    error = (out.double().cpu() - right.out_BQHD)[real].norm()
    assert error <= 2 * unit * right.out_BQHD[real].norm()
    torch.testing.assert_close(lse.double().cpu()[real], right.lse_BQH[real], atol=1e-3, rtol=1e-4)


# ---------------------------------------------------------------------- the bundled model


@pytest.fixture(scope="module")
def engines() -> dict[bool, StarLLM]:
    """Engines in float32, with compiled layers and graphs and without."""
    sizes: dict[str, Any] = dict(dtype="float32", block_size=2048, tokens_per_forward=4096)
    return {fast: StarLLM.from_pretrained(MODEL, compile=fast, **sizes) for fast in (True, False)}


def test_tokens_are_the_same_as_by_plain_forwards(engines: dict[bool, StarLLM]) -> None:
    answers = []
    for star in engines.values():
        context = star.encode(chat(TEXT))
        assert len(context) > 8192, "several whole forwards, and a remainder"
        settings: dict[str, Any] = dict(ignore_eos=True, max_new_tokens=100)
        answers.append(
            [
                star.generate(context, QUESTION, **settings).token_ids,
                [
                    reply.token_ids
                    for reply in star.generate(
                        context, [QUESTION, chat("What does the dog do?")], **settings
                    )
                ],
                [
                    reply.token_ids
                    for reply in star.generate(
                        context, QUESTION, num_return_sequences=2, seed=3, do_sample=True
                    )
                ],
                # A question longer than any bucket.
                star.generate(context, chat("What? " * 150), max_new_tokens=5).token_ids,
                star.generate(
                    context, QUESTION, repetition_penalty=1.3, no_repeat_ngram_size=2
                ).token_ids,
                star.generate(context, QUESTION, stop="3").text,
                star.generate(
                    star.extend(context, " The end."), QUESTION, max_new_tokens=5
                ).token_ids,
            ]
        )
    assert answers[0] == answers[1]
    assert "12345" in engines[True].tokenizer.decode(answers[0][0])
    graphs = engines[True].runtime.handle.graphs
    assert graphs is not None
    captured = {key[:2] for key, captured in graphs.captured.items() if captured}
    assert {(1, 1), (1, 16), (2, 16)} <= captured
    assert graphs.of_rows.captured, "no step of several rows was captured"
    assert all(graphs.of_rows.captured.values())


@pytest.mark.parametrize(
    "setting", [dict(kv_dtype="fp8"), dict(kv_device="cpu"), dict(kv_dtype="fp8", kv_device="cpu")]
)
def test_contexts_stored_in_other_formats(setting: dict[str, str]) -> None:
    """Graphs read fp8 and host memory; answers are the same as by plain forwards."""
    sizes: dict[str, Any] = dict(dtype="float32", block_size=2048, tokens_per_forward=4096)
    answers = []
    for fast in (True, False):
        star = StarLLM.from_pretrained(MODEL, compile=fast, **sizes, **setting)
        context = star.encode(chat(TEXT))
        devices = {tensor.device.type for layer in context.kv.layers for tensor in layer.stored()}
        assert devices == {"cpu" if "kv_device" in setting else "cuda"}
        answers.append(
            star.generate(context, QUESTION, max_new_tokens=40, ignore_eos=True).token_ids
        )
        assert "12345" in star.tokenizer.decode(answers[-1])
        if fast:
            assert star.runtime.handle.graphs.captured
    assert answers[0] == answers[1]


def test_nothing_is_compiled_or_captured_again(engines: dict[bool, StarLLM]) -> None:
    star = engines[True]

    def ask(text: str, question: str) -> list[int]:
        return star.generate(
            star.encode(chat(text)), chat(question), max_new_tokens=20, ignore_eos=True
        ).token_ids

    ask(TEXT, "What does the dog do?")
    assert star.runtime.handle.graphs is not None
    before = (
        len(star.runtime.handle.graphs.captured),
        torch._dynamo.utils.counters["stats"]["unique_graphs"],
    )
    ask(TEXT + "It snows.\n" * 200, "Is it cold on the hill?")
    ask("A cat. " * 3000, "Who?")
    assert (
        len(star.runtime.handle.graphs.captured),
        torch._dynamo.utils.counters["stats"]["unique_graphs"],
    ) == before


def test_streams_over_two_contexts_take_turns(engines: dict[bool, StarLLM]) -> None:
    """They share graphs; each has its own keys, tail and length."""
    star = engines[True]
    contexts = [star.encode(chat(text)) for text in (TEXT, "The sea is blue. " * 900)]
    settings: dict[str, Any] = dict(max_new_tokens=90, ignore_eos=True)
    alone = [star.generate(context, QUESTION, **settings).token_ids for context in contexts]
    streams = [star.stream(context, QUESTION, **settings) for context in contexts]
    while any([next(stream, None) is not None for stream in streams]):
        pass
    assert [stream.result.token_ids for stream in streams] == alone


class Forced(LogitsProcessor):  # type: ignore[misc]
    """Forces the tokens of an answer."""

    def __init__(self, tokens: Tensor, prompt_tokens: int) -> None:
        self.tokens, self.prompt_tokens = tokens, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.tokens[input_ids.shape[1] - self.prompt_tokens]] = 0.0
        return forced


def test_bf16_logits_over_256_steps_are_within_twice_a_plain_implementation() -> None:
    half = StarLLM.from_pretrained(
        MODEL, block_size=2048, tokens_per_forward=4096, dtype="bfloat16", compile=True
    )
    exact = StarLLM.from_pretrained(MODEL, dtype="float32", compile=False)
    torch.manual_seed(0)
    context, query, steps = 8192, 8, 256
    ids = torch.randint(5, 4096, (context + query + steps,))
    force = Forced(ids[context + query :], context + query)
    reply = half.generate(
        half.encode(ids[:context]),
        ids[context : context + query],
        max_new_tokens=steps,
        ignore_eos=True,
        return_logits=True,
        logits_processor=[force],
    )
    assert reply.token_ids == ids[context + query :].tolist()
    rows = slice(context + query - 1, context + query - 1 + steps)
    sizes = dict(context_len=context, block_size=2048, anchor_size=2048)
    plain = oracle_forward(half.model, ids[None].cuda(), **sizes).logits_BLV[0, rows].float()
    oracle = oracle_forward(exact.model, ids[None].cuda(), **sizes).logits_BLV[0, rows].float()
    ours, plain_error = (
        (reply.logits.cuda() - oracle).norm() / oracle.norm(),
        (plain - oracle).norm() / oracle.norm(),
    )
    print(f"relative error bf16: ours {ours:.4f}, plain {plain_error:.4f}")
    assert ours <= 2 * plain_error


def test_out_of_memory_frees_its_memory_and_names_the_size_to_lower() -> None:
    """Both phases free it, with a memory limit on the process; smaller requests work afterwards."""
    star = StarLLM.from_pretrained(
        MODEL, block_size=2048, tokens_per_forward=4096, dtype="bfloat16", device="cuda"
    )
    ids = torch.randint(5, 4096, (65_000,))
    context = star.encode(ids[:16384])
    answer = star.generate(context, [5, 6, 7], max_new_tokens=5).token_ids
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free = 200 * 2**20
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + free) / total)
    before = torch.cuda.memory_allocated()
    try:
        for _ in range(2):
            with pytest.raises(
                OutOfMemoryError,
                match=r"out of memory in phase 1 after .* lower tokens_per_forward",
            ):
                star.encode(ids)
            assert torch.cuda.memory_allocated() - before < 2**24
            with pytest.raises(
                OutOfMemoryError, match="out of memory in phase 2 with 4,000 answers at once"
            ):
                star.generate(
                    context,
                    [[5 + n, 6, 7] for n in range(4000)],
                    max_new_tokens=400,
                    ignore_eos=True,
                )
            assert torch.cuda.memory_allocated() - before < 2**24
            assert star.generate(context, [5, 6, 7], max_new_tokens=5).token_ids == answer
            assert (
                star.generate(star.encode(ids[:16384]), [5, 6, 7], max_new_tokens=5).token_ids
                == answer
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# ---------------------------------------------------------------------- families


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss", "gemma3n", "qwen3_moe"])
def test_families_against_the_mask_oracle(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled as for long contexts; windows, softcap, sinks, layers that share keys."""
    monkeypatch.setattr(phase1, "_WORTH_COMPILING", 1)
    model = build(family).to("cuda")
    star = StarLLM(model, block_size=24, anchor_size=10, tokens_per_forward=48, compile=True)
    torch.manual_seed(1)
    ids = torch.randint(FIRST_TOKEN, LAST_TOKEN + 1, (1, 108), device="cuda")
    sizes = dict(context_len=101, block_size=24, anchor_size=10, rope_length=None)
    reply = star.generate(
        star.encode(ids[0, :101]),
        ids[0, 101:],
        max_new_tokens=5,
        return_logits=True,
        ignore_eos=True,
    )
    tokens, logits = oracle_generate(model, ids, steps=5, **sizes)
    scale = max(1.0, logits.abs().max().item())
    assert (reply.logits - logits[0].cpu()).abs().max().item() <= 2e-4 * scale
    assert reply.token_ids == tokens[0].tolist()
    print(
        family,
        star.runtime.handle.graphs and star.runtime.handle.graphs.captured,
    )


def test_a_query_in_parts_is_the_query_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts hold the same kernels in the same order, in the same memory."""
    launches: list[int] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        launches.append(id(graph))
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    few: dict[str, Any] = dict(max_new_tokens=20, ignore_eos=True, return_logits=True)
    replies, counts = [], []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(graph_cache, "parts", lambda layers: frozenset())
        star = StarLLM.from_pretrained(MODEL, compile=True, dtype="float32", block_size=512)
        context = star.encode(chat(TEXT))
        # A second answer begins where the first one's graphs have worked.
        replies.append([star.generate(context, QUESTION, **few) for _ in range(2)])
        launches.clear()
        star.generate(context, QUESTION, max_new_tokens=1)
        counts.append(len(launches))
    assert counts == [4, 1], "ten layers are parted at 1, 3 and 7"
    for part, one in zip(*replies, strict=True):
        assert part.token_ids == one.token_ids
        assert torch.equal(part.logits, one.logits)


def test_weights_that_move(caplog: pytest.LogCaptureFixture) -> None:
    """All graphs are void then, and others are captured in their memory, by compiled layers."""
    star = StarLLM.from_pretrained(
        MODEL, dtype="float32", device="cuda", block_size=2048, compile=True
    )
    context = star.encode(chat(TEXT))
    before = star.generate(context, QUESTION, max_new_tokens=8)
    weight = star.model.lm_head.weight
    weight.data = weight.data.clone()
    with caplog.at_level("INFO", logger="star_attention"):
        after = star.generate(context, QUESTION, max_new_tokens=8)
    assert after.token_ids == before.token_ids
    graphs = star.runtime.handle.graphs
    assert graphs is not None
    assert all(graphs.captured.values())
    assert "no compiled layers" not in caplog.text


def test_a_failed_capture_leaves_torch_as_it_was(engines: dict[bool, StarLLM]) -> None:
    """Random numbers, the current stream and later captures still work."""
    star = engines[True]
    graphs = star.runtime.handle.graphs
    assert graphs is not None
    stream, number = torch.cuda.current_stream(), torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError):
        graphs.recorder.record(
            lambda: number.item() and None, warm_up=lambda: None, comm=star.runtime.comm
        )
    assert torch.cuda.current_stream() == stream
    assert torch.rand(2, device="cuda").shape == (2,)
    results: list[Tensor] = []
    replay = graphs.recorder.record(
        lambda: results.append(number + 1), warm_up=lambda: None, comm=star.runtime.comm
    )
    replay()
    assert results[0].item() == 2
    torch.cuda.empty_cache()
