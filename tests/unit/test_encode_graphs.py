"""The logic of phase 1's CUDA graphs: everything but the capture, which needs a GPU.

A stand-in for a graph runs the captured work at each replay, and kernels run in Triton's
interpreter. tests/gpu/test_short_cuda.py tests real graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from star_attention import EncodedContext, StarLLM
from star_attention.planning.plan import BlockPlan, Span
from tests.engines import engine, ids, tiny
from tests.recorders import CountingGraphs, with_graphs

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

SIZES: dict[str, Any] = dict(block_size=24, anchor_size=10, tokens_per_forward=256)


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from star_attention.hf.execution import encode_graphs

    monkeypatch.setattr(encode_graphs, "STEP", 32)


def pair(name: str, **settings: Any) -> tuple[StarLLM, StarLLM, CountingGraphs]:
    """Make the same engine without graphs and with them."""
    plain, fast = (engine(name, **(SIZES | settings)) for _ in range(2))
    counting = with_graphs(fast)
    counting.recorder.always_warms_up = True
    counting.of_encoding.is_on = True
    return plain, fast, counting


def assert_same(context: EncodedContext, expected: EncodedContext) -> None:
    assert context.plan == expected.plan
    for own, other in zip(context.kv.layers, expected.kv.layers, strict=True):
        assert (own.segments, own.is_empty) == (other.segments, other.is_empty)
        if own.is_empty:
            continue
        assert own.expands == other.expands
        for tensor, right in zip(own.stored(), other.stored(), strict=True):
            assert tensor.is_contiguous()
            if tensor.dtype == torch.float8_e4m3fn:
                tensor, right = tensor.float(), right.float()
            torch.testing.assert_close(tensor, right, atol=2e-5, rtol=1e-4)


SLOW = ("llama", "deepseek_v3", "gemma3n", "gpt_oss")


# Full attention; windows that drop keys; MLA, whose keys and values differ in size; shared keys.
@pytest.mark.parametrize(
    "name",
    ["gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_keys_are_those_of_plain_forwards(name: str) -> None:
    """Every length up to the graph's: padding is neither seen nor stored."""
    plain, fast, counting = pair(name)
    for number, tokens in enumerate((101, 120, 97, 120)):
        # Of 5 blocks; 101 and 97 are padded to 5 whole ones.
        content = ids(tokens, seed=number)
        assert_same(fast.encode(content), plain.encode(content))
    # The first of its kind runs as it does elsewhere.
    assert (counting.recorder.captures, counting.recorder.replays) == (1, 3)
    context, query = fast.encode(ids(101)), ids(7, seed=2)
    answer = plain.generate(context, query, max_new_tokens=3)
    assert (
        answer.token_ids
        == plain.generate(plain.encode(ids(101)), query, max_new_tokens=3).token_ids
    )


@pytest.mark.parametrize("settings", [dict(method="dense"), dict(lookback=1), dict(anchor_size=0)])
def test_methods(settings: dict[str, Any]) -> None:
    sizes = dict(block_size=None, anchor_size=None) if "method" in settings else {}
    plain, fast, counting = pair("llama", **(sizes | settings))
    for seed in range(3):
        content = ids(85, seed=seed)
        assert_same(fast.encode(content), plain.encode(content))
    assert counting.recorder.replays == 2
    assert [plan.context_tokens for _, plan in counting.of_encoding.captured] == [96]


def test_contexts_of_a_batch() -> None:
    plain, fast, counting = pair("llama", tokens_per_forward=512)
    contexts = [ids(90, seed=seed) for seed in range(3)]
    for _ in range(2):
        encoded = fast.encode(contexts)
    assert counting.recorder.replays == 1
    for context, expected in zip(encoded, plain.encode(contexts), strict=True):
        assert_same(context, expected)


def test_contexts_keep_what_a_later_replay_writes_elsewhere() -> None:
    plain, fast, _ = pair("llama")
    contents = [ids(101, seed=seed) for seed in range(4)]
    contexts = [fast.encode(content) for content in contents]
    for context, content in zip(contexts, contents, strict=True):
        assert_same(context, plain.encode(content))


def test_progress_is_reported() -> None:
    _, fast, counting = pair("llama")
    seen: list[tuple[Span, BlockPlan]] = []
    for _ in range(2):
        fast.encode(ids(101), progress=lambda span, plan: seen.append((span, plan)))
    assert counting.recorder.replays == 1
    assert seen[0] == seen[1]


@pytest.fixture
def hooked() -> Iterator[None]:
    handle = tiny("llama").get_decoder().layers[1].register_forward_hook(lambda *_: None)
    yield
    handle.remove()


@pytest.mark.usefixtures("hooked")
def test_hooks_of_others_run() -> None:
    """A graph would leave them out."""
    _, fast, counting = pair("llama")
    for _ in range(3):
        fast.encode(ids(101))
    assert counting.recorder.captures == 0


@pytest.mark.parametrize(
    "settings", [dict(kv_dtype="fp8"), dict(kv_device="cpu"), dict(tokens_per_forward=48)]
)
def test_contexts_that_no_graph_serves(settings: dict[str, Any]) -> None:
    plain, fast, counting = pair("llama", **settings)
    for _ in range(2):
        context = fast.encode(ids(101))
    assert counting.recorder.captures == 0
    assert_same(context, plain.encode(ids(101)))


def test_moved_weights_are_captured_again() -> None:
    plain, fast, counting = pair("llama")
    linear: nn.Linear = tiny("llama").get_decoder().layers[0].mlp.up_proj
    weight = linear.weight
    for _ in range(2):
        fast.encode(ids(101))
    try:
        linear.weight = nn.Parameter(2 * weight.detach())
        assert_same(fast.encode(ids(101)), plain.encode(ids(101)))
        assert counting.recorder.captures == 2
    finally:
        linear.weight = weight


def test_few_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has not been used for longest makes room."""
    from star_attention.hf.execution import encode_graphs

    monkeypatch.setattr(encode_graphs, "MOST_GRAPHS", 2)
    _, fast, counting = pair("llama")
    for tokens in (48, 48, 72, 72, 48, 96, 96):
        fast.encode(ids(tokens))
    kept = [plan.context_tokens for _, plan in counting.of_encoding.captured]
    assert kept == [48, 96]
