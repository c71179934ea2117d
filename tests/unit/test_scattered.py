"""Attention of rows at scattered positions, and the attention that keys get, against the oracle."""

from __future__ import annotations

import pytest
import torch

from star_attention.attention import kernels, scattered
from star_attention.attention.attend import Rule
from star_attention.attention.mass import attention_mass
from star_attention.attention.oracle import masked_attention
from star_attention.attention.scattered import Rows, attend_rows
from star_attention.attention.state import merge

CPU = torch.device("cpu")
L, Q, H, G, D, V = 90, 23, 6, 3, 16, 11
SCALE = 0.3

# Clusters, as chosen facts are, and both ends of the context.
POSITIONS = [0, 1, 2, 9, 10, 11, 12, 30, 31, 47, 48, 49, 50, 51, 60, 61, 62, 75, 76, 77, 78, 88, 89]
SEGMENTS = {
    "whole": [(0, 90)],
    "between": [(31, 52)],
    "two": [(3, 30), (50, 90)],
    "after all but one": [(89, 90)],
}


def tensors(v_size: int = V) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, Q, H, D), (1, L, G, D), (1, L, G, v_size)
    return tuple(torch.randn(*shape, generator=generator) for shape in shapes)  # type: ignore[return-value]


def visible(window: int | None) -> torch.Tensor:
    back_QL = torch.tensor(POSITIONS)[:, None] - torch.arange(L)
    return (back_QL >= 0) & (back_QL < (window or L))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 7, 40, 500])
@pytest.mark.parametrize(("tile", "step"), [(1, 1), (5, 1), (5, 8), (64, 1)])
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_rows_see_the_keys_up_to_their_own(
    segments: list[tuple[int, int]],
    tile: int,
    step: int,
    window: int | None,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scattered, "_TILE_ROWS", {"cpu": tile})
    monkeypatch.setattr(scattered, "_SHARED_STEP", {"cpu": step})
    q, k, v = tensors()
    rule = Rule(scale=SCALE, window=window, softcap=softcap)
    rows = Rows(POSITIONS, CPU)
    states = [
        attend_rows(q, k[:, start:stop], v[:, start:stop], rule=rule, rows=rows, first_key=start)
        for start, stop in segments
    ]
    held_L = torch.zeros(L, dtype=torch.bool)
    for start, stop in segments:
        held_L[start:stop] = True
    right = masked_attention(q, k, v, visible(window) & held_L, scale=SCALE, softcap=softcap)
    state = merge(states)
    torch.testing.assert_close(state.out_BQHD.double(), right.out_BQHD, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.lse_BQH, right.lse_BQH, atol=1e-5, rtol=1e-5)


def test_most_work_takes_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids a mask over keys that all rows of a tile see: fast kernels take none."""
    monkeypatch.setattr(scattered, "_TILE_ROWS", {"cpu": 4})
    masked = 0

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> object:
        nonlocal masked
        masked += q.shape[1] * k.shape[1]
        return real(q, k, v, **options)  # type: ignore[arg-type]

    real = scattered.run
    monkeypatch.setattr(scattered, "run", run)
    rows = Rows(POSITIONS, CPU)
    attend_rows(*tensors(), rule=Rule(scale=SCALE), rows=rows, first_key=0)
    # The last row sees all keys, and takes no mask.
    tiles = [POSITIONS[at : min(at + 4, Q - 1)] for at in range(0, Q - 1, 4)]
    assert masked == sum(len(tile) * (tile[-1] - tile[0]) for tile in tiles)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 20])
def test_mass_is_the_sum_of_probabilities(
    window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the queries' attention to all keys, each part of a context gives its own share."""
    monkeypatch.setattr("star_attention.attention.mass._MAX_SCORES", 10 * Q * H)
    q, k, _ = tensors()
    ahead_QL = L + torch.arange(Q)[:, None] - torch.arange(L)
    keep_QL = ahead_QL < (window or 2 * L)
    # The values of the oracle's attention are the keys' own numbers: its output is the weights.
    ones_1LGL = torch.eye(L)[None, :, None].expand(1, L, G, L)
    right = masked_attention(q, k, ones_1LGL, keep_QL, scale=SCALE, softcap=softcap)
    rule = Rule(scale=SCALE, window=window, softcap=softcap)
    masses = [
        attention_mass(q, k[:, start:stop], right.lse_BQH, rule=rule, offset=L - start)
        for start, stop in ((0, 33), (33, 90))
    ]
    mass_L = right.out_BQHD.sum((0, 1, 2))
    torch.testing.assert_close(torch.cat(masses).double(), mass_L, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize(("first_row", "first_key"), [(0, 0), (0, 31), (18, 0)])
def test_the_triton_kernel(window: int | None, first_row: int, first_key: int) -> None:
    """The last rows all see the first keys, which then take no limits."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton's kernels do not run in its interpreter here")
    from star_attention.attention.kernels import triton_scattered

    q, k, v = tensors(D)
    q, k, v = q[:, first_row:], k[:, first_key:], v[:, first_key:]
    last_Q = torch.tensor(POSITIONS[first_row:], dtype=torch.int32) - first_key
    rule = Rule(scale=SCALE, window=window)
    state = triton_scattered.attend(q, k, v, rule=rule, last_Q=last_Q)
    keep_QK = visible(window)[first_row:, first_key:]
    right = masked_attention(q, k, v, keep_QK, scale=SCALE)
    torch.testing.assert_close(state.out_BQHD.double(), right.out_BQHD, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state.lse_BQH, right.lse_BQH, atol=1e-5, rtol=1e-4)
    call = kernels.Call(
        device="cuda", dtype=torch.float32, queries=Q, keys=L, heads=H, kv_heads=G, head_size=D
    )
    assert triton_scattered.unsupported(call, D) != []
