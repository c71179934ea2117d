"""The model oracle against stock transformers: it must be right before it is compared with."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from tests.engines import VARIED
from tests.families import FAMILIES, FIRST_TOKEN, LAST_TOKEN, build
from tests.model_oracle import (
    cached,
    cached_kv,
    eager_attention,
    law_mask,
    layer_masks,
    oracle_forward,
    oracle_generate,
    pinned_rope,
)
from tests.tiers import in_turn

BATCH, CONTEXT, QUERY, STEPS = 2, 101, 7, 4
TOTAL = CONTEXT + QUERY
GEOMETRIES = [(16, 16), (24, 10)]  # (block_size, anchor_size); both leave a ragged last block.

LENGTH_DEPENDENT = ["llama_dynamic_ntk", "phi3_longrope", "gemma3_dynamic_ntk"]
# Full attention, QK norm, softcap and windows, windows in every layer, sinks and windows, MLA, KV
# sharing, KV heads that differ between layers.
OFFICIAL = [
    "llama",
    "qwen3",
    "gemma2",
    "mistral",
    "gpt_oss",
    "deepseek_v3",
    "gemma3n",
    "mimo_v2_flash",
]


def tokens(length: int = TOTAL, seed: int = 1) -> torch.Tensor:
    """Draw ordinary token ids, `[BATCH, length]`; longer rows begin with the same ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        FIRST_TOKEN, LAST_TOKEN + 1, (length, BATCH), generator=generator
    ).T.contiguous()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def as_stock(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """Attention as users get it, but eager with softcap, which sdpa, 5.17's default, ignores."""
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    return contextlib.nullcontext() if softcap is None else eager_attention(model)


def test_law_mask_is_the_law_drawn_by_hand() -> None:
    full = """
        x . . . . . . . .
        x x . . . . . . .
        x x x . . . . . .
        x x . x . . . . .
        x x . x x . . . .
        x x . x x x . . .
        x x . . . . x . .
        x x x x x x x x .
        x x x x x x x x x"""
    window_4 = """
        x . . . . . . . .
        x x . . . . . . .
        x x x . . . . . .
        x x . x . . . . .
        . x . x x . . . .
        . . . x x x . . .
        . . . . . . x . .
        . . . . x x x x .
        . . . . . x x x x"""
    for window, drawn in ((None, full), (4, window_4)):
        rows = [[mark == "x" for mark in line.split()] for line in drawn.strip().splitlines()]
        assert law_mask(7, 9, 3, 2, window).tolist() == rows


@pytest.mark.parametrize("name", in_turn(2, list(FAMILIES), quick=lambda name: name in VARIED))
@torch.no_grad()
def test_one_block_is_the_stock_model(name: str) -> None:
    """With one block, the oracle's forward and greedy decoding equal the stock model's."""
    model, ids_BL = build(name), tokens()
    dense = {"context_len": CONTEXT, "block_size": CONTEXT, "anchor_size": 0}

    with as_stock(model):
        stock_BLV = model(ids_BL, use_cache=False).logits
        with pinned_rope(model, TOTAL + STEPS):
            stock = model.generate(
                ids_BL,
                attention_mask=torch.ones_like(ids_BL),
                max_new_tokens=STEPS,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
    oracle = oracle_forward(model, ids_BL, **dense)
    tokens_BT, logits_BTV = oracle_generate(
        model, ids_BL, **dense, steps=STEPS, rope_length=TOTAL + STEPS
    )

    assert_close(oracle.logits_BLV, stock_BLV)
    assert tokens_BT.tolist() == stock.sequences[:, TOTAL:].tolist()
    assert_close(logits_BTV, torch.stack(stock.logits, 1))


@pytest.mark.parametrize("name", FAMILIES)
def test_several_blocks_are_not_dense(name: str) -> None:
    """The comparisons can fail: blocks change logits, and keys and values from layer 1 on."""
    model, ids_BL = build(name), tokens()
    dense = oracle_forward(
        model, ids_BL, context_len=CONTEXT, block_size=CONTEXT, anchor_size=CONTEXT
    )
    star = oracle_forward(model, ids_BL, context_len=CONTEXT, block_size=24, anchor_size=10)

    assert (star.logits_BLV - dense.logits_BLV)[:, CONTEXT:].abs().max() > 0.3
    for layer, (star_kv, dense_kv) in enumerate(zip(star.kv, dense.kv, strict=True)):
        for star_BGLD, dense_BGLD in zip(star_kv, dense_kv, strict=True):
            assert star_BGLD.shape == dense_BGLD.shape
            assert star_BGLD.shape[0] == BATCH
            # Sliding layers store every token, too.
            assert star_BGLD.shape[2] == TOTAL
            difference_L = (star_BGLD - dense_BGLD).abs().amax((0, 1, 3))
            # The first block sees the same keys as in dense attention.
            assert difference_L[:24].max() < 1e-4
            assert (difference_L[24:].max() > 0.1) == (layer > 0)


@pytest.mark.parametrize(("block_size", "anchor_size"), GEOMETRIES)
@pytest.mark.parametrize("name", [*OFFICIAL, *LENGTH_DEPENDENT])
@torch.no_grad()
def test_official_scheme_gives_the_same_context_and_answer(
    name: str, block_size: int, anchor_size: int
) -> None:
    """The official code encodes `[anchor | block]` at its positions and drops the anchor's KV.

    The query then continues an ordinary cache of the whole context.
    """
    model, ids_BL = build(name), tokens()
    settings = {"context_len": CONTEXT, "block_size": block_size, "anchor_size": anchor_size}
    blocks = [
        _encode_block(model, ids_BL, start, block_size, anchor_size)
        for start in range(0, CONTEXT, block_size)
    ]
    cache = DynamicCache()
    for layer, parts in enumerate(zip(*blocks, strict=True)):
        keys, values = zip(*parts, strict=True)
        cache.update(torch.cat(keys, 2), torch.cat(values, 2), layer)
    context_kv = cached_kv(cache)
    query_BQV = _forward(model, ids_BL, torch.arange(CONTEXT, TOTAL), cache)

    oracle = oracle_forward(model, ids_BL, **settings)

    for official_kv, oracle_kv in zip(context_kv, oracle.kv, strict=True):
        for official_BGLD, oracle_BGLD in zip(official_kv, oracle_kv, strict=True):
            assert_close(official_BGLD, oracle_BGLD[:, :, :CONTEXT])
    assert_close(query_BQV, oracle.logits_BLV[:, CONTEXT:])


def _encode_block(
    model: PreTrainedModel, ids_BL: torch.Tensor, start: int, block_size: int, anchor_size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Encode the block at `start` after a fresh copy of the anchor, the first block alone."""
    anchor = torch.arange(anchor_size if start else 0)
    block = torch.arange(start, min(start + block_size, CONTEXT))
    cache = DynamicCache()
    _forward(model, ids_BL, torch.cat([anchor, block]), cache)
    return [
        (k_BGLD[:, :, len(anchor) :], v_BGLD[:, :, len(anchor) :])
        for k_BGLD, v_BGLD in cached_kv(cache)
    ]


def _forward(
    model: PreTrainedModel, ids_BL: torch.Tensor, positions_Q: torch.Tensor, cache: DynamicCache
) -> torch.Tensor:
    """Compute the logits of tokens that see the cache and, causally, each other."""
    keys_K = torch.cat([torch.arange(cache.get_seq_length()), positions_Q])

    def visible(window: int | None) -> torch.Tensor:
        distance_QK = positions_Q[:, None] - keys_K[None, :]
        return (distance_QK >= 0) & (distance_QK < (window or TOTAL))

    with eager_attention(model), pinned_rope(model, TOTAL):
        logits: torch.Tensor = model(
            input_ids=ids_BL[:, positions_Q],
            position_ids=positions_Q.expand(BATCH, -1),
            attention_mask=layer_masks(model, visible),
            use_cache=True,
            **cached(model, cache),
        ).logits
    return logits


@pytest.mark.parametrize("name", LENGTH_DEPENDENT)
@torch.no_grad()
def test_rope_length_gives_the_frequencies_of_that_many_tokens(name: str) -> None:
    """With the frequencies of a length, a short forward is the beginning of a stock one."""
    # The frequencies of these families change at 64 tokens.
    length, short = 150, 40
    ids_BL = tokens(length)
    stock_BLV = build(name)(ids_BL, use_cache=False).logits[:, :short]
    model = build(name)

    def dense(rope_length: int | None) -> torch.Tensor:
        settings = {"context_len": short, "block_size": short, "anchor_size": 0}
        return oracle_forward(
            model, ids_BL[:, :short], **settings, rope_length=rope_length
        ).logits_BLV

    assert_close(dense(length), stock_BLV)
    assert_close(dense(None), model(ids_BL[:, :short], use_cache=False).logits)
    assert (dense(None) - stock_BLV).abs().max() > 1


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("name", [*LENGTH_DEPENDENT, "gemma3_vlm", "gpt_oss"])
@torch.no_grad()
def test_the_model_is_left_as_it_was(name: str, grown: bool) -> None:
    """Attention settings and the rotary state stay the same, even if a forward raises."""
    model, ids_BL = build(name), tokens()
    # Dynamic NTK remembers the longest sequence so far.
    if grown:
        model(ids_BL, use_cache=False)
    before = _settings(model)

    with eager_attention(model):
        assert {
            module.config._attn_implementation
            for module in model.modules()
            if hasattr(module, "config")
        } == {"eager"}
    oracle_forward(
        model, ids_BL, context_len=CONTEXT, block_size=24, anchor_size=10, rope_length=200
    )
    assert _settings(model) == before
    with pytest.raises(IndexError):
        oracle_forward(
            model,
            torch.full_like(ids_BL, 10**6),
            context_len=CONTEXT,
            block_size=24,
            anchor_size=10,
        )
    assert _settings(model) == before


def _settings(model: PreTrainedModel) -> list[object]:
    """List attention implementations, and attributes and buffers of rotary modules."""
    rows: list[object] = []
    for name, module in model.named_modules():
        rows.append((name, getattr(getattr(module, "config", None), "_attn_implementation", None)))
        if hasattr(module, "rope_type"):
            state = {key: value for key, value in vars(module).items() if not key.startswith("_")}
            state |= dict(module.named_buffers(recurse=False))
            rows += [
                (key, value.tolist() if isinstance(value, torch.Tensor) else value)
                for key, value in state.items()
            ]
            rows.append(sorted(module._non_persistent_buffers_set))
    return rows
