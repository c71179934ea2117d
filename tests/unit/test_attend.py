"""Every kernel that runs on CPU, and attention by blocks, shards and tails, against the oracle in float64.

The budget is twice the error of a plain implementation in the working dtype (tests/tolerances.py). Law 1 at this level: one
block is dense. Axes: B batch, Q queries, K keys, L context tokens, T tail tokens, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from star_attention.attention import kernels
from star_attention.attention.attend import Rule, attend
from star_attention.attention.blocks import block_attention, shard_attention, tail_attention
from star_attention.attention.kernels import KERNELS, Call
from star_attention.attention.oracle import law_mask, masked_attention
from star_attention.attention.state import State, merge
from star_attention.errors import UnsupportedCallError
from star_attention.planning.plan import BlockPlan
from tests.tolerances import FACTOR, FLOOR

CALL = Call(device="cpu", dtype=torch.float32, queries=7, keys=9, heads=6, kv_heads=3, head_size=64)
CPU_KERNELS = [name for name in KERNELS if not kernels.load(name).unsupported(CALL)]
DTYPES = list(FLOOR)
GQA, MQA, MHA = (6, 3), (6, 1), (5, 5)
# Of keys and of values: one size, MLA's two, and values wider than keys.
SIZES = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (80, 112)]
SHAPES = [
    *((GQA, sizes) for sizes in SIZES),
    (MQA, (64, 64)),
    (MQA, (192, 128)),
    (MHA, (64, 64)),
    (MHA, (192, 128)),
]
BATCH = 2


@dataclass(frozen=True)
class Case:
    """`Q` queries that stand `offset` after the first of `K` keys; `hidden` first keys of each batch row are void."""

    Q: int
    K: int
    offset: int
    window: int | None = None
    softcap: float | None = None
    hidden: tuple[int, int] | None = None

    def keep(self) -> Tensor:
        """Which keys each query sees, `[B, Q, K]`."""
        ahead_QK = torch.arange(self.Q)[:, None] + self.offset - torch.arange(self.K)[None]
        keep_QK = ahead_QK >= 0
        if self.window is not None:
            keep_QK = keep_QK & (ahead_QK < self.window)
        hidden_B11 = torch.tensor(self.hidden or (0, 0))[:, None, None]
        return keep_QK[None] & (torch.arange(self.K)[None, None] >= hidden_B11)

    def key_mask(self) -> Tensor | None:
        if self.hidden is None:
            return None
        return torch.arange(self.K)[None] >= torch.tensor(self.hidden)[:, None]


CASES = {
    "square": Case(37, 37, 0),
    "rectangle": Case(37, 53, 60),
    "rectangle that just sees all": Case(37, 53, 52),
    "one key is out of sight": Case(37, 53, 51),
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


def tensors(
    case: Case, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; the latter two in the order in which a cache keeps them."""
    generator = torch.Generator().manual_seed(case.Q * 100 + case.K)
    (H, G), (D, V) = heads, sizes
    q_BQHD = torch.randn(BATCH, case.Q, H, D, generator=generator)
    k_BGKD, v_BGKD = (torch.randn(BATCH, G, case.K, size, generator=generator) for size in (D, V))
    return q_BQHD.to(dtype), k_BGKD.to(dtype).transpose(1, 2), v_BGKD.to(dtype).transpose(1, 2)


def plain(q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, keep_BQK: Tensor, rule: Rule) -> State:
    """Attention as anybody would write it, every step in the working dtype."""
    groups = q_BQHD.shape[2] // k_BKGD.shape[2]
    k_BKHD, v_BKHD = (t.repeat_interleave(groups, 2) for t in (k_BKGD, v_BKGD))
    scores_BHQK = torch.einsum("bqhd,bkhd->bhqk", q_BQHD, k_BKHD) * rule.scale
    if rule.softcap is not None:
        scores_BHQK = torch.tanh(scores_BHQK / rule.softcap) * rule.softcap
    scores_BHQK = scores_BHQK.masked_fill(~keep_BQK[:, None], float("-inf"))
    weights_BHQK = torch.softmax(scores_BHQK, -1).nan_to_num(0.0)
    out_BQHD = torch.einsum("bhqk,bkhd->bqhd", weights_BHQK, v_BKHD)
    return State(out_BQHD, torch.logsumexp(scores_BHQK, -1).transpose(1, 2))


