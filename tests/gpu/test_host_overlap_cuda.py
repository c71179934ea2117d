"""Contexts in host memory, whose layers travel while a GPU computes: the same tokens, less memory.

The model is small and in fp32, so that a layer that is read too early or too late shows in tokens.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from star_attention import EncodedContext, StarLLM
from star_attention.planning.residency import BUFFERS
from star_attention.storage.host import pinned
from star_attention.storage.host.feed import feeds_of
from star_attention.storage.host.streams import TO_DEVICE, copy_stream
from star_attention.tools.machine import measure_link

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parents[2] / "models" / "needle-17m"
TEXT = "The secret number for otter is 42.\n" + "Rain falls on the hill and the dog sleeps.\n" * 900
OTHER = "The secret number for badger is 17.\n" + "Snow lies on the roof and the cat waits.\n" * 500
QUERY = "What is the secret number for otter? "
LONG: dict[str, Any] = dict(max_new_tokens=200, ignore_eos=True)
SIZES: dict[str, Any] = dict(dtype="float32", block_size=2048, tokens_per_forward=4096)


@pytest.fixture(scope="module", autouse=True)
def exact() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="module", params=[None, "fp8"])
def pair(request: pytest.FixtureRequest) -> tuple[StarLLM, StarLLM]:
    """An engine with contexts on the GPU, and one with contexts in host memory; both eager."""
    near = StarLLM.from_pretrained(MODEL, compile=False, kv_dtype=request.param, **SIZES)
    return near, near.with_config(kv_device="cpu")


def tensors(context: EncodedContext) -> list[torch.Tensor]:
    return [tensor for layer in context.kv.layers for tensor in layer.stored()]


def test_what_is_written_back_is_what_was_computed(pair: tuple[StarLLM, StarLLM]) -> None:
    near, far = pair
    on_gpu, on_host = near.encode(TEXT), far.encode(TEXT)
    for expected, actual in zip(tensors(on_gpu), tensors(on_host), strict=True):
        assert actual.is_pinned()
        # As bytes: fp8 has no comparison on every device.
        assert torch.equal(actual.view(torch.uint8), expected.cpu().view(torch.uint8))


def test_compiled_layers_write_back_what_they_computed() -> None:
    """Their memory serves other tensors while the link is still busy with what it held."""
    sizes = SIZES | dict(block_size=1024)
    near = StarLLM.from_pretrained(MODEL, compile=True, **sizes)
    far = near.with_config(kv_device="cpu")
    on_gpu, on_host = near.encode(TEXT), far.encode(TEXT)
    for expected, actual in zip(tensors(on_gpu), tensors(on_host), strict=True):
        assert torch.equal(actual, expected.cpu())


def test_a_long_answer_is_the_same(pair: tuple[StarLLM, StarLLM]) -> None:
    near, far = pair
    right = near.generate(near.encode(TEXT), QUERY, **LONG, return_logits=True)
    reply = far.generate(far.encode(TEXT), QUERY, **LONG, return_logits=True)
    assert reply.token_ids == right.token_ids
    torch.testing.assert_close(reply.logits, right.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, dict(kv_dtype="fp8"), dict(kv_resident=0.3)], ids=str)
def test_graphs_answer_as_with_the_context_on_the_gpu(settings: dict[str, Any]) -> None:
    """The same kernels read the same bytes, in whichever buffer, so that logits are the same."""
    far = StarLLM.from_pretrained(MODEL, compile=True, kv_device="cpu", **SIZES, **settings)
    near = far.with_config(kv_device=None, kv_resident=0.0)
    graphs = far.runtime.handle.graphs
    assert graphs is not None
    replies, rows = [], []
    for star in (near, far):
        contexts = [star.encode(text) for text in (TEXT, OTHER)]
        # Twice, and in turn: the second time a layer begins at another place.
        few: dict[str, Any] = dict(max_new_tokens=60, ignore_eos=True, return_logits=True)
        replies.append([star.generate(contexts[at], QUERY, **few) for at in (0, 1, 0)])
        with star.batch() as batch:
            added = [
                batch.add(contexts[number % 2], f"{number}. {QUERY}", max_new_tokens=40 + number)
                for number in range(5)
            ]
            rows.append([row.result().token_ids for row in added])
    for right, reply in zip(*replies, strict=True):
        assert reply.token_ids == right.token_ids
        assert torch.equal(reply.logits, right.logits)
    assert rows[0] == rows[1]
    assert all(graphs.captured.values()), "a forward was not captured"
    assert all(graphs.of_rows.captured.values()), "a step of rows was not captured"


@pytest.mark.parametrize("share", [0.3, 0.75, 1.0])
def test_a_share_of_the_layers_stays(share: float) -> None:
    star = StarLLM.from_pretrained(
        MODEL, compile=False, kv_device="cpu", kv_resident=share, **SIZES
    )
    context = star.encode(TEXT)
    kept = sum(layer.stored()[0].is_cuda for layer in context.kv.layers)
    assert kept == int(len(context.kv.layers) * share)
    near = star.with_config(kv_device=None, kv_resident=0.0)
    right = near.generate(near.encode(TEXT), QUERY, **LONG).token_ids
    assert star.generate(context, QUERY, **LONG).token_ids == right


def test_two_contexts_in_turn(pair: tuple[StarLLM, StarLLM]) -> None:
    """Streams step by step in turn, each on its own context, and a third on the first one's."""
    answers = []
    for star in pair:
        contexts = [star.encode(text) for text in (TEXT, OTHER)]
        streams = [star.stream(context, QUERY, **LONG) for context in (*contexts, contexts[0])]
        pieces: list[list[str]] = [[] for _ in streams]
        left = set(range(len(streams)))
        while left:
            for index in sorted(left):
                piece = next(streams[index], None)
                if piece is None:
                    left.discard(index)
                else:
                    pieces[index].append(piece)
        answers.append(["".join(parts) for parts in pieces])
    assert answers[0] == answers[1]
    assert answers[0][0] == answers[0][2]


