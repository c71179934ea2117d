"""Phase 2's attention over a context and each row's tail, spelled out in float64, for the tests of the kernel on CPU and GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from star_attention.attention.state import State
from star_attention.storage.kv import quantize


@dataclass(frozen=True, kw_only=True)
class Case:
    """R rows of Q new tokens, L context tokens, T tail tokens before them; heads H over G, head size D."""

    R: int = 1
    Q: int = 1
    H: int = 8
    G: int = 2
    D: int = 64
    L: int = 300
    T: int = 5
    padding: tuple[int, ...] = (0,)
    window: int | None = None
    softcap: float | None = None
    fp8: bool = False


CASES = {
    "one token": Case(),
    "no tail yet": Case(T=0, L=257, G=1, D=128),
    "padded rows": Case(R=3, padding=(0, 3, 7), T=20, H=4, G=4, D=80),
    "a query": Case(R=2, Q=33, padding=(0, 3), T=0),
    "a query behind a tail": Case(Q=20, T=9, window=17, padding=(4,), H=4),
    "a window": Case(R=5, padding=(0, 0, 60, 1, 2), T=70, L=100, H=32, window=90),
    "a window that ends in the tail": Case(T=70, window=30),
    "a softcap": Case(R=2, padding=(0, 0), softcap=30.0, D=96),
    "more rows than a tile": Case(R=20, padding=(0,) * 20, H=16, G=2, T=3, L=90),
    "one key": Case(L=1, T=0),
    "fp8": Case(T=70, L=290, fp8=True),
    "fp8, a padded query": Case(R=2, Q=18, padding=(0, 3), T=4, D=80, window=150, fp8=True),
}


@dataclass(kw_only=True)
class Setup:
    """The tensors of a case; the kernel reads the tail where `append` has put the new keys and values."""

    case: Case
    held: list[Tensor]  # that their addresses stay good
    q_RQHD: Tensor
    k_GLD: Tensor
    v_GLD: Tensor
    tail_k_RGCD: Tensor
    tail_v_RGCD: Tensor
    k_RGQD: Tensor
    v_RGQD: Tensor
    table: Tensor
    lengths: Tensor
    padding_R: Tensor


def setup(case: Case, dtype: torch.dtype, device: str) -> Setup:
    capacity = case.T + case.Q + 11

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, dtype)

    k_GLD, v_GLD = (random(case.G, case.L, case.D) for _ in range(2))
    tail_k, tail_v = (random(case.R, case.G, capacity, case.D) for _ in range(2))
    new_k, new_v = (random(case.R, case.Q, case.G, case.D).transpose(1, 2) for _ in range(2))
    held = [k_GLD, v_GLD, tail_k, tail_v]
    if case.fp8:
        (k8, k_scale), (v8, v_scale) = quantize(k_GLD), quantize(v_GLD)
        held = [k8, v8, tail_k, tail_v, k_scale, v_scale]
        k_GLD, v_GLD = k8.double() * k_scale[..., None], v8.double() * v_scale[..., None]
    addresses = [[0] * 6, [*(t.data_ptr() for t in held), *[0] * (6 - len(held))]]
    return Setup(
        held=held,
        case=case,
        q_RQHD=random(case.R, case.Q, case.H, case.D),
        k_GLD=k_GLD,
        v_GLD=v_GLD,
        tail_k_RGCD=tail_k,
        tail_v_RGCD=tail_v,
        k_RGQD=new_k,
        v_RGQD=new_v,
        table=torch.tensor(addresses, device=device),
        lengths=torch.tensor([case.L, case.T, capacity], device=device),
        padding_R=torch.tensor(case.padding, dtype=torch.int32, device=device),
    )


def expected(made: Setup, scale: float) -> State:
    """In float64, with what is in the tail's buffers."""
    case, outs, lses = made.case, [], []
    last = case.T + case.Q
    for row, padding in enumerate(case.padding):
        k_HKD, v_HKD = (
            torch.cat([whole, tail[row, :, :last]], 1)
            .repeat_interleave(case.H // case.G, 0)
            .double()
            .cpu()
            for whole, tail in ((made.k_GLD, made.tail_k_RGCD), (made.v_GLD, made.tail_v_RGCD))
        )
        scores = torch.einsum("qhd,hkd->qhk", made.q_RQHD[row].double().cpu(), k_HKD) * scale
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        keys = torch.cat([torch.arange(case.L), case.L + torch.arange(last) - padding])
        queries = case.L + case.T - padding + torch.arange(case.Q)
        seen_QK = keys[None] <= queries[:, None]
        if case.window is not None:
            seen_QK &= queries[:, None] - keys[None] < case.window
        seen_QK[:, case.L : case.L + padding] = False
        scores = scores.masked_fill(~seen_QK[:, None], float("-inf"))
        outs.append(torch.einsum("qhk,hkd->qhd", scores.softmax(-1).nan_to_num(0.0), v_HKD))
        lses.append(scores.logsumexp(-1))
    return State(torch.stack(outs), torch.stack(lses))


def real_rows(case: Case) -> Tensor:
    """Which queries are no filler, bool `[R, Q]`."""
    return torch.arange(case.Q)[None] + case.T >= torch.tensor(case.padding)[:, None]
