"""The highest of many scores in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

from tests.highest_scores import VOCABULARIES, check  # noqa: E402


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_highest_is_the_first_of_equal_ones(dtype: torch.dtype, vocabulary: int) -> None:
    check("cpu", dtype, vocabulary)
