"""Every attention kernel that runs on a CPU against the oracle in float64.

The budget is twice the error of a plain implementation in the working dtype (tests/tolerances.py).

Axes: B batch, Q queries, K keys, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from star_attention.attention import kernels
from star_attention.attention.attend import Rule, attend
from star_attention.attention.kernels import KERNELS, Call
from tests.attention_cases import (
    DTYPES,
    Case,
    Right,
    assert_within_budget,
    right_of,
    rule_of,
    tensors,
)

CALL = Call(device="cpu", dtype=torch.float32, queries=7, keys=9, heads=6, kv_heads=3, head_size=64)
CPU_KERNELS = [name for name in KERNELS if not kernels.load(name).unsupported(CALL)]
GQA, MQA, MHA = (6, 3), (6, 1), (5, 5)
# Head sizes of keys and values: the same, MLA's, and values wider than keys.
SIZES = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (80, 112)]
SHAPES = [
    *((GQA, sizes) for sizes in SIZES),
    (MQA, (64, 64)),
    (MQA, (192, 128)),
    (MHA, (64, 64)),
    (MHA, (192, 128)),
]

CASES = {
    "square": Case(37, 37, 0),
    "rectangle": Case(37, 53, 60),
    "rectangle that sees just all keys": Case(37, 53, 52),
    "one key is invisible": Case(37, 53, 51),
    "end of the keys": Case(37, 53, 16),
    "keys after the queries": Case(37, 53, 5),
    "before the keys": Case(37, 53, -10),
    "wholly before the keys": Case(37, 53, -37),
    "one query": Case(1, 53, 52),
    "one query, packed": Case(1, 53, 99),
    "one key": Case(37, 1, 0),
    "window": Case(37, 53, 16, window=7),
    "window of one": Case(37, 37, 0, window=1),
    "window wider than all": Case(37, 53, 16, window=60),
    "window that reaches the anchor in part": Case(37, 11, 20, window=25),
    "window beyond the keys": Case(37, 11, 40, window=20),
    "window square": Case(37, 37, 0, window=20),
    "padding": Case(37, 53, 16, hidden=(0, 21)),
    "padding and window": Case(37, 53, 16, window=9, hidden=(3, 21)),
    "all padding": Case(37, 53, 16, hidden=(53, 4)),
    "padding of one query": Case(1, 53, 52, hidden=(0, 21)),
    "softcap": Case(37, 53, 16, softcap=2.0),
    "softcap and window": Case(37, 53, 16, window=9, softcap=2.0),
}


def test_there_are_kernels_to_test() -> None:
    assert {"cpu_flash", "math"} <= set(CPU_KERNELS)


@functools.cache
def right(name: str, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype) -> Right:
    """What all kernels have to compute, computed once for all of them."""
    case = CASES[name]
    return right_of(*tensors(case, heads, sizes, dtype), case.visible(), rule_of(case, sizes[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [None, *CPU_KERNELS])
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_oracle(name: str, kernel: str | None, dtype: torch.dtype) -> None:
    case = CASES[name]
    candidates = [kernel] if kernel else list(KERNELS)
    if all(
        kernels.load(candidate).unsupported(replace(CALL, dtype=dtype, softcap=case.softcap))
        for candidate in candidates
    ):
        pytest.skip(f"{kernel} has no softcap")
    for heads, sizes in SHAPES:
        q_BQHD, k_BKGD, v_BKGD = tensors(case, heads, sizes, dtype)
        rule = rule_of(case, sizes[0])
        state = attend(
            q_BQHD,
            k_BKGD,
            v_BKGD,
            rule=rule,
            offset=case.offset,
            key_mask_BK=case.key_mask(),
            kernel=kernel,
        )
        right(name, heads, sizes, dtype).check(state)


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize(
    "case",
    [
        Case(1100, 1300, 200, window=150),
        Case(1100, 1300, 200, hidden=(7, 600)),
        Case(1100, 1300, 200, window=150, hidden=(7, 600)),
        Case(1100, 1300, 190),
        Case(600, 2111, 2200),
    ],
    ids=str,
)
def test_many_rows_are_cut_into_chunks(case: Case, kernel: str) -> None:
    """Masks are written out 512 rows at a time."""
    q_BQHD, k_BKGD, v_BKGD = tensors(case, (3, 1), (16, 16), torch.float32)
    rule = rule_of(case, 16)
    state = attend(
        q_BQHD,
        k_BKGD,
        v_BKGD,
        rule=rule,
        offset=case.offset,
        key_mask_BK=case.key_mask(),
        kernel=kernel,
    )
    assert_within_budget(state, q_BQHD, k_BKGD, v_BKGD, case.visible(), rule)


@pytest.mark.parametrize(
    "case", [Case(37, 37, 0), Case(37, 53, 60), Case(37, 53, 16, hidden=(0, 21))], ids=str
)
def test_math_is_the_same_in_small_pieces(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of its pieces are too large for a test, so they are lowered."""
    module = kernels.load("math")
    monkeypatch.setattr(module, "MAX_SCORES", 700)
    monkeypatch.setattr(module, "MAX_KEYS", 10)
    q_BQHD, k_BKGD, v_BKGD = tensors(case, (6, 3), (16, 24), torch.float32)
    rule = rule_of(case, 16)
    state = attend(
        q_BQHD,
        k_BKGD,
        v_BKGD,
        rule=rule,
        offset=case.offset,
        key_mask_BK=case.key_mask(),
        kernel="math",
    )
    assert_within_budget(state, q_BQHD, k_BKGD, v_BKGD, case.visible(), rule)


def test_causal_calls_are_aligned_at_the_last_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """`attend` makes square calls only, but the contract of a call is wider."""
    case = Case(37, 53, 16)
    q_BQHD, k_BKGD, v_BKGD = tensors(case, GQA, (16, 16), torch.float32)
    call = replace(CALL, queries=37, keys=53, head_size=16, causal=True)
    names = [name for name in CPU_KERNELS if not kernels.load(name).unsupported(call)]
    assert "math" in names
    for name in [*names, "math"]:
        state = kernels.load(name).attend(
            q_BQHD, k_BKGD, v_BKGD, call=call, scale=0.25, mask_BQK=None
        )
        assert_within_budget(state, q_BQHD, k_BKGD, v_BKGD, case.visible(), Rule(scale=0.25))
        monkeypatch.setattr(kernels.load("math"), "MAX_SCORES", 700)
        monkeypatch.setattr(kernels.load("math"), "MAX_KEYS", 10)


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_large_scores_do_not_overflow(kernel: str) -> None:
    case = Case(37, 53, 16)
    q_BQHD, k_BKGD, v_BKGD = tensors(case, (6, 3), (64, 64), torch.float32)
    rule = Rule(scale=100.0)
    state = attend(q_BQHD, k_BKGD, v_BKGD, rule=rule, offset=16, kernel=kernel)
    assert_within_budget(state, q_BQHD, k_BKGD, v_BKGD, case.visible(), rule)
