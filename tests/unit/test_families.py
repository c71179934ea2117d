"""The registry of tiny models: properties that the other tests rely on."""

from __future__ import annotations

import pytest
import torch

from tests.families import FAMILIES, REFUSED, UNUSUAL, build


@pytest.mark.parametrize("name", [*UNUSUAL, *REFUSED])
def test_unusual_families_build(name: str) -> None:
    model = build(name)
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000


def test_names_are_distinct() -> None:
    assert len(FAMILIES | UNUSUAL | REFUSED) == len(FAMILIES) + len(UNUSUAL) + len(REFUSED)


def test_the_seed_decides_the_weights_and_global_random_numbers_are_untouched() -> None:
    state = torch.get_rng_state()
    first, again, other = build("llama"), build("llama"), build("llama", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), b, c in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v3"])
def test_bfloat16_weights_are_float32_weights_rounded(name: str) -> None:
    exact, rounded = build(name), build(name, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    for (parameter_name, a), b in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(a.to(b.dtype), b), parameter_name
    for (buffer_name, a), b in zip(exact.named_buffers(), rounded.buffers(), strict=True):
        # Rotary frequencies stay in float32.
        assert torch.equal(a, b), buffer_name


def test_norms_and_sinks_are_random() -> None:
    """Constant vectors would hide a missing norm weight, bias or sink."""
    model = build("gpt_oss")
    vectors = [p for p in model.parameters() if p.dim() == 1]
    assert len(vectors) > 10
    assert all(vector.std() > 0.01 for vector in vectors)
