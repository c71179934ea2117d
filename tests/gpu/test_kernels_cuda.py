"""Every kernel that runs on CUDA against the oracle in float64, on random inputs.

Axes: B batch, Q queries, K keys, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from star_attention.attention import kernels
from star_attention.attention.attend import Rule, attend
from star_attention.attention.oracle import masked_attention

pytestmark = pytest.mark.gpu

HEADS = [(12, 12), (12, 3), (12, 1)]
SIZES = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128)]
# (queries, keys, offset, window, softcap): square, rectangle, decoding, piece of a block, windows,
# softcap.
SHAPES = [
    (777, 777, 0, None, None),
    (777, 1290, 5000, None, None),
    (1, 4099, 4098, None, None),
    (300, 1000, 700, None, None),
    (777, 777, 0, 100, None),
    (300, 1000, 700, 257, None),
    (5, 1000, 1100, 150, None),
    (130, 655, 525, None, 20.0),
]


def _error(
    dtype: torch.dtype,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    shape: tuple,
    kernel: str | None,
) -> tuple:
    queries, keys, offset, window, softcap = shape
    batch = 2
    q = torch.randn(batch, queries, heads[0], sizes[0], device="cuda").to(dtype)
    k = torch.randn(batch, keys, heads[1], sizes[0], device="cuda").to(dtype)
    v = torch.randn(batch, keys, heads[1], sizes[1], device="cuda").to(dtype)
    distance = (
        torch.arange(queries, device="cuda")[:, None]
        + offset
        - torch.arange(keys, device="cuda")[None]
    )
    keep = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    rule = Rule(scale=sizes[0] ** -0.5, window=window, softcap=softcap)
    state = attend(q, k, v, rule=rule, offset=offset, kernel=kernel)
    exact = masked_attention(q, k, v, keep, scale=rule.scale, softcap=softcap)
    # The error of a plain implementation in the working dtype is the measure.
    plain = masked_attention(q, k, v, keep, scale=rule.scale, softcap=softcap, dtype=dtype)
    out = (state.out_BQHD.double() - exact.out_BQHD).abs().max().item()
    out_plain = (plain.out_BQHD.double() - exact.out_BQHD).abs().max().item()
    lse = (state.lse_BQH - exact.lse_BQH).nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    assert torch.equal(state.lse_BQH.isneginf(), exact.lse_BQH.isneginf())
    return out, out_plain, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attend_is_within_twice_a_plain_implementation(
    dtype: torch.dtype, sizes: tuple[int, int], heads: tuple[int, int]
) -> None:
    for shape in SHAPES:
        out, plain, lse = _error(dtype, heads, sizes, shape, None)
        floor = 2e-5 if dtype == torch.float32 else 0.0
        assert out <= max(2 * plain, floor), (shape, out, plain)
        assert lse <= (1e-4 if dtype == torch.float32 else 2e-2), (shape, lse)


@pytest.mark.parametrize("kernel", ["cudnn", "cuda_flash", "cuda_efficient", "math"])
def test_each_kernel_runs_the_calls_that_it_supports(kernel: str) -> None:
    calls = 0
    for dtype, sizes, shape in itertools.product((torch.float32, torch.bfloat16), SIZES, SHAPES):
        queries, keys, offset, window, softcap = shape
        call = kernels.Call(
            device="cuda",
            dtype=dtype,
            queries=queries,
            keys=keys,
            heads=12,
            kv_heads=3,
            head_size=sizes[0],
            causal=offset == 0,
            softcap=softcap,
            window=None,
        )
        if (
            window is not None
            or (offset and offset < keys - 1)
            or kernels.find(call, kernel) is None
        ):
            continue
        calls += 1
        out, plain, _ = _error(dtype, (12, 3), sizes, shape, kernel)
        assert out <= max(2 * plain, 2e-5), (dtype, sizes, shape)
    assert calls, f"{kernel} supports none of the calls"


def test_phase_1_in_half_precision_uses_cudnn_and_decoding_uses_flash() -> None:
    common = dict(device="cuda", dtype=torch.bfloat16, heads=32, kv_heads=8, head_size=128)
    assert kernels.choose(kernels.Call(queries=4096, keys=4096, causal=True, **common)) == "cudnn"
    assert kernels.choose(kernels.Call(queries=4096, keys=8192, **common)) == "cudnn"
    assert kernels.choose(kernels.Call(queries=1, keys=8192, **common)) == "cuda_flash"
