"""Slices of weights on one rank: what is sliced, what stays whole, and that nothing is copied.

tests/dist/test_slices.py has the answers of several ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from star_attention.distributed import SoloComm
from star_attention.errors import InvalidInputError
from star_attention.hf.cache.base import StarCache
from star_attention.hf.cache.decode import AnswerCache
from star_attention.hf.execution import slices
from star_attention.hf.execution.handle import ModelHandle
from star_attention.hf.loading import slice_groups
from star_attention.planning.segments import Segments
from star_attention.storage.kv import ContextKV
from tests.engines import tiny
from tests.families import build
from tests.refusals import refused

WHOLE: dict[str, dict[str, str]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "olmo2": {"attention": "no tensor-parallel plan"},
    "cohere": {"attention": "weights for each head"},
    "deepseek_v3": {"attention": "do not simply read their own keys"},
    "mixtral": {"mlp": "no tensor-parallel plan for plain MLPs"},
    "phi3": {"attention": "no tensor-parallel plan", "mlp": "no tensor-parallel plan"},
    "gpt2": {"attention": "no tensor-parallel plan", "mlp": "no tensor-parallel plan"},
    "llama_mqa": {"attention": "1 KV heads do not divide by 3 ranks"},
}
"""Families, and the parts of them that stay whole on three ranks."""


class Rank(SoloComm):
    """One of several ranks, whose sums are its own part."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self.cp_rank, self.cp_size = rank, ranks

    def cp_gather(self, tensor: Tensor) -> Tensor:
        return tensor.expand(self.cp_size, *tensor.shape)

    def gather_heads(self, *own_BSHD: Tensor) -> list[Tensor]:
        return [t.repeat(1, 1, self.cp_size, 1) for t in own_BSHD]


def cache_of(handle: ModelHandle, comm: SoloComm, sliced: slices.Slices | None) -> StarCache:
    store = ContextKV.empty(Segments(), [False] * len(handle.windows))
    return AnswerCache(store, handle.windows, 0, [0], comm, sliced)


# ------------------------------------------------------------------------ in integers


@pytest.mark.parametrize("size", [3, 7, 48, 100, 14336])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranges_cover_everything_once(size: int, ranks: int) -> None:
    ranges = [slice_groups.own_range(size, ranks, rank) for rank in range(ranks)]
    assert [number for first, stop in ranges for number in range(first, stop)] == list(range(size))
    lengths = [stop - first for first, stop in ranges]
    assert min(lengths) > 0
    assert max(lengths) - min(lengths) <= 16
    if size >= 16 * ranks:
        assert all(first % 16 == 0 for first, _ in ranges)


@pytest.mark.parametrize("size", [10, 99, 32000, 128256])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranges_of_the_vocabulary_are_padded_to_one_length(size: int, ranks: int) -> None:
    ranges = [slice_groups.padded_range(size, ranks, rank) for rank in range(ranks)]
    parts = [range(first, stop) for first, stop, _ in ranges]
    assert [number for part in parts for number in part] == list(range(size))
    (most,) = {most for _, _, most in ranges}
    assert all(len(part) == most for part in parts[:-1])
    assert 0 < len(parts[-1]) <= most


# --------------------------------------------------------------------- what is sliced


@pytest.mark.parametrize("name", WHOLE)
def test_parts_stay_whole_with_a_reason(name: str) -> None:
    handle = ModelHandle(tiny(name))
    found = slice_groups.find(handle, 3)
    assert set(found.reasons) == set(WHOLE[name])
    for part, phrase in WHOLE[name].items():
        assert phrase in found.reasons[part]
    assert {*found.parts, *found.reasons, "experts"} == set(slice_groups.PARTS)
    assert ("experts" in found.parts) == (name in ("mixtral", "deepseek_v3"))


def test_an_adapter_leaves_its_part_whole() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"])).eval()
    found = slice_groups.find(ModelHandle(model), 3)
    assert "adapters" in found.reasons["attention"]
    assert found.parts == ("mlp", "head")


