"""Encoding ends with the last layer's keys: what nobody reads is not computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from star_attention import StarLLM, phase1
from star_attention.hf.execution.last_layer import last_kv_layer
from tests.engines import ids, tiny

CONTEXT = 70


@contextmanager
def counted(model: Any, name: str) -> Iterator[Callable[[], int]]:
    """Count the calls of the last layer's module of that name."""
    module = dict(model.get_decoder().layers[-1].named_modules())[name]
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    handle = module.register_forward_pre_hook(count)
    try:
        yield lambda: calls[0]
    finally:
        handle.remove()


@pytest.mark.parametrize("method", ["star", "dense", "streaming_llm"])
def test_the_last_layer_ends_with_its_keys(method: str) -> None:
    model = tiny("llama")
    star = StarLLM(model, block_size=16, method=method, tokens_per_forward=32)
    with counted(model, "self_attn.k_proj") as keys, counted(model, "mlp") as mlps:
        context = star.encode(ids(CONTEXT))
        assert keys() > 0
        assert mlps() == 0
        star.generate(context, ids(5), max_new_tokens=2)
        assert mlps() > 0


@pytest.mark.parametrize(
    ("name", "compile"),
    [
        *((name, False) for name in ("llama", "gemma3", "gemma3n", "gpt_oss", "deepseek_v3")),
        ("llama", True),
    ],
)
def test_keys_are_those_of_whole_forwards(
    name: str, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook of others, which may run after any module, keeps forwards whole."""
    monkeypatch.setattr(phase1, "_WORTH_COMPILING", 32)
    model = tiny(name)
    star = StarLLM(model, block_size=16, anchor_size=8, tokens_per_forward=32, compile=compile)
    context = star.encode(ids(CONTEXT))
    calls = [0]

    def hook(*_: Any) -> None:
        calls[0] += 1

    handle = model.get_decoder().norm.register_forward_hook(hook)
    try:
        whole = star.encode(ids(CONTEXT))
    finally:
        handle.remove()
    assert calls[0] > 0
    for ended_layer, whole_layer in zip(context.kv.layers, whole.kv.layers, strict=True):
        assert ended_layer.is_empty == whole_layer.is_empty
        if not whole_layer.is_empty:
            for ended, full in zip(ended_layer.pair(), whole_layer.pair(), strict=True):
                torch.testing.assert_close(ended, full, rtol=0, atol=0)


def test_a_forward_of_others_on_the_last_layer_runs_to_its_end() -> None:
    """Forbids ending accelerate's forwards, which take a module's weights away afterwards."""
    model = tiny("llama")
    layer, ends = model.get_decoder().layers[-1], [0]
    stock = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        result = stock(*args, **kwargs)
        ends[0] += 1
        return result

    layer.forward = forward
    try:
        star = StarLLM(model, block_size=16)
        star.encode(ids(CONTEXT))
        assert last_kv_layer(star.runtime.handle) is None
    finally:
        del layer.forward
    assert ends[0] > 0
    assert last_kv_layer(star.runtime.handle) == len(star.runtime.handle.windows) - 1


def test_callbacks_hear_of_the_last_layer() -> None:
    layers: list[tuple[int, int]] = []

    class Progress:
        def __call__(self, *_: Any) -> None:
            pass

        def layer(self, _span: Any, _plan: Any, layer: int, num_layers: int) -> None:
            layers.append((layer, num_layers))

    StarLLM(tiny("llama"), block_size=128).encode(ids(CONTEXT), progress=Progress())
    assert layers[-1][0] == layers[-1][1]
