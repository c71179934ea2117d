"""Contexts in host memory: their layers arrive through few buffers, and some stay on the device."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import EncodedContext, StarLLM
from star_attention.errors import InvalidInputError
from star_attention.planning.residency import BUFFERS
from star_attention.storage.host import feed as feed_module
from star_attention.storage.host import pinned
from star_attention.storage.host.feed import Feed, feeds_of
from star_attention.storage.kv import LayerKV, StoredKV
from tests.engines import engine, ids
from tests.tiers import in_turn
from tests.timelines import Now

SIZES: dict[str, Any] = dict(block_size=24, anchor_size=10, tokens_per_forward=48)
CPU = torch.device("cpu")


class Counting(Feed):
    taken = 0

    def take(self, layer: LayerKV) -> StoredKV:
        self.taken += 1
        return super().take(layer)


def fed(context: EncodedContext) -> Counting:
    """Let a context's layers arrive as they do on a GPU."""
    layers = [layer for layer in context.kv.layers if layer.on_host and not layer.is_empty]
    return Counting(layers, CPU, copies=Now(), reader=Now)


@pytest.mark.parametrize(
    ("name", "kv_dtype", "buffers"),
    in_turn(2, ["llama", "gemma2", "deepseek_v3", "gemma3n"], [None, "fp8"], [1, 2]),
)
def test_layers_that_arrive_in_turn_answer_as_those_in_place(
    name: str, kv_dtype: str | None, buffers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "BUFFERS", buffers)
    star = engine(name, **SIZES, kv_dtype=kv_dtype, kv_device="cpu", kv_windows="all")
    context = star.encode(ids(101))
    queries = [ids(5, seed=3), ids(9, seed=4)]
    kwargs: dict[str, Any] = dict(max_new_tokens=6, ignore_eos=True)

    def answers() -> list[list[int]]:
        replies = list(star.generate(context, queries, **kwargs))
        replies.append(star.generate(context, queries[0], **kwargs, num_beams=2))
        replies.append(star.generate(context, queries[0], **kwargs, second_look=0.2))
        with star.batch() as batch:
            rows = [batch.add(context, query, **kwargs) for query in queries]
            replies += [row.result() for row in rows]
        return [reply.token_ids for reply in replies]

    expected = answers()
    feed = fed(context)
    assert answers() == expected
    assert feed.taken > 20


def test_a_layer_that_changes_is_copied_again() -> None:
    star = engine("llama", **SIZES, kv_device="cpu")
    kv = star.encode(ids(101)).kv
    feed = Feed(kv.layers, CPU, copies=Now(), reader=Now)
    for layer in kv.layers:
        layer.pair()
    k_1GLD = kv.layers[0].stored()[0]
    new_GSD = torch.full_like(k_1GLD[0, :, :2], 7.0)
    kv.layers[0].replace(torch.tensor([3, 99]), new_GSD, new_GSD)
    assert (kv.layers[0].pair()[0][0, :, [3, 99]] == 7).all()
    kv.layers[0].write(5, new_GSD + 1, new_GSD)
    assert (kv.layers[0].pair()[0][0, :, 5:7] == 8).all()
    assert kv.layers[0].pair()[0].data_ptr() != k_1GLD.data_ptr()
    del feed
    assert kv.layers[0].pair()[0].data_ptr() == k_1GLD.data_ptr()


def test_caches_share_what_brings_a_context() -> None:
    star = engine("llama", **SIZES, kv_device="cpu")
    context = star.encode(ids(101))
    assert feeds_of(context.kv) == []
    feed = fed(context)
    assert feeds_of(context.kv) == [feed]


def test_few_buffers_serve_many_layers() -> None:
    """The feed takes the memory of three layers, however many there are."""
    star = engine("llama", **SIZES, kv_device="cpu", kv_dtype="fp8")
    kv = star.encode(ids(101)).kv
    layers = [kv.layers[0].elsewhere(kv.layers[0].stored) for _ in range(7)]
    feed = Feed(layers, CPU, copies=Now(), reader=Now)
    places = {feed.take(layer)[0].data_ptr() for _ in range(3) for layer in layers}
    assert len(places) == BUFFERS
    assert all(tensor.data_ptr() % 16 == 0 for layer in layers for tensor in feed.take(layer))


def test_layers_that_stay_do_so_in_files_and_longer_contexts(tmp_path: Path) -> None:
    star = engine("llama", **SIZES, kv_device="cpu", kv_resident=0.5)
    context = star.encode(ids(101))
    half = [layer.on_host for layer in context.kv.layers]
    assert sum(half) == len(half) - len(half) // 2
    context.save(tmp_path / "half.star")
    longer = star.extend(context, ids(9))
    for other in (star.load_context(tmp_path / "half.star"), longer):
        assert [layer.on_host for layer in other.kv.layers] == half
        assert other.kv.kv_format == context.kv.kv_format
    whole = engine("llama", **SIZES).load_context(tmp_path / "half.star")
    assert not any(layer.on_host for layer in whole.kv.layers)
    kwargs: dict[str, Any] = dict(max_new_tokens=5, ignore_eos=True)
    replies = [
        own.generate(own_context, ids(5), **kwargs)
        for own, own_context in ((star, context), (engine("llama", **SIZES), whole))
    ]
    assert replies[0].token_ids == replies[1].token_ids


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kv_resident=0.5), "kv_resident 0.5 has no effect without kv_device"),
        (dict(kv_device="cpu", kv_resident=1.5), "kv_resident 1.5 is not a number from 0 to 1"),
        (dict(kv_device="cpu", kv_resident="half"), "kv_resident 'half' is not a number"),
        (dict(kv_device="cpu", kv_resident=True), "kv_resident True is not a number"),
    ],
)
def test_shares_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        StarLLM.from_pretrained("models/needle-17m", **settings)


@pytest.mark.parametrize("capturing", [False, True])
def test_pinned_memory_goes_with_its_tensors(
    capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is unpinned once, when no tensor is in it any more, and has just its bytes.

    While a CUDA graph is captured nothing may be unpinned: that comes later.
    """
    unpinned: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(pinned._Region, "unpin", lambda region: unpinned.append(region.address))
    region = pinned._region(5000)
    assert len(region) == 5000
    flat = torch.frombuffer(region, dtype=torch.uint8)
    assert flat.data_ptr() % 4096 == 0
    region.address = flat.data_ptr()
    del region
    part = flat[100:4900].view(torch.float32).fill_(3)
    address = flat.data_ptr()
    del flat
    gc.collect()
    assert not unpinned
    assert (part == 3).all()
    del part
    assert unpinned == [] if capturing else [address]
    pinned.unpin_released()
    assert unpinned == [address]
    assert not pinned._released


def test_on_a_cpu_nothing_is_pinned() -> None:
    tensor = pinned.empty((2, 3), torch.float16, CPU)
    assert (tensor.shape, tensor.dtype) == ((2, 3), torch.float16)
    assert pinned.copy_of(tensor, CPU) is tensor