def test_rows_of_several_contexts(pair: tuple[StarLLM, StarLLM]) -> None:
    answers = []
    for star in pair:
        contexts = [star.encode(text) for text in (TEXT, OTHER)]
        with star.batch() as batch:
            rows = [
                batch.add(contexts[number % 2], f"{number}. {QUERY}", max_new_tokens=40 + number)
                for number in range(5)
            ]
            answers.append([row.result().token_ids for row in rows])
    assert answers[0] == answers[1]


def test_everything_else_works(pair: tuple[StarLLM, StarLLM], tmp_path: Path) -> None:
    """Files, longer contexts, conversations, beams, several answers and second looks."""
    answers = []
    for number, star in enumerate(pair):
        context = star.encode(TEXT)
        context.save(tmp_path / f"{number}.star")
        loaded, longer = star.load_context(tmp_path / f"{number}.star"), star.extend(context, OTHER)
        if number:
            assert all(t.is_pinned() for own in (loaded, longer) for t in tensors(own))
        few: dict[str, Any] = dict(max_new_tokens=20, ignore_eos=True)
        first = star.generate(context, QUERY, **few, keep=True)
        answers.append(
            [
                star.generate(loaded, QUERY, **few).token_ids,
                star.generate(longer, QUERY, **few).token_ids,
                first.token_ids,
                star.generate(first, "And the dog?", **few).token_ids,
                star.generate(context, QUERY, **few, num_beams=2).token_ids,
                *[r.token_ids for r in star.generate(context, [QUERY, "Who?"], **few)],
                star.generate(context, QUERY, **few, second_look=0.1).token_ids,
            ]
        )
    assert answers[0] == answers[1]


def test_pageable_memory_serves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a page that may be pinned, answers are slower and the same, and a warning says so."""

    refusing = SimpleNamespace(cudaHostRegister=lambda address, nbytes, flags: 2)

    near = StarLLM.from_pretrained(MODEL, compile=False, **SIZES)
    right = near.generate(near.encode(TEXT), QUERY, **LONG).token_ids
    far = near.with_config(kv_device="cpu")
    monkeypatch.setattr(pinned, "_cudart", lambda: refusing)
    with pytest.warns(UserWarning, match="bytes of host memory cannot be pinned"):
        context = far.encode(TEXT)
    assert not any(tensor.is_pinned() for tensor in tensors(context))
    assert far.generate(context, QUERY, **LONG).token_ids == right


def test_an_error_of_pinning_is_not_reported_again() -> None:
    """CUDA keeps an error for whatever is launched next: a real one, of memory pinned before."""
    device = torch.device("cuda", 0)
    region = pinned._region(2**20)
    flat = torch.frombuffer(region, dtype=torch.uint8)
    assert int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), 2**20, 0)) == 0
    with pytest.warns(UserWarning, match="CUDA error 712"):
        pinned._pin(region, flat.data_ptr(), device)
    assert not region.address
    assert torch.ones(3, device=device).sum().item() == 3
    assert int(torch.cuda.cudart().cudaHostUnregister(flat.data_ptr())) == 0


def test_memory_is_freed_with_its_owner() -> None:
    """Buffers on the GPU go with the answer, pinned memory with the context."""
    star = StarLLM.from_pretrained(MODEL, compile=False, kv_device="cpu", **SIZES)
    context = star.encode(TEXT)
    star.generate(context, QUERY, max_new_tokens=2)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    layer = max(sum(t.nbytes for t in own.stored()) for own in context.kv.layers)
    feeds = feeds_of(context.kv)
    assert len(feeds) == 1
    buffers = torch.cuda.memory_allocated() - before
    assert BUFFERS * layer <= buffers <= BUFFERS * (layer + 4096)
    del feeds
    assert torch.cuda.memory_allocated() == before
    tensor = context.kv.layers[0].stored()[0]
    address, part = tensor.data_ptr(), tensor[0, 0]
    assert part.is_pinned()
    del tensor, part, context
    gc.collect()
    maps = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    assert not any(int(start, 16) <= address < int(stop, 16) for start, stop in maps)
    assert star.generate(star.encode(OTHER), QUERY, max_new_tokens=3).token_ids


@pytest.mark.parametrize(("compile", "most"), [(False, 1.3), (True, 1.1)])
def test_copies_run_while_the_gpu_computes(compile: bool, most: float) -> None:
    """A token takes little more than its bytes need over the link, with attention as work.

    Twelve wide layers and 32K tokens: the link needs far longer than the GPU. Other tests may use
    both meanwhile, so that the best of some answers counts, each against the link at that time.
    """
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2048,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_hidden_layers=12,
        max_position_embeddings=2**16,
    )
    model = LlamaForCausalLM(config).eval().to("cuda", torch.bfloat16)
    star = StarLLM(model, compile=compile, kv_device="cpu", block_size=8192)
    ids, device = torch.randint(5, 500, (32768,)), torch.device("cuda", 0)
    context = star.encode(ids)

    def seconds(tokens: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        star.generate(context, ids[:16], max_new_tokens=tokens, ignore_eos=True)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def over_link() -> float:
        # The first token takes a forward of its own, with buffers that are still empty.
        token_s = (seconds(21) - seconds(1)) / 20
        link = measure_link(device)
        assert link is not None
        return token_s * link / context.nbytes

    seconds(4)
    assert min(over_link() for _ in range(4)) < most
    assert copy_stream(device, TO_DEVICE).query()