def error(actual: Tensor, exact: Tensor) -> float:
    """The largest difference; where one of them is infinite, both must be."""
    assert actual.shape == exact.shape
    assert torch.equal(actual.isinf(), exact.isinf())
    finite = ~exact.isinf()
    return (actual.double() - exact.double())[finite].abs().max().item() if finite.any() else 0.0


def assert_within_budget(
    state: State, q_BQHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, keep_BQK: Tensor, rule: Rule
) -> None:
    exact = masked_attention(
        q_BQHD, k_BKGD, v_BKGD, keep_BQK, scale=rule.scale, softcap=rule.softcap
    )
    rough = plain(q_BQHD, k_BKGD, v_BKGD, keep_BQK, rule)
    assert state.lse_BQH.dtype == torch.float32
    for ours, theirs, truth in zip(state, rough, exact, strict=True):
        assert not ours.isnan().any()
        budget = FACTOR * error(theirs, truth) + FLOOR[q_BQHD.dtype]
        assert error(ours, truth) <= budget
    empty_BQ = ~keep_BQK.any(-1)
    assert (state.out_BQHD[empty_BQ] == 0).all()
    assert (state.lse_BQH[empty_BQ] == float("-inf")).all()


def rule_of(case: Case, D: int) -> Rule:
    return Rule(scale=D**-0.5, window=case.window, softcap=case.softcap)


