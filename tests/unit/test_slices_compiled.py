"""Slices of weights in compiled layers, with our kernels in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config

from star_attention.hf.execution import compiled, slices
from star_attention.hf.execution.handle import ModelHandle
from tests.compiling import counted_launches, fresh_code
from tests.families import build
from tests.unit.test_slices import Rank, cache_of

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)


def test_a_sliced_layer_has_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of gate and up in one launch, then that of down; biases are added once."""
    monkeypatch.setattr(slices, "triton_works", lambda device: True)
    launches = counted_launches(monkeypatch, slices=False)
    model: Any = build("llama", mlp_bias=True)
    handle, layer = ModelHandle(model), model.model.layers[0].mlp
    for bias in (layer.gate_proj.bias, layer.down_proj.bias):
        torch.nn.init.normal_(bias)
    x = torch.randn(1, 1, layer.gate_proj.in_features)
    fused = compiled._Passes("fused linears alone", compiled._fuse_linears)
    options = {"post_grad_custom_pre_pass": fused}
    fast = torch.compile(layer, fullgraph=True, options=options)
    parts = []
    with torch.no_grad(), fresh_code():
        for rank in range(2):
            comm = Rank(rank, 2)
            handle.kept_slices = None
            sliced = slices.of(handle, ("mlp",), comm)
            with handle.running(cache_of(handle, comm, sliced), None):
                parts.append(fast(x))
        torch.testing.assert_close(sum(parts), layer(x), atol=1e-5, rtol=1e-4)
    assert launches == [2, 1] * 2
