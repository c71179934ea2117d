"""Random runs that are still to be merged, as our kernels leave them, and what they merge into.

Axes: B batch, Q query rows, H query heads, G KV heads, D head size, P places, S runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from star_attention.attention.runs import Runs, RunTable
from star_attention.attention.state import State

TILE = 16


def _states(places: int, D: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return states of runs, with logarithms to base 2; every seventh has no keys."""
    out_PD = torch.randn(places, D, generator=random)
    lse_P = 12 * torch.randn(places, generator=random)
    lse_P[::7], out_PD[::7] = float("-inf"), 0.0
    return out_PD, lse_P


def _merged(out_PD: Tensor, lse_P: Tensor, places_RS: Tensor, shape: tuple[int, ...]) -> State:
    """Merge the runs of each row in fp64; places of -1 are none."""
    lse_RS = lse_P.double()[places_RS].masked_fill(places_RS < 0, float("-inf"))
    weight_RS = lse_RS.exp2()
    sum_R = weight_RS.sum(1)
    out_RD = torch.einsum("rs,rsd->rd", weight_RS, out_PD.double()[places_RS])
    out_RD /= sum_R.where(sum_R > 0, 1.0)[:, None]
    return State(out_RD.float().view(shape), sum_R.log().float().view(shape[:3]))


def even_runs(
    seed: int,
    *,
    B: int = 2,
    Q: int = 3,
    H: int = 6,
    D: int = 5,
    count: int = 3,
    device: str = "cpu",
) -> tuple[Runs, State]:
    """Return runs as `triton_answer` leaves them; of the first row, none has keys."""
    random = torch.Generator().manual_seed(seed)
    out_PD, lse_P = _states(B * Q * H * count, D, random)
    out_PD[:count], lse_P[:count] = 0.0, float("-inf")
    places_RS = torch.arange(B * Q * H * count).view(-1, count)
    state = _merged(out_PD, lse_P, places_RS, (B, Q, H, D))
    runs = Runs(
        shape=(B, Q, H, D),
        out_PD=out_PD.to(device),
        lse_P=lse_P.to(device),
        count=count,
        merged=lambda: state,
    )
    return runs, State(*(t.to(device) for t in state))


def runs_by_table(
    seed: int,
    *,
    B: int = 4,
    H: int = 6,
    G: int = 2,
    D: int = 5,
    count: int = 2,
    device: str = "cpu",
) -> tuple[Runs, State]:
    """Return runs as `triton_rows` leaves them: numbers of items and places in tiles differ.

    The last row is unused, without items.
    """
    random = torch.Generator().manual_seed(seed)
    group = H // G
    items = [(3 * row + seed) % 20 for row in range(B - 1)] + [0]
    firsts = [sum(items[:row]) for row in range(B)]
    inside = [row % (TILE // group) for row in range(B)]
    tails_at = sum(items) * G * TILE
    out_PD, lse_P = _states(tails_at + B * count * H, D, random)
    places = []
    for row in range(B):
        for h in range(H):
            of_items = [
                ((firsts[row] + item) * G + h // group) * TILE + inside[row] * group + h % group
                for item in range(items[row])
            ]
            of_tail = [tails_at + (row * count + run) * H + h for run in range(count)]
            none = [-1] * (max(items) - items[row])
            places.append(of_items + of_tail + none)
    numbers = [[0, 0, 0, *of_row] for of_row in zip(firsts, items, inside, strict=True)]
    places_RS = torch.tensor(places, dtype=torch.int64)
    state = _merged(out_PD, lse_P, places_RS, (B, 1, H, D))
    runs = Runs(
        shape=(B, 1, H, D),
        out_PD=out_PD.to(device),
        lse_P=lse_P.to(device),
        count=count,
        table=RunTable(
            rows=torch.tensor(numbers, dtype=torch.int32, device=device),
            tails_at=tails_at,
            kv_heads=G,
            tile_size=TILE,
        ),
        merged=lambda: state,
    )
    return runs, State(*(t.to(device) for t in state))
