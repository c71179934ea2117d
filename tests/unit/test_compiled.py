"""Layers through torch.compile with its C++ backend. tests/gpu/test_fast_cuda.py tests a GPU's."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from star_attention import EncodedContext, StarLLM, phase1
from star_attention.hf.cache.rows import RowSet
from star_attention.hf.execution import graphs
from star_attention.hf.execution.compiled import FULL
from star_attention.hf.execution.layer_part import layers_of
from star_attention.hf.execution.rows import RowForwards
from tests.decode_rows import prefilled
from tests.engines import engine, ids, tiny
from tests.recorders import few_runs, with_graphs

SIZES: dict[str, Any] = dict(block_size=24, anchor_size=10, tokens_per_forward=48)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma3n", "deepseek_v3", "gpt2"])
def test_the_layers_of_a_decoder(name: str) -> None:
    model = tiny(name)
    assert len(layers_of(model.get_decoder())) == model.config.get_text_config().num_hidden_layers


def assert_same(context: EncodedContext, expected: EncodedContext) -> None:
    for layer, expected_layer in zip(context.kv.layers, expected.kv.layers, strict=True):
        assert layer.is_empty == expected_layer.is_empty
        if layer.is_empty:
            continue
        for actual, right in zip(layer.pair(), expected_layer.pair(), strict=True):
            torch.testing.assert_close(actual, right, atol=1e-4, rtol=1e-4)


WHOLE = {"llama": 1, "gemma2": 2, "gpt_oss": 2, "qwen3_moe": 1}
"""Families whose layers are compiled with their attention, and their number of kinds of layers."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WHOLE, "gemma3n", "deepseek_v3"])
def test_encoding_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phase1, "_WORTH_COMPILING", 1)
    counters.clear()
    plain, fast = engine(name, compile=False, **SIZES), engine(name, compile=True, **SIZES)
    for tokens in (101, 125):
        expected, context = plain.encode(ids(tokens)), fast.encode(ids(tokens))
        assert_same(context, expected)
    before = counters["stats"]["unique_graphs"]
    assert fast.runtime.handle.compiled is not None
    assert fast.runtime.handle.compiled.whole == (name in WHOLE)
    assert before == WHOLE[name] if name in WHOLE else before > 2, "once for each kind of layer"
    fast.encode(ids(149, seed=4))
    assert counters["stats"]["unique_graphs"] == before, "nothing is compiled again"
    settings: dict[str, Any] = dict(max_new_tokens=4, ignore_eos=True)
    assert (
        fast.generate(context, ids(5), **settings).token_ids
        == plain.generate(expected, ids(5), **settings).token_ids
    )


def test_other_threads_and_later_calls_run_the_plain_model() -> None:
    model = tiny("llama")
    star = StarLLM(model, compile=True, **SIZES)
    compiled, layers = star.runtime.handle.compiled, layers_of(model.get_decoder())
    assert compiled is not None
    expected = model(torch.tensor([ids(9)])).logits
    results: list[Any] = []
    with compiled.active(FULL):
        assert all("forward" in vars(layer) for layer in layers)
        thread = threading.Thread(
            target=lambda: results.append(model(torch.tensor([ids(9)])).logits)
        )
        thread.start()
        thread.join()
    assert torch.equal(results[0], expected)
    assert not any("forward" in vars(layer) for layer in layers)


def test_a_layer_that_cannot_be_compiled_whole_is_compiled_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(phase1, "_WORTH_COMPILING", 1)
    # Layers of the same model that another test has compiled would be used again.
    torch._dynamo.reset()
    mlp_type = type(layers_of(tiny("llama").get_decoder())[0].mlp)
    stock = mlp_type.forward

    def interrupted(self: Any, x: Any) -> Any:
        torch._dynamo.graph_break()
        return stock(self, x)

    expected = engine("llama", compile=False, **SIZES).encode(ids(101))
    monkeypatch.setattr(mlp_type, "forward", interrupted)
    fast = engine("llama", compile=True, **SIZES)
    context = fast.encode(ids(101))
    assert fast.runtime.handle.compiled is not None
    assert not fast.runtime.handle.compiled.whole
    assert_same(context, expected)


def test_a_forward_of_others_stays() -> None:
    """accelerate replaces forwards to bring weights, which a compiled layer would bypass."""
    model = tiny("llama")
    layer = layers_of(model.get_decoder())[0]
    layer.forward = layer.forward  # type: ignore[method-assign]
    try:
        assert StarLLM(model, compile=True, **SIZES).runtime.handle.compiled is None
        assert "forward" in vars(layer)
    finally:
        del layer.forward


@pytest.mark.slow
def test_steps_of_any_number_of_rows_share_compiled_code() -> None:
    pytest.importorskip("triton")
    counters.clear()
    star = engine("llama", compile=True, **SIZES)
    rows = prefilled(star, star.encode(ids(70)), ids(4, seed=3), ids(5, seed=4), ids(9, seed=5))
    graphs, forwards = with_graphs(star), RowForwards(star.runtime.handle, star.runtime.comm)
    before = counters["stats"]["unique_graphs"]
    for step, members in enumerate((rows, rows[1:])):
        tokens_R = torch.tensor([row.token_ids[step] for row in members])
        logits_RV = forwards.run(RowSet([row.kv for row in members]), tokens_R, None)
        expected_RV = torch.stack([row.logits_SV[step + 1] for row in members])
        torch.testing.assert_close(logits_RV, expected_RV, atol=2e-4, rtol=1e-4)
    assert {key[0] for key in graphs.of_rows.captured} == {4, 2}
    # A layer, the final norm and the rotary embeddings.
    assert counters["stats"]["unique_graphs"] == before + 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ends"), [("deepseek_v2", 1), ("deepseek_v3", 2)])
def test_layers_that_attend_to_what_they_store_are_compiled_whole(
    name: str, ends: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLA in graphs, where nothing that the model expands is used."""
    pytest.importorskip("triton")
    few_runs(monkeypatch)
    monkeypatch.setattr(graphs, "BUCKETS", (1, 8))
    plain, fast = engine(name, compile=False, **SIZES), engine(name, compile=True, **SIZES)
    counting = with_graphs(fast)
    context = plain.encode(ids(101))
    counters.clear()
    settings: dict[str, Any] = dict(max_new_tokens=4, ignore_eos=True, return_logits=True)
    expected, reply = (star.generate(context, ids(7), **settings) for star in (plain, fast))
    assert reply.token_ids == expected.token_ids
    torch.testing.assert_close(reply.logits, expected.logits, atol=2e-4, rtol=1e-4)
    assert counting.recorder.replays == 4
    # A query and a step, each through a layer with experts and one without. And a step's final norm
    # and rotary embeddings, where these are not complex numbers.
    assert counters["stats"]["unique_graphs"] == 4 + ends
    assert not counters["graph_break"]
    assert not fast.runtime.handle.compiled._gave_up


def test_operations_are_known_before_code_from_disk_calls_them() -> None:
    """torch's caches on disk hold compiled code: passes, which import operations, do not run."""
    pytest.importorskip("triton")
    script = """
import importlib, pkgutil
import torch
from star_attention import StarLLM, linear
from star_attention.hf.execution import compiled
from tests.engines import tiny
compiled.triton_works = lambda device: True
assert StarLLM(tiny("llama"), compile=True).runtime.handle.compiled is not None

def known():
    return {name for name in torch._C._dispatch_get_all_op_names() if "star_attention::" in name}

before = known()
for module in pkgutil.iter_modules(linear.__path__):
    importlib.import_module(f"{linear.__name__}.{module.name}")
print(sorted(known() - before))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
