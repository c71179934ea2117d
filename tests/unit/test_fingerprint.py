"""What `fingerprint.weights` compares of a model that it has read before, and what it keeps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from star_attention.hf.loading import fingerprint


def other_data(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model[0].weight.data = make(model[0].weight.data)

    return change


SIGNS: dict[str, Callable[[Any], Any]] = {
    "another order of the same memory": other_data(lambda data: data.t()),
    "less of it": other_data(lambda data: data[:4]),
    "another type of it": other_data(lambda data: data.view(torch.float16)),
    "no memory": lambda model: model[0].weight.untyped_storage().resize_(0),
    "one more buffer": lambda model: model[1].register_buffer("mask", torch.ones(3)),
    "another table of buffers": lambda model: setattr(model[1], "_buffers", {"a": torch.ones(3)}),
    "no bias": lambda model: model[0].register_parameter("bias", None),
    "one more module": lambda model: model.append(nn.Linear(2, 2)),
    "one module less": lambda model: model.pop(1),
}


@pytest.mark.parametrize("way", SIGNS)
def test_more_than_values_is_compared(way: str) -> None:
    """Forbids a look at fewer things, or at memory that has gone, because all was read before."""
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.ReLU())
    before = fingerprint.weights(model)
    assert fingerprint.weights(model) == before
    SIGNS[way](model)
    after = fingerprint.weights(model)
    assert after != before
    assert fingerprint.weights(model) == after


MOVES: dict[str, Callable[[Any], Any]] = {
    "data of its own": other_data(torch.clone),
    "another parameter": lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(8, 8))),
    "another module": lambda model: model.__setitem__(0, nn.Linear(8, 8)),
}


@pytest.mark.parametrize("first", [fingerprint.addresses, fingerprint.weights])
@pytest.mark.parametrize("way", MOVES)
def test_parameters_that_move_are_noticed(way: str, first: Callable[[nn.Module], int]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    first(model)
    before = fingerprint.addresses(model)
    MOVES[way](model)
    after = fingerprint.addresses(model)
    assert after != before
    assert fingerprint.addresses(model) == after


def test_what_is_written_in_place_has_not_moved() -> None:
    """Forbids to capture graphs again for a change of numbers, and to miss the change meanwhile."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    places, before = fingerprint.addresses(model), fingerprint.weights(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    model.register_buffer("mask", torch.ones(3))
    assert fingerprint.addresses(model) == places
    assert fingerprint.weights(model) != before


def test_tensors_of_inference_mode_are_read() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(8, 8))
    before = fingerprint.weights(model)
    assert fingerprint.weights(model) == before
    with torch.inference_mode():
        model[0].weight[0, 0] = 5.0
    assert fingerprint.weights(model) != before


def test_nothing_of_a_model_is_kept() -> None:
    """Forbids memory for weights and modules that a model has no more."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].outer = model
    fingerprint.weights(model)
    gone = [weakref.ref(model[0].weight), weakref.ref(model[1])]
    model[0].weight = nn.Parameter(torch.ones(8, 8))
    model[1] = nn.Linear(8, 8)
    assert [each() for each in gone] == [None, None]
    fingerprint.weights(model)
    gone = [weakref.ref(model)]
    del model
    gc.collect()
    assert gone[0]() is None