def test_there_are_kernels_to_test() -> None:
    assert {"cpu_flash", "math"} <= set(CPU_KERNELS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [None, *CPU_KERNELS])
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_oracle(name: str, kernel: str | None, dtype: torch.dtype) -> None:
    case = CASES[name]
    forced = [kernel] if kernel else list(KERNELS)
    if all(
        kernels.load(k).unsupported(replace(CALL, dtype=dtype, softcap=case.softcap))
        for k in forced
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
        assert_within_budget(state, q_BQHD, k_BKGD, v_BKGD, case.keep(), rule)


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
    q_BQHD, k_BKGD, v_BKGD = tensors(case, (6, 3), (16, 16), torch.float32)
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
    assert_within_budget(state, q_BQHD, k_BKGD, v_BKGD, case.keep(), rule)


@pytest.mark.parametrize(
    "case", [Case(37, 37, 0), Case(37, 53, 60), Case(37, 53, 16, hidden=(0, 21))], ids=str
)
def test_math_is_the_same_in_small_pieces(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limits are beyond what a test can afford, so they are lowered."""
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
    assert_within_budget(state, q_BQHD, k_BKGD, v_BKGD, case.keep(), rule)


def test_causal_calls_are_aligned_at_the_last_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """`attend` asks for square ones only, but the contract of a call is wider."""
    case = Case(37, 53, 16)
    q_BQHD, k_BKGD, v_BKGD = tensors(case, GQA, (16, 16), torch.float32)
    call = replace(CALL, queries=37, keys=53, head_size=16, causal=True)
    able = [name for name in CPU_KERNELS if not kernels.load(name).unsupported(call)]
    assert "math" in able
    for name in [*able, "math"]:
        state = kernels.load(name).attend(
            q_BQHD, k_BKGD, v_BKGD, call=call, scale=0.25, mask_BQK=None
        )
        assert_within_budget(state, q_BQHD, k_BKGD, v_BKGD, case.keep(), Rule(scale=0.25))
        monkeypatch.setattr(kernels.load("math"), "MAX_SCORES", 700)
        monkeypatch.setattr(kernels.load("math"), "MAX_KEYS", 10)


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_large_scores_do_not_overflow(kernel: str) -> None:
    case = Case(37, 53, 16)
    q_BQHD, k_BKGD, v_BKGD = tensors(case, (6, 3), (64, 64), torch.float32)
    rule = Rule(scale=100.0)
    state = attend(q_BQHD, k_BKGD, v_BKGD, rule=rule, offset=16, kernel=kernel)
    assert_within_budget(state, q_BQHD, k_BKGD, v_BKGD, case.keep(), rule)


# ---------------------------------------------------------------------- choosing


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
    assert any(reason in one for one in kernels.load(kernel).unsupported(call)), kernels.load(
        kernel
    ).unsupported(call)
    assert kernels.find(call, kernel) is None
    with pytest.raises(UnsupportedCallError) as caught:
        kernels.choose(call, kernel)
    assert reason in str(caught.value)
    assert str(caught.value).count("; ") == 0, "only the kernel that was asked for"


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
def test_the_first_kernel_that_can_is_chosen(change: dict[str, object], chosen: str) -> None:
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
    """Forbids a silent fall back."""
    case = Case(37, 53, 16, softcap=2.0)
    q_BQHD, k_BKGD, v_BKGD = tensors(case, (6, 3), (64, 64), torch.float32)
    with pytest.raises(UnsupportedCallError, match="cpu_flash: has no softcap"):
        attend(q_BQHD, k_BKGD, v_BKGD, rule=rule_of(case, 64), offset=16, kernel="cpu_flash")


# ---------------------------------------------------------------------- phase 1: blocks

LENGTH, H, G, D, V = 101, 6, 3, 16, 12


def context(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return tensors(Case(LENGTH, LENGTH, 0), (H, G), (D, V), dtype)


def by_blocks(
    plan: BlockPlan, forward: int, rule: Rule, q_BLHD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor
) -> State:
    """Phase 1's attention, one forward after the other, with what phase 1 hands to each."""
    parts = []
    for span in plan.spans(forward):
        mine, before = slice(span.start, span.stop), slice(span.block_start, span.start)
        state = block_attention(
            q_BLHD[:, mine],
            (k_BLGD[:, mine], v_BLGD[:, mine]),
            anchor=(k_BLGD[:, : plan.anchor_size], v_BLGD[:, : plan.anchor_size])
            if span.block_start > 0 and plan.anchor_size
            else None,
            earlier=(k_BLGD[:, before], v_BLGD[:, before])
            if span.start > span.block_start
            else None,
            start=span.start,
            block_start=span.block_start,
            block_size=plan.block_size,
            anchor_size=plan.anchor_size,
            rule=rule,
        )
        assert state.out_BQHD.shape == (BATCH, span.tokens, H, V)
        parts.append(state)
    return State(
        torch.cat([s.out_BQHD.float() for s in parts], 1), torch.cat([s.lse_BQH for s in parts], 1)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rule", [Rule(scale=0.3), Rule(scale=0.3, softcap=2.0)], ids=["plain", "softcap"]
)
@pytest.mark.parametrize("window", [None, 1, 13, 30, 90])
@pytest.mark.parametrize(
    ("block", "anchor"),
    [(20, 20), (20, 7), (20, 0), (20, 1), (101, 9), (200, 200), (1, 1), (50, 50)],
)
def test_blocks_equal_the_law(
    block: int, anchor: int, window: int | None, rule: Rule, dtype: torch.dtype
) -> None:
    """Blocks as a batch, one block at a time, and pieces of blocks; the last one is ragged."""
    q_BLHD, k_BLGD, v_BLGD = context(dtype)
    plan = BlockPlan(context_tokens=LENGTH, block_size=block, anchor_size=anchor)
    rule = replace(rule, window=window)
    at_L = torch.arange(LENGTH)
    keep_LL = law_mask(
        at_L, at_L, context_tokens=LENGTH, block_size=block, anchor_size=anchor, window=window
    )
    if block >= LENGTH and window is None:
        assert torch.equal(keep_LL, torch.ones_like(keep_LL).tril()), "law 1: one block is dense"
    for forward in (7, 20, 45, 1000):
        state = by_blocks(plan, forward, rule, q_BLHD, k_BLGD, v_BLGD)
        assert_within_budget(state, q_BLHD, k_BLGD, v_BLGD, keep_LL.expand(BATCH, -1, -1), rule)


def test_a_forward_holds_whole_blocks_or_a_piece_of_one() -> None:
    q_BLHD, k_BLGD, v_BLGD = context(torch.float32)
    with pytest.raises(AssertionError, match="whole blocks or a piece of one"):
        block_attention(
            q_BLHD[:, :30],
            (k_BLGD[:, :30], v_BLGD[:, :30]),
            anchor=None,
            earlier=None,
            start=0,
            block_start=0,
            block_size=20,
            anchor_size=0,
            rule=Rule(scale=0.3),
        )


# ---------------------------------------------------------------------- phase 2: shard and tail


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 9, 40, 300])
@pytest.mark.parametrize("padding", [[0, 0], [0, 4], [8, 3]])
@pytest.mark.parametrize(("tail", "queries"), [(9, 9), (23, 9), (14, 1)])
def test_shard_and_tail_equal_the_law(
    tail: int,
    queries: int,
    padding: list[int],
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    """Rows share one context and are padded on the left; each equals what it would be alone, at its own positions."""
    rule = Rule(scale=0.3, window=window, softcap=softcap)
    q_BTHD, k_BTGD, v_BTGD = tensors(Case(tail, tail, 0), (H, G), (D, V), dtype)
    q_BQHD = q_BTHD[:, tail - queries :]
    _, k_BLGD, v_BLGD = context(dtype)
    shard = k_BLGD[:1], v_BLGD[:1]
    before = tail - queries
    offsets = [LENGTH + before - pad for pad in padding]
    over_shard = shard_attention(q_BQHD, shard, rule=rule, offsets=offsets)
    over_tail = tail_attention(q_BQHD, k_BTGD, v_BTGD, rule=rule, padding=padding)
    state = merge([over_shard, over_tail])
    assert not state.out_BQHD.isnan().any()
    for b, pad in enumerate(padding):
        gap = max(0, pad - before)  # void queries: nothing looks at them
        keys, values = (
            torch.cat([s, t[b : b + 1, pad:]], 1)
            for s, t in zip(shard, (k_BTGD, v_BTGD), strict=True)
        )
        at_K = torch.arange(LENGTH + tail - pad)
        at_Q = at_K[len(at_K) - queries + gap :]
        # Queries and answers are no context tokens: they see every block. (The size of blocks does not matter.)
        keep_QK = law_mask(
            at_Q, at_K, context_tokens=LENGTH, block_size=20, anchor_size=0, window=window
        )
        mine = State(state.out_BQHD[b : b + 1, gap:], state.lse_BQH[b : b + 1, gap:])
        assert_within_budget(mine, q_BQHD[b : b + 1, gap:], keys, values, keep_QK[None], rule)


def test_the_law_lets_a_query_see_everything_and_a_block_itself_and_the_anchor() -> None:
    """The oracle itself, written out by hand once."""
    at = torch.arange(8)
    keep = law_mask(at, at, context_tokens=6, block_size=2, anchor_size=1)
    assert ["".join(".x"[int(one)] for one in row) for row in keep.tolist()] == [
        "x.......",
        "xx......",
        "x.x.....",
        "x.xx....",
        "x...x...",
        "x...xx..",
        "xxxxxxx.",
        "xxxxxxxx",
    ]
    windowed = law_mask(at, at, context_tokens=6, block_size=2, anchor_size=1, window=4)
    assert ["".join(".x"[int(one)] for one in row) for row in windowed.tolist()] == [
        "x.......",
        "xx......",
        "x.x.....",
        "x.xx....",
        "....x...",
        "....xx..",
        "...xxxx.",
        "....xxxx",
    ]


def test_a_newer_flash_attention_is_taken_where_it_was_activated() -> None:
    """It goes before cuDNN, which goes before torch's own FlashAttention 2. (Which of them can run, only a GPU says.)"""
    call = replace(CALL, device="cuda", dtype=torch.bfloat16, queries=9, head_size=128, causal=True)
    assert kernels._in_order() == list(KERNELS)
    torch.nn.attention.register_flash_attention_impl("made up", register_fn=lambda: Activated())
    torch.nn.attention.activate_flash_attention_impl("made up")
    try:
        assert kernels._in_order()[:2] == ["cuda_flash", "cudnn"]
        assert kernels.choose(call) == "cuda_flash"
        assert kernels.choose(replace(call, softcap=30.0)) == "math", (
            "what it cannot do goes elsewhere"
        )
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert kernels._in_order() == list(KERNELS)


class Activated:
    def remove(self) -> None:
        pass
