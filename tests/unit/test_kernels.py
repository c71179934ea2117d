"""The choice of an attention kernel: the first that can run a call, and reasons if none can."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from star_attention.attention import kernels
from star_attention.attention.attend import attend
from star_attention.attention.kernels import KERNELS, Call
from star_attention.errors import UnsupportedCallError
from tests.attention_cases import Case, rule_of, tensors

CALL = Call(device="cpu", dtype=torch.float32, queries=7, keys=9, heads=6, kv_heads=3, head_size=64)


@pytest.mark.parametrize(
    ("kernel", "change", "reason"),
    [
        ("cpu_flash", dict(device="cuda"), "runs on cpu, not cuda"),
        (
            "cpu_flash",
            dict(dtype=torch.float64),
            "takes float32, bfloat16 and float16, not torch.float64",
        ),
        ("cpu_flash", dict(softcap=5.0), "has no softcap"),
        ("cpu_flash", dict(window=5), "takes windows as masks only"),
        ("cpu_flash", dict(causal=True), "causal needs as many queries as keys"),
        ("math", dict(window=5), "takes windows as masks only"),
        *(
            (name, dict(), "runs on cuda, not cpu")
            for name in ("cudnn", "cuda_flash", "cuda_efficient")
        ),
        ("cudnn", dict(device="cuda"), "takes float16 and bfloat16, not torch.float32"),
        ("cuda_flash", dict(device="cuda", dtype=torch.bfloat16, softcap=5.0), "has no softcap"),
        (
            "cuda_flash",
            dict(device="cuda", dtype=torch.bfloat16, masked=True),
            "takes no explicit mask",
        ),
        ("cudnn", dict(device="cuda", dtype=torch.float16, head_size=256), "head sizes up to"),
        (
            "cuda_flash",
            dict(device="cuda", dtype=torch.float16, head_size=65),
            "in steps of 8, not 65",
        ),
    ],
)
def test_kernels_say_why_they_cannot_run(
    kernel: str, change: dict[str, object], reason: str
) -> None:
    call = replace(CALL, **change)
    reasons = kernels.load(kernel).unsupported(call)
    assert any(reason in stated for stated in reasons), reasons
    assert kernels.find(call, kernel) is None
    with pytest.raises(UnsupportedCallError) as caught:
        kernels.choose(call, kernel)
    assert reason in str(caught.value)
    assert str(caught.value).count("; ") == 0, "only the requested kernel"


@pytest.mark.parametrize(
    ("change", "chosen"),
    [
        (dict(), "cpu_flash"),
        (dict(dtype=torch.bfloat16), "cpu_flash"),
        (dict(queries=9, causal=True), "cpu_flash"),
        (dict(causal=True), "math"),
        (dict(softcap=5.0), "math"),
        (dict(dtype=torch.float64), "math"),
        (dict(masked=True), "cpu_flash"),
    ],
)
def test_the_first_kernel_that_can_run_is_chosen(change: dict[str, object], chosen: str) -> None:
    call = replace(CALL, **change)
    assert kernels.choose(call) == kernels.find(call) == chosen
    assert kernels.choose(call, "math") == "math"


def test_every_reason_is_listed_when_none_can() -> None:
    call = replace(CALL, window=5, dtype=torch.float64)
    with pytest.raises(UnsupportedCallError) as caught:
        kernels.choose(call)
    for name in KERNELS:
        assert f"{name}: {', '.join(kernels.load(name).unsupported(call))}" in str(caught.value)
    assert repr(call) in str(caught.value)


def test_a_forced_kernel_that_cannot_run_is_an_error() -> None:
    """Forbids a silent fallback."""
    case = Case(37, 53, 16, softcap=2.0)
    q_BQHD, k_BKGD, v_BKGD = tensors(case, (6, 3), (64, 64), torch.float32)
    with pytest.raises(UnsupportedCallError, match="cpu_flash: has no softcap"):
        attend(q_BQHD, k_BKGD, v_BKGD, rule=rule_of(case, 64), offset=16, kernel="cpu_flash")


def test_a_newer_flash_attention_is_preferred_once_activated() -> None:
    """It comes before cuDNN, which comes before torch's own FlashAttention 2.

    Only a GPU can show which of them run.
    """
    call = replace(CALL, device="cuda", dtype=torch.bfloat16, queries=9, head_size=128, causal=True)
    assert kernels._in_order() == list(KERNELS)
    torch.nn.attention.register_flash_attention_impl("fake", register_fn=lambda: Activated())
    torch.nn.attention.activate_flash_attention_impl("fake")
    try:
        assert kernels._in_order()[:2] == ["cuda_flash", "cudnn"]
        assert kernels.choose(call) == "cuda_flash"
        softcap = replace(call, softcap=30.0)
        assert kernels.choose(softcap) == "math", "another kernel runs what it cannot"
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert kernels._in_order() == list(KERNELS)


class Activated:
    def remove(self) -> None:
        pass
