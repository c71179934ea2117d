"""The kernel over compressed keys, interpreted; tests/gpu/test_latent_cuda.py has GPUs."""

from __future__ import annotations

import pytest
import torch

from star_attention.attention.state import merge
from tests.latent_oracle import CASES, SHARDS, Case, Tensors

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

from star_attention.attention.kernels import triton_absorb, triton_latent  # noqa: E402
from star_attention.attention.latent import Expansion  # noqa: E402
from star_attention.attention.rotation import Rotation  # noqa: E402


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


@pytest.mark.parametrize(("N", "V", "C", "P"), [(16, 12, 32, 8), (20, 33, 100, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_around_a_token(N: int, V: int, C: int, P: int, dtype: torch.dtype) -> None:
    """Against torch's products; the key is stored as by `append`."""
    case = Case(C=C, P=P, H=3)
    tensors, again = Tensors(case, dtype), Tensors(case, dtype)
    expansion = Expansion((torch.randn(3, N + V, C) / C**0.5).to(dtype), N)
    # As models have it: heads before tokens.
    q = torch.randn(1, 3, 1, N + P).to(dtype).transpose(1, 2)
    tables, _addressed = tensors.tables([(0, case.L)])
    out = triton_absorb.absorb(q, tensors.new, expansion, tables=tables, layer=1)
    tables, _addressed = again.tables([(0, case.L)])
    triton_latent.append(*again.new, tables=tables, layer=1)
    for tail, expected in zip(tensors.tails, again.tails, strict=True):
        assert torch.equal(tail[:, :, : case.T + 1], expected[:, :, : case.T + 1])
    eps = torch.finfo(dtype).eps
    right = Expansion(expansion.weight_HXC.double(), N).absorb(q.double())
    torch.testing.assert_close(out, right.to(dtype), atol=8 * eps, rtol=2 * eps)
    mean = torch.randn(1, 1, 3, C)
    right = torch.einsum("bqhc,hvc->bqhv", mean.double(), expansion.weight_HXC[:, N:].double())
    out = triton_absorb.expand(mean, expansion, dtype)
    torch.testing.assert_close(out, right.to(dtype), atol=8 * eps, rtol=2 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("angles", "pairs", "has_norm"), [(8, False, True), (4, True, True), (8, True, False)]
)
def test_a_token_before_its_norm_and_rotation(
    angles: int, pairs: bool, has_norm: bool, dtype: torch.dtype
) -> None:
    """Against both computed in fp64 before."""
    N, C, P = 20, 100, 8
    case = Case(C=C, P=P, H=3)
    tensors = Tensors(case, dtype)
    expansion = Expansion((torch.randn(3, N + 5, C) / C**0.5).to(dtype), N)
    q = torch.randn(1, 3, 1, N + P).to(dtype).transpose(1, 2)
    # One after the other, as in a view of complex numbers.
    cos, sin = torch.randn(1, 1, angles, 2).unbind(-1)
    rotation = Rotation(cos_RQE=cos, sin_RQE=sin, pairs=pairs)
    weight, eps = torch.randn(C).to(dtype), 1e-3
    c, r = tensors.new
    tables, _addressed = tensors.tables([(0, case.L)])
    out = triton_absorb.absorb(
        q, (c, r), expansion, tables=tables, layer=1, rotation=rotation,
        norm=(weight, eps) if has_norm else None,
    )  # fmt: skip
    c, q = c.double(), q.double()
    if has_norm:
        c = c * torch.rsqrt(c.square().mean(-1, keepdim=True) + eps) * weight.double()
    r = rotation.rotate(r.double().transpose(1, 2)).transpose(1, 2)
    q = torch.cat([q[..., :N], rotation.rotate(q[..., N:])], -1)
    tolerance = dict(atol=16 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)
    for tail, right in zip(tensors.tails, (c, r), strict=True):
        torch.testing.assert_close(tail[:, :, case.T : case.T + 1], right.to(dtype), **tolerance)
    right = Expansion(expansion.weight_HXC.double(), N).absorb(q)
    torch.testing.assert_close(out, right.to(dtype), **tolerance)
