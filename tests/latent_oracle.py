"""Attention over MLA's compressed keys in float64: the oracle of `triton_latent`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from star_attention.attention.attend import Rule
from star_attention.attention.state import State
from star_attention.storage.kv import quantize


@dataclass(frozen=True, kw_only=True)
class Case:
    """Lengths of the axes, as in `triton_latent`; L context tokens, T of the tail before."""

    R: int = 1
    Q: int = 1
    H: int = 16
    C: int = 32
    P: int = 16
    L: int = 300
    T: int = 5
    padding: tuple[int, ...] = (0,)
    fp8: bool = False


CASES = {
    "one token": Case(),
    "no tail yet": Case(T=0, L=257, H=5),
    "odd sizes": Case(C=20, P=8, H=6, L=90),
    "sizes of DeepSeek": Case(C=512, P=64, H=16, L=70),
    "padded rows": Case(R=3, padding=(0, 3, 7), T=20, H=4),
    "a query": Case(R=2, Q=18, padding=(0, 3), T=0, H=6, L=70),
    "more heads than a tile": Case(H=128, L=90, T=3),
    "one key": Case(L=1, T=0),
    "fp8": Case(T=70, L=290, fp8=True),
    "fp8, a padded query": Case(R=2, Q=9, H=6, padding=(0, 3), T=4, L=90, fp8=True),
}
SHARDS = {
    "two ranks": [[(0, 130)], [(130, 300)]],
    "an idle rank": [[(0, 300)], []],
    "stripes": [[(0, 50), (100, 150), (240, 300)], [(50, 100), (150, 240)]],
}


class Tensors:
    """The tensors of a case on a device."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.case, self.capacity = case, case.T + case.Q + 11

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape).to(device, dtype)

        c, r = random(1, case.L, case.C), random(1, case.L, case.P)
        self.q_RQHE = random(case.R, case.Q, case.H, case.C + case.P)
        self.stored = [c, r]
        self.context = [stored.double() for stored in self.stored]
        if case.fp8:
            (c8, c_scale), (r8, r_scale) = quantize(c), quantize(r)
            self.stored = [c8, r8, c_scale, r_scale]
            self.context = [c8.double() * c_scale[..., None], r8.double() * r_scale[..., None]]
        self.tails = [random(case.R, 1, self.capacity, size) for size in (case.C, case.P)]
        # As models have them: views of tensors by token.
        self.new = [random(case.R, case.Q, 1, size).transpose(1, 2) for size in (case.C, case.P)]

    def tables(
        self, segments: list[tuple[int, int]], *, holds_tail: bool = True
    ) -> tuple[Any, list[Tensor]]:
        from star_attention.attention.kernels import triton_answer

        device = self.q_RQHE.device
        tokens = torch.cat([torch.arange(0), *(torch.arange(*run) for run in segments)])
        c, r, *scales = (tensor[:, tokens.to(device)].contiguous() for tensor in self.stored)
        addressed = [c, r, *self.tails, *scales]
        lengths = triton_answer.lengths(
            segments,
            context_tokens=self.case.L,
            tail_tokens=self.case.T,
            capacity=self.capacity,
            holds_tail=holds_tail,
        )
        tables = triton_answer.KVTables(
            addresses=triton_answer.addresses([[], addressed]).to(device),
            lengths=lengths[None].to(device),
            padding_R=torch.tensor(self.case.padding, dtype=torch.int32, device=device),
        )
        return tables, addressed

    def attend(self, segments: list[tuple[int, int]], *, holds_tail: bool = True) -> State:
        from star_attention.attention.kernels import triton_latent

        tables, _addressed = self.tables(segments, holds_tail=holds_tail)
        triton_latent.append(*self.new, tables=tables, layer=1)
        return triton_latent.attend(
            self.q_RQHE,
            self.case.C,
            tables=tables,
            layer=1,
            rule=Rule(scale=0.2),
            fp8=self.case.fp8,
            splits=3,
        )

    def expected(self) -> State:
        """Compute the attention in float64."""
        case, outs, lses = self.case, [], []
        last = case.T + case.Q
        for row, padding in enumerate(case.padding):
            c_KC, r_KP = (
                torch.cat([whole[0], tail[row, 0, :last].double()]).cpu()
                for whole, tail in zip(self.context, self.tails, strict=True)
            )
            scores = 0.2 * self.q_RQHE[row].double().cpu() @ torch.cat([c_KC, r_KP], 1).T
            at = torch.arange(case.L + last) - case.L
            visible_QK = at[None] <= case.T + torch.arange(case.Q)[:, None]
            visible_QK &= (at < 0) | (at >= padding)
            scores = scores.masked_fill(~visible_QK[:, None], float("-inf"))
            outs.append(scores.softmax(-1) @ c_KC)
            lses.append(scores.logsumexp(-1))
        return State(torch.stack(outs), torch.stack(lses))

    def check(self, state: State, tolerance: float) -> None:
        out, lse = state
        right, case = self.expected(), self.case
        real = torch.arange(case.Q)[None] + case.T >= torch.tensor(case.padding)[:, None]
        error = (out.double().cpu() - right.out_BQHD)[real].norm()
        assert error <= tolerance * right.out_BQHD[real].norm()
        torch.testing.assert_close(
            lse.double().cpu()[real], right.lse_BQH[real], atol=1e-3, rtol=1e-4
        )