def test_replaced_layers_are_found_again() -> None:
    """Forbids slices of a layer that an adapter has wrapped since the last call."""
    model: Any = build("llama")
    handle, comm = ModelHandle(model), Rank(0, 3)
    parts = slices.choose(handle, comm, True)
    first = slices.of(handle, parts, comm)
    assert slices.of(handle, parts, comm) is first
    mlp = model.model.layers[1].mlp
    mlp.down_proj = nn.Linear(mlp.down_proj.in_features, mlp.down_proj.out_features, bias=False)
    assert slices.of(handle, parts, comm) is not first


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a class": lambda layer: setattr(layer, "__class__", type("Other", (nn.Linear,), {})),
    "a forward": lambda layer: setattr(layer, "forward", lambda x: x),
    "a hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "a hook before": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "a module within": lambda layer: layer.add_module("adapter", nn.Identity()),
    "a kind of weight": lambda layer: layer.register_parameter("weight", None),
    "a place of a weight": lambda layer: layer.to("meta"),
    "a dtype": lambda layer: layer.to(torch.float64),
    "its numbers": lambda layer: layer.weight.data.mul_(2),
    "strides": lambda layer: setattr(layer.weight, "data", layer.weight.data.T.contiguous().T),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_layers_are_noticed(change: str) -> None:
    """Forbids slices of layers that have become something else, in their places."""
    model: Any = build("llama")
    found = slice_groups.find(ModelHandle(model), 3)
    assert found.is_current
    CHANGES[change](model.model.layers[1].mlp.down_proj)
    assert found.is_current == (change == "its numbers"), "those are read in every forward"


def test_the_setting() -> None:
    handle, comm = ModelHandle(tiny("llama")), Rank(1, 3)
    assert slices.choose(handle, comm, None) == (), "too small"
    assert slices.choose(handle, comm, False) == ()
    assert slices.choose(handle, SoloComm(), True) == (), "one slice is the whole"
    assert slices.choose(handle, comm, True) == ("attention", "mlp", "head")


def test_nothing_to_slice_is_refused() -> None:
    model: Any = build("gpt2")
    model.lm_head.register_forward_hook(lambda *_: None)
    handle = ModelHandle(model)
    refused(
        InvalidInputError,
        "slice_weights=True finds nothing in GPT2LMHeadModel",
        "over 3 ranks",
        "leave it out",
        call=lambda: slices.choose(handle, Rank(0, 3), True),
    )


def test_tensor_parallelism_is_refused() -> None:
    handle, comm = ModelHandle(tiny("llama")), Rank(0, 3)
    comm.tp_size = 2
    assert slices.choose(handle, comm, None) == ()
    refused(
        InvalidInputError,
        "slice_weights=True does not work with tensor_parallel 2",
        "leave one of them out",
        call=lambda: slices.choose(handle, comm, True),
    )


def test_small_parts_are_not_worth_a_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, comm = ModelHandle(tiny("llama")), Rank(0, 3)
    assert slices.choose(handle, comm, None) == ()
    mlp = 3 * 72 * 112 * 4
    monkeypatch.setattr(slices, "SAVED_BYTES_ON_CPU", mlp * 2 // 3)
    assert slices.choose(handle, comm, None) == ("mlp",)
    comm.one_host = False
    assert slices.choose(handle, comm, None) == (), "it takes longer between hosts"


# ------------------------------------------------------------------------- forwards


def test_slices_are_views_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny("llama")
    handle, comm = ModelHandle(model), Rank(1, 3)
    weights = {w.untyped_storage().data_ptr(): w for w in model.parameters() if w.dim() == 2}
    read: dict[int, int] = {}
    linear = functional.linear

    def recorded(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        read[weight.untyped_storage().data_ptr()] = weight.numel()
        return linear(input, weight, bias)

    monkeypatch.setattr(functional, "linear", recorded)
    cache = cache_of(handle, comm, slices.of(handle, slices.choose(handle, comm, True), comm))
    handle.logits(torch.tensor([[5, 6]]), torch.tensor([[0, 1]]), cache, None)
    linears = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert set(read) == {weight.untyped_storage().data_ptr() for weight in linears}
    for storage, elements in read.items():
        assert elements <= weights[storage].numel() * 0.45


def test_other_threads_and_later_forwards_use_whole_weights() -> None:
    model: Any = tiny("llama")
    handle, comm = ModelHandle(model), Rank(0, 3)
    ids_1S = torch.tensor([[5, 6, 7]])
    expected = model(ids_1S).logits
    sliced = slices.of(handle, ("attention", "mlp", "head"), comm)
    assert sliced is not None
    results: list[Tensor] = []
    with handle.running(cache_of(handle, comm, sliced), None):
        thread = threading.Thread(target=lambda: results.append(model(ids_1S).logits))
        thread.start()
        thread.join()
    results.append(model(ids_1S).logits)
    for logits in results:
        assert torch.equal(logits, expected)
    assert {type(layer) for layer in model.modules() if isinstance(layer, nn.Linear)} == {nn.Linear}
