"""Layers with a sliding window keep the last window of a context, and nothing is missed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from star_attention import EncodedContext, StarLLM
from star_attention.attention.oracle import law_mask
from star_attention.bench.models import SHAPES
from star_attention.errors import InvalidInputError
from star_attention.hf.cache import encode as encoding
from star_attention.hf.shape import model_shape
from star_attention.planning import cost, stored
from star_attention.planning.edits import blocks_with_windows
from star_attention.planning.plan import BlockPlan
from star_attention.planning.segments import Segments
from star_attention.planning.windows import kept, kept_by_layer
from star_attention.storage import context as contexts
from star_attention.storage.header import FORMAT_VERSION, WINDOWS_VERSION, read_header
from tests.engines import CONTEXT, QUERY, assert_same_kv, engine, ids, tiny
from tests.families import FAMILIES
from tests.family_configs import WINDOW
from tests.tiers import in_turn

SIZES: dict[str, Any] = dict(block_size=16, anchor_size=10, reserve_tokens=64)
WINDOWED = ["mistral", "gemma2", "gemma3", "cohere2", "exaone4", "ministral", "gpt_oss", "gemma3n"]
ANSWER: dict[str, Any] = dict(max_new_tokens=4, ignore_eos=True, return_logits=True)


def pair(name: str, **settings: Any) -> tuple[StarLLM, StarLLM]:
    """An engine whose contexts keep the last window, and one whose contexts keep everything."""
    star = engine(name, **settings)
    return star.with_config(kv_windows="last"), star.with_config(kv_windows="all")


def check_answers(star: StarLLM, context: EncodedContext, right: Any, tolerance: float) -> None:
    reply = star.generate(context, ids(QUERY, seed=2), **ANSWER)
    torch.testing.assert_close(reply.logits, right.logits, atol=tolerance, rtol=tolerance)
    assert reply.token_ids == right.token_ids


def held(context: EncodedContext) -> list[int]:
    """Tokens in the buffers of each layer that stores any."""
    return [layer.stored()[0].shape[2] for layer in context.kv.layers if not layer.is_empty]


@pytest.mark.parametrize("tokens", [1, 19, 20, 101])
@pytest.mark.parametrize("window", [1, 2, 20, 101, 102, 500, None])
def test_all_that_later_tokens_see_is_kept(tokens: int, window: int | None) -> None:
    """The explicit mask of queries and of more blocks has nothing before what is kept."""
    first = kept(Segments.prefix(tokens), window, tokens)
    keys = {key for run in first for key in range(*run)}
    law: dict[str, Any] = dict(block_size=16, anchor_size=16, window=window, lookback=9)
    for context_tokens in (tokens, tokens + 40):
        later_Q, all_K = torch.arange(tokens, tokens + 40), torch.arange(tokens)
        mask_QK = law_mask(later_Q, all_K, context_tokens=context_tokens, **law)
        seen = set(mask_QK.any(0).nonzero()[:, 0].tolist())
        assert seen <= keys
        if context_tokens == tokens:
            assert seen == keys, "more is kept than is seen"


def test_ranks_keep_their_part_of_the_window() -> None:
    runs = [Segments([(0, 30)]), Segments([(30, 60), (80, 90)]), Segments([(60, 80), (90, 101)])]
    kept_runs = [kept_by_layer(run, [25, None, 500], 101, "last") for run in runs]
    assert [own[0] for own in kept_runs] == [(), ((80, 90),), ((77, 80), (90, 101))]
    assert all(own[1] == own[2] == run for own, run in zip(kept_runs, runs, strict=True))
    assert kept_by_layer(runs[2], [25, None], 101, "all") == [runs[2]] * 2


# Each turn has forwards of several blocks and of pieces.
WAYS: list[dict[str, Any]] = [
    dict(tokens_per_forward=40),
    dict(tokens_per_forward=7),
    dict(tokens_per_forward=5, lookback=2, lookback_layers="lower"),
    dict(tokens_per_forward=32, lookback=1),
    dict(tokens_per_forward=16, kv_device="cpu"),
    dict(method="dense", block_size=None, anchor_size=None, tokens_per_forward=9),
    dict(block_size=64, anchor_size=64, tokens_per_forward=12),
]


@pytest.mark.parametrize(("name", "settings"), in_turn(2, WINDOWED, WAYS), ids=str)
def test_answers_are_those_of_contexts_that_keep_everything(
    name: str, settings: dict[str, Any]
) -> None:
    last, everything = pair(name, **SIZES | settings)
    context, whole = last.encode(ids(CONTEXT)), everything.encode(ids(CONTEXT))
    windows = last.runtime.handle.windows
    expected = [CONTEXT if window is None else window - 1 for window in windows]
    layers = zip(expected, whole.kv.layers, strict=True)
    assert held(context) == [tokens for tokens, layer in layers if not layer.is_empty]
    assert set(held(whole)) == {CONTEXT}
    right = everything.generate(whole, ids(QUERY, seed=2), **ANSWER)
    check_answers(last, context, right, 1e-5)
    # What both hold is the same, token for token.
    for layer, full in zip(context.kv.layers, whole.kv.layers, strict=True):
        for run in layer.segments if not layer.is_empty else []:
            for a, b in zip(layer.slice(*run), full.slice(*run), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lookback", [0, 1])
@pytest.mark.parametrize("name", ["gemma3", "mistral", "gpt_oss"])
def test_fp8_contexts(name: str, lookback: int) -> None:
    """Windows are read as computed while encoding, where those of whole contexts are rounded."""
    settings = SIZES | dict(tokens_per_forward=16, lookback=lookback)
    last, everything = pair(name, kv_dtype="fp8", **settings)
    context = last.encode(ids(CONTEXT))
    assert min(held(context)) == WINDOW - 1
    # In forwards of whole blocks there is nothing to be read back.
    right = everything.generate(everything.encode(ids(CONTEXT)), ids(QUERY, seed=2), **ANSWER)
    check_answers(last, context, right, 1e-5)


@pytest.mark.parametrize("settings", [{}, dict(lookback=1), dict(tokens_per_forward=6)], ids=str)
@pytest.mark.parametrize("name", ["gemma3", "mistral", "gpt_oss", "gemma3n"])
def test_extended_contexts_are_those_encoded_at_once(name: str, settings: dict[str, Any]) -> None:
    star = engine(name, **SIZES, **settings)
    # Before the window is full, at the end of a block, and within one.
    context = star.encode(ids(13))
    for tokens in (26, 48, 53, CONTEXT):
        context = star.extend(context, ids(CONTEXT)[len(context) : tokens])
        fresh = star.encode(ids(tokens))
        assert context.plan == fresh.plan
        assert held(context) == held(fresh)
        assert_same_kv(context, fresh)


@pytest.mark.parametrize("name", ["gemma3", "mistral", "gemma3n"])
@pytest.mark.parametrize(
    ("start", "stop", "new", "again"),
    [
        # The block alone; the second one sees the anchor in its window, and the third does not.
        (34, 36, [7, 8], [2]),
        (18, 20, [7, 8], [0, 1]),
        (98, 101, [7, 8, 9], [6]),
        # The window of a shorter context begins where the old one has dropped tokens.
        (90, 101, [], [4, 5]),
        (101, 101, [7, 8], [6]),
    ],
)
def test_edits_encode_what_is_not_kept(
    name: str, start: int, stop: int, new: list[int], again: list[int]
) -> None:
    star = engine(name, block_size=16, anchor_size=8, tokens_per_forward=16, reserve_tokens=64)
    old = star.encode(ids(CONTEXT))
    edited = star.edit(old, start, stop, new)
    content = ids(CONTEXT)[:start] + new + ids(CONTEXT)[stop:]
    assert_same_kv(edited, star.encode(content))
    blocks = edited.plan.blocks
    assert edited.reused_tokens == len(content) - sum(
        blocks[number][1] - blocks[number][0] for number in again
    )
    everything = star.with_config(kv_windows="all")
    whole = everything.edit(everything.encode(ids(CONTEXT)), start, stop, new)
    assert whole.reused_tokens >= edited.reused_tokens


@pytest.mark.parametrize(("tokens", "more"), [(18, 14), (40, -30), (25, -8)])
def test_edits_from_and_to_contexts_that_drop_nothing(tokens: int, more: int) -> None:
    star = engine("gemma3", block_size=16, anchor_size=16, tokens_per_forward=16)
    old, new = star.encode(ids(tokens)), ids(more, seed=5) if more > 0 else []
    stop = tokens if more > 0 else tokens + more
    edited = star.edit(old, min(stop, tokens), tokens, new)
    assert_same_kv(edited, star.encode([*ids(tokens)[: min(stop, tokens)], *new]))


def test_edits_where_blocks_look_back_encode_everything_or_keep_everything() -> None:
    sizes = dict(block_size=16, anchor_size=4, lookback=1, tokens_per_forward=16)
    last, everything = pair("gemma3", **sizes)
    new = [*ids(CONTEXT)[:60], 7, 8, *ids(CONTEXT)[62:]]
    edited = last.edit(last.encode(ids(CONTEXT)), 60, 62, [7, 8])
    assert edited.reused_tokens == 0
    assert_same_kv(edited, last.encode(new))
    whole = everything.edit(everything.encode(ids(CONTEXT)), 60, 62, [7, 8])
    assert whole.reused_tokens == CONTEXT - 48
    assert_same_kv(whole, everything.encode(new))


def test_blocks_whose_windows_have_been_dropped() -> None:
    plan = BlockPlan(context_tokens=90, block_size=16, anchor_size=16, ranks=1)
    assert blocks_with_windows(plan, [], 101, [None]) == []
    # Tokens 71 to 81 are seen now, and were not.
    assert blocks_with_windows(plan, [], 101, [None, 20]) == [4, 5]
    assert blocks_with_windows(plan, [1], 90, [20]) == [0, 1]
    assert blocks_with_windows(plan, [3], 90, [20, 34]) == [0, 3]
    assert blocks_with_windows(plan, [3], 90, [20, 33]) == [3]


def test_saved_contexts_hold_the_windows(tmp_path: Path) -> None:
    """Files of which something is dropped are of a version that earlier releases refuse."""
    last, everything = pair("gemma3", **SIZES)
    right = last.generate(last.encode(ids(CONTEXT)), ids(QUERY, seed=2), **ANSWER)
    for star, name, version in (
        (last, "last", WINDOWS_VERSION),
        (everything, "all", FORMAT_VERSION),
    ):
        star.encode(ids(CONTEXT)).save(tmp_path / name)
        assert read_header(tmp_path / name)["format_version"] == version
        # The file decides; the engine that loads it does not.
        for loader in (last, everything):
            context = loader.load_context(tmp_path / name)
            check_answers(loader, context, right, 1e-5)
            assert min(held(context)) == (CONTEXT if star is everything else WINDOW - 1)
            more = loader.extend(context, [7, 8, 9])
            assert_same_kv(more, star.extend(star.encode(ids(CONTEXT)), [7, 8, 9]))
    saved = [(tmp_path / name).stat().st_size for name in ("last", "all")]
    kept_bytes = [star.encode(ids(CONTEXT)).nbytes for star in (last, everything)]
    assert saved[1] - saved[0] == pytest.approx(kept_bytes[1] - kept_bytes[0], abs=600)
    # Nothing is dropped of a short one.
    last.encode(ids(WINDOW - 1)).save(tmp_path / "short")
    assert read_header(tmp_path / "short")["format_version"] == FORMAT_VERSION


def test_files_of_earlier_versions_hold_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not say so. A second look at them works as before."""
    last, everything = pair("gemma3", **SIZES)
    header_of = contexts.header_of

    def earlier(context: EncodedContext) -> dict[str, Any]:
        header = header_of(context)
        del header["kv_windows"]
        return header

    monkeypatch.setattr(contexts, "header_of", earlier)
    everything.encode(ids(CONTEXT)).save(tmp_path / "file")
    context = last.load_context(tmp_path / "file")
    assert_same_kv(context, everything.encode(ids(CONTEXT)))
    last.generate(context, ids(QUERY), max_new_tokens=1, second_look=0.2)


