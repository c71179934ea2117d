"""The highest of many scores on a GPU, and copies to the host beside its work."""

from __future__ import annotations

import pytest
import torch

from star_attention.hf.execution.sampling import AsyncCopy, highest

pytest.importorskip("triton")

from tests.highest_scores import VOCABULARIES, check

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_highest_is_the_first_of_equal_ones(dtype: torch.dtype, vocabulary: int) -> None:
    check("cuda", dtype, vocabulary)


def test_copies_hold_what_was_there() -> None:
    """Also of memory that is free, and written to, right after; of many copies at once."""
    copies = []
    for number in range(200):
        # Long enough for the copy to be asked for before its values are there.
        busy = torch.randn(512, 512, device="cuda")
        values_R = (busy @ busy).argmax(-1) * 0 + number
        copies.append(AsyncCopy(values_R))
        del values_R
        torch.full((512,), -1, dtype=torch.int64, device="cuda")
    assert all(copy.wait() == [number] * 512 for number, copy in enumerate(copies))


def test_torch_chooses_where_the_kernel_does_not() -> None:
    scores_RV = torch.randn(3, 1000, device="cuda", dtype=torch.float64)
    assert torch.equal(highest(scores_RV), scores_RV.argmax(-1))
