"""The kernel over compressed keys, interpreted; tests/gpu/test_latent_cuda.py has GPUs."""

from __future__ import annotations

import pytest
import torch

from star_attention.attention.state import merge
from tests.latent_oracle import CASES, SHARDS, Case, Tensors

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

from star_attention.attention.kernels import triton_latent  # noqa: E402


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in CASES), ("a query", torch.float16)]
)
def test_compressed_attention(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    tensors = Tensors(case, dtype)
    state = tensors.attend([(0, case.L)])
    for tail, new in zip(tensors.tails, tensors.new, strict=True):
        assert torch.equal(tail[:, :, case.T : case.T + case.Q], new)
    tensors.check(state, 2e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("name", ["one token", "padded rows", "fp8"])
@pytest.mark.parametrize("shards", SHARDS)
def test_ranks_merge_to_the_whole(name: str, shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks append to the tail, the last one attends to it."""
    monkeypatch.setattr(triton_latent, "TAIL_SPLITS", 1)
    layout = SHARDS[shards]
    case = Case(**(vars(CASES[name]) | dict(L=300)))
    tensors = Tensors(case, torch.float32)
    states = [
        tensors.attend(segments, holds_tail=rank == len(layout))
        for rank, segments in enumerate(layout, start=1)
    ]
    assert not any(state.out_BQHD.isnan().any() for state in states)
    tensors.check(merge(states), 2e-6)


def test_a_query_that_sees_no_key_of_a_rank() -> None:
    tensors = Tensors(Case(), torch.float32)
    out, lse = tensors.attend([], holds_tail=False)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