def test_phase_1_does_not_hold_what_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on the tensors: stores and recent tokens of layers with a window."""
    caches: list[Any] = []
    make = encoding.EncodeCache.__init__

    def remember(cache: Any, *args: Any, **kwargs: Any) -> None:
        make(cache, *args, **kwargs)
        caches.append(cache)

    monkeypatch.setattr(encoding.EncodeCache, "__init__", remember)
    star = engine("gemma3", block_size=128, anchor_size=16, tokens_per_forward=64)
    most = 0

    def measure(*_: Any) -> None:
        nonlocal most
        tensors = [
            tensor
            for layer in caches[-1].layers
            if layer.window is not None
            for pieces in ([layer.kv._buffers or ()], layer._recent._pieces)
            for piece in pieces
            for tensor in piece
            if isinstance(tensor, torch.Tensor)
        ]
        storages = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        most = max(most, sum(storages.values()))

    context = star.encode(ids(500), progress=measure)
    windowed = [
        layer.nbytes // layer.tokens
        for layer, window in zip(context.kv.layers, star.runtime.handle.windows, strict=True)
        if window is not None
    ]
    # The stores' own, the window before a forward, and that at its end.
    assert 0 < most <= 3 * (WINDOW - 1) * sum(windowed)


@pytest.mark.parametrize("kv_dtype", [None, "fp8"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "gemma3n", "deepseek_v3", "gemma4"])
def test_computed_bytes_are_those_of_the_tensors(name: str, kv_dtype: str | None) -> None:
    shape = model_shape(tiny(name).config, "float32")
    for star in pair(name, kv_dtype=kv_dtype, **SIZES):
        kv_windows = star.config.kv_windows
        for tokens in (7, CONTEXT):
            nbytes = star.encode(ids(tokens)).nbytes
            assert nbytes == stored.context_bytes(shape, tokens, kv_dtype, kv_windows)
            assert nbytes == star.context_bytes(tokens)
        plan = star.runtime.plan_for(CONTEXT)
        memory = cost.memory_per_rank(
            shape, plan, tokens_per_forward=16, kv_dtype=kv_dtype, kv_windows=kv_windows
        )
        assert memory.kv == nbytes


def test_computed_memory_of_ranks() -> None:
    """The window is on the last rank; the others keep it while they encode."""
    shape = model_shape(tiny("gemma3").config, "float32")
    plan = BlockPlan(context_tokens=96, block_size=32, anchor_size=7, ranks=3)
    layer = shape.kv_bytes_per_token // 3
    memories = [
        cost.memory_per_rank(shape, plan, tokens_per_forward=16, rank=rank) for rank in range(3)
    ]
    kept_tokens = [memory.kv // layer for memory in memories]
    assert kept_tokens == [32, 32, 32 + 2 * (WINDOW - 1)]
    windows = {memory.working - stored.working_bytes(shape, 16) for memory in memories}
    assert windows == {2 * 32 * layer}


def test_gemma_3_at_128k_takes_a_fifth_at_most() -> None:
    config = AutoConfig.for_model(**SHAPES["gemma-3-4b"])
    shape = model_shape(config, "bfloat16")
    sizes = [stored.context_bytes(shape, 2**17, None, keeps) for keeps in ("last", "all")]
    assert sizes[0] <= 0.2 * sizes[1]


@pytest.mark.parametrize("value", ["window", None, 4])
def test_unknown_names_are_refused(value: Any) -> None:
    with pytest.raises(
        InvalidInputError, match=r"kv_windows .* is unknown; choose one of last, all"
    ):
        engine("llama", kv_windows=value)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_answers_as_before(name: str) -> None:
    last, everything = pair(name, **SIZES, tokens_per_forward=24)
    right = everything.generate(everything.encode(ids(CONTEXT)), ids(QUERY, seed=2), **ANSWER)
    check_answers(last, last.encode(ids(CONTEXT)), right, 1e-5)
    assert json.dumps(last.config.kv_settings)
