"""Over NCCL, with compiled layers: keys have the same bits if rank 0 computes layers for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM, phase1
from star_attention.methods import helping
from star_attention.planning import helping as planned
from tests.gpu import ranks

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parents[2] / "models" / "needle-17m"
TOKENS = 8000


def encode_twice(comm: Any, device: str, settings: dict[str, Any]) -> tuple[bool, list[int]]:
    """Return whether both encodings have the same bits, and the bytes that each has sent."""
    star = StarLLM.from_pretrained(MODEL, dtype="bfloat16", device=device, comm=comm, **settings)
    ids = torch.randint(5, 4096, (TOKENS,), generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phase1, "_WORTH_COMPILING", 1)
        # Attention takes nearly all of the time, as it does where blocks are long.
        patch.setattr(planned, "LINEAR_PAIRS", 1)
        helped = star.encode(ids)
        patch.setattr(helping, "helps", lambda *_, **__: [])
        plain = star.encode(ids)
    pairs = zip(helped.kv.layers, plain.kv.layers, strict=True)
    same = all(
        torch.equal(left.view(torch.uint8), right.view(torch.uint8))
        for one, other in pairs
        for left, right in zip(one.stored(), other.stored(), strict=True)
    )
    return same, [context.stats[0].wire.bytes for context in (helped, plain)]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        dict(block_size=1024, tokens_per_forward=1024),
        # A block takes two forwards.
        dict(block_size=1024, tokens_per_forward=512),
        dict(block_size=1024, tokens_per_forward=1024, compile=False),
        dict(block_size=1024, tokens_per_forward=1024, kv_dtype="fp8"),
    ],
    ids=str,
)
def test_keys_have_the_same_bits(size: int, settings: dict[str, Any]) -> None:
    for same, (with_help, without) in ranks.run(encode_twice, size, settings=settings):
        assert with_help > without, "nothing was computed for others"
        assert same
