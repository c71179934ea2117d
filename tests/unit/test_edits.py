"""An edited context equals one encoded anew, and only what changes passes through the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import EncodedContext, StarLLM
from star_attention.errors import ContextMismatchError, InvalidInputError, TokenError
from star_attention.planning.edits import blocks_again
from star_attention.planning.plan import BlockPlan
from tests.engines import (
    CONTEXT,
    assert_same_kv,
    bundled_model,
    bundled_tokenizer,
    engine,
    ids,
    stored,
    text_model,
    tiny,
)
from tests.families import FAMILIES
from tests.tiers import in_turn

BLOCK = 16
NEW = [7, 8]
# Seven blocks, the last one ragged; one block in each forward.
SIZES: dict[str, Any] = dict(block_size=BLOCK, tokens_per_forward=BLOCK, reserve_tokens=64)
LOOKBACKS: list[dict[str, Any]] = [
    dict(anchor_size=10),
    dict(lookback=1, anchor_size=16),
    dict(lookback=2, lookback_layers="lower", anchor_size=5),
    dict(lookback=1, lookback_layers="upper", anchor_size=0),
]
# start, stop, and the replacement of tokens of a context of 101.
EDITS = [
    (40, 42, NEW),
    (20, 20, NEW),
    (31, 33, NEW),
    (0, 2, NEW),
    (12, 14, NEW),
    (99, 101, NEW),
    (101, 101, NEW),
    (70, 101, []),
    (50, 51, []),
    (60, 60, []),
    (0, 101, ids(90, seed=9)),
]


def replaced(old: list[int], start: int, stop: int, new: list[int]) -> list[int]:
    return old[:start] + new + old[stop:]


def same_blocks(one: EncodedContext, other: EncodedContext) -> list[int]:
    """Return the blocks whose keys and values are the same, bit for bit, in all layers."""
    return [
        number
        for number, (start, stop) in enumerate(one.plan.blocks)
        if all(
            torch.equal(a_1GLD[:, :, start:stop], b_1GLD[:, :, start:stop])
            for layer in zip(stored(one), stored(other), strict=True)
            for a_1GLD, b_1GLD in zip(*layer, strict=True)
        )
    ]


@pytest.mark.parametrize(
    ("name", "lookback", "start", "stop", "new"),
    [
        *in_turn(2, ["llama", "gemma3"], LOOKBACKS, EDITS),
        *in_turn(0, sorted(set(FAMILIES) - {"llama", "gemma3"}), LOOKBACKS, EDITS),
    ],
)
def test_an_edited_context_is_the_one_encoded_anew(
    name: str, lookback: dict[str, Any], start: int, stop: int, new: list[int]
) -> None:
    star, old_ids = engine(name, **SIZES, **lookback), ids(CONTEXT)
    old = star.encode(old_ids)
    before = stored(old)
    edited, anew = (
        star.edit(old, start, stop, new),
        star.encode(replaced(old_ids, start, stop, new)),
    )
    assert edited.token_ids.tolist() == anew.token_ids.tolist()
    assert (edited.plan, edited.layout) == (anew.plan, anew.layout)
    # A last block that only lost tokens was computed in a longer forward. Experts compute the
    # tokens together that the router gives them, so that a changed one changes others' rounding.
    is_cut = start < stop == CONTEXT and not new
    is_exact = name in ("llama", "gemma3") and not is_cut
    assert_same_kv(edited, anew, tolerance=0 if is_exact else 1e-5)
    for layer, unchanged in zip(stored(old), before, strict=True):
        assert all(map(torch.equal, layer, unchanged)), "the old context changed"


@pytest.mark.parametrize("lookback", LOOKBACKS)
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("at", [3, 14, 40, 96])
def test_what_is_the_same_is_reused_and_nothing_else(
    name: str, lookback: dict[str, Any], at: int
) -> None:
    """The reach of a change grows with every layer that looks back, and ends where it must."""
    star, old_ids = engine(name, **SIZES, **lookback), ids(CONTEXT)
    old, anew = star.encode(old_ids), star.encode(replaced(old_ids, at, at + 2, NEW))
    edited = star.edit(old, at, at + 2, NEW)
    same = same_blocks(old, anew)
    assert edited.reused_blocks == len(same)
    tokens = sum(stop - start for start, stop in (anew.plan.blocks[number] for number in same))
    assert edited.reused_tokens == edited.as_dict()["reused_tokens"] == tokens


def test_only_changed_blocks_pass_through_the_model() -> None:
    star, old_ids = engine("llama", **SIZES), ids(CONTEXT)
    old, forwards = star.encode(old_ids), []
    layer = tiny("llama").get_decoder().layers[0]
    handle = layer.register_forward_pre_hook(lambda _, args: forwards.append(args[0].shape[1]))
    try:
        star.edit(old, 40, 42, NEW)
        assert forwards == [16]
        forwards.clear()
        # What comes after a shift is at other positions.
        star.edit(old, 40, 42, [7])
        assert forwards == [16, 16, 16, 16, 4]
        forwards.clear()
        # The end is cut, or nothing changes.
        star.edit(old, 90, CONTEXT, [])
        assert star.edit(old, 90, 90, "").reused_tokens == CONTEXT
        assert forwards == []
    finally:
        handle.remove()


def test_reach_through_windows() -> None:
    """Block 3 sees block 2 through a window of 9, and block 1 only through one of more than 17."""
    plan = BlockPlan(context_tokens=80, block_size=16, anchor_size=0, lookback=2)
    old, new = list(range(80)), [*range(16), 0, *range(17, 80)]
    again = {
        window: blocks_again(plan, old, new, [2, 2], [window, window])
        for window in (1, 2, 9, 17, 18, None)
    }
    assert again == {1: [1], 2: [1, 2], 9: [1, 2], 17: [1, 2], 18: [1, 2, 3], None: [1, 2, 3]}
    assert blocks_again(plan, old, new, [2, 0, 2], [None] * 3) == [1, 2, 3]
    assert blocks_again(plan, old, new, [2, 2, 2], [None] * 3) == [1, 2, 3, 4]
    assert blocks_again(plan, old, new, [2], [None]) == [1]


# ------------------------------------------------------------------------------- new versions


def test_new_versions_share_the_blocks_of_one_context() -> None:
    star, old_ids = engine("llama", **SIZES), ids(CONTEXT)
    old = star.encode(old_ids)
    versions = [
        replaced(old_ids, 40, 42, NEW),
        old_ids + ids(30, seed=4),
        old_ids[:20],
        ids(CONTEXT, seed=5),
        old_ids,
    ]
    contexts = star.encode(versions, reuse=old)
    assert [context.reused_tokens for context in contexts] == [85, 96, 20, 0, CONTEXT]
    for context, version in zip(contexts, versions, strict=True):
        assert_same_kv(context, star.encode(version), tolerance=1e-5)


def test_sizes_and_format_are_those_of_the_old_context() -> None:
    old_ids = ids(CONTEXT)
    old = engine("llama", **SIZES, kv_dtype="fp8", lookback=1).encode(old_ids)
    other = engine("llama", block_size=32, tokens_per_forward=BLOCK)
    edited = other.encode(old_ids[:90] + NEW, reuse=old)
    assert (edited.plan.block_size, edited.plan.lookback) == (BLOCK, 1)
    assert edited.kv.kv_format == old.kv.kv_format
    assert edited.reused_tokens == 80


def error(actual: EncodedContext, expected: EncodedContext) -> float:
    """Return the largest relative error of a layer's keys or values."""
    return max(
        float((a_1GLD - b_1GLD).norm() / b_1GLD.norm())
        for layer in zip(stored(actual), stored(expected), strict=True)
        for a_1GLD, b_1GLD in zip(*layer, strict=True)
    )


@pytest.mark.parametrize("lookback", LOOKBACKS)
def test_stored_formats(lookback: dict[str, Any]) -> None:
    old_ids, new_ids = ids(CONTEXT), replaced(ids(CONTEXT), 40, 43, NEW)
    exact = engine("llama", **SIZES, **lookback).encode(new_ids)
    host = engine("llama", **SIZES, **lookback, kv_device="cpu")
    assert_same_kv(host.encode(new_ids, reuse=host.encode(old_ids)), exact, tolerance=0)
    # Blocks read the anchor, and those that they look back to, as stored: rounded.
    fp8 = engine("llama", **SIZES, **lookback, kv_dtype="fp8")
    edited = fp8.encode(new_ids, reuse=fp8.encode(old_ids))
    assert 0 < edited.reused_tokens
    assert error(edited, exact) < 3 * error(fp8.encode(new_ids), exact)


@pytest.mark.parametrize("kv", [{}, dict(kv_dtype="fp8")])
def test_saved_and_extended_contexts(tmp_path: Path, kv: dict[str, Any]) -> None:
    star, old_ids = engine("llama", **SIZES, **kv, lookback=1), ids(CONTEXT)
    old = star.extend(star.encode(old_ids[:70]), old_ids[70:])
    old.save(tmp_path / "old.star")
    loaded = star.load_context(tmp_path / "old.star")
    expected = star.edit(old, 40, 42, NEW)
    edited = star.edit(loaded, 40, 42, NEW)
    assert_same_kv(edited, expected, tolerance=0)
    assert edited.reused_tokens == expected.reused_tokens > 0
    # The old one keeps nothing in memory that it has not been asked for.
    assert not any(layer.is_loaded for layer in loaded.kv.layers)
    edited.save(tmp_path / "new.star")
    again = star.load_context(tmp_path / "new.star")
    assert_same_kv(again, edited, tolerance=0)
    assert again.reused_tokens == edited.reused_tokens
    longer, joined = star.extend(edited, ids(9)), star.extend(again, ids(9))
    assert_same_kv(longer, joined, tolerance=0)


def test_frequencies_that_depend_on_the_length_are_computed_again() -> None:
    star, old_ids = engine("llama_dynamic_ntk", **SIZES), ids(CONTEXT)
    old = star.encode(old_ids)
    assert star.edit(old, 40, 42, NEW).reused_tokens == 85
    assert star.edit(old, 100, 100, NEW).reused_tokens == 0
    # Of 64 positions the model was made for: below, nothing depends on the length.
    short = engine("llama_dynamic_ntk", block_size=BLOCK, reserve_tokens=10)
    assert short.edit(short.encode(old_ids[:40]), 38, 38, NEW).reused_tokens == 32


# --------------------------------------------------------------------------------------- texts

TEXT = "".join(f"Line {number}: the river runs past house {number * 7}.\n" for number in range(40))


def text_engine(**settings: Any) -> StarLLM:
    return StarLLM(bundled_model(), bundled_tokenizer(), block_size=64, **settings)


def check_text(star: StarLLM, edited: EncodedContext, anew: EncodedContext) -> None:
    assert edited.token_ids.tolist() == anew.token_ids.tolist()
    assert (edited.text, edited.end, edited.chat) == (anew.text, anew.end, anew.chat)
    assert_same_kv(edited, anew, tolerance=1e-4)
    replies = [star.generate(c, "Which house?", max_new_tokens=4) for c in (edited, anew)]
    assert replies[0].token_ids == replies[1].token_ids


@pytest.mark.parametrize(
    ("start", "stop", "new"),
    [
        (700, 705, "creek"),
        (0, 4, "Row"),
        (800, 800, " and on"),
        (len(TEXT) - 1, len(TEXT), ""),
        (len(TEXT), len(TEXT), "The end.  "),
        (0, len(TEXT), "Another text."),
    ],
)
def test_characters_are_replaced_as_if_the_text_had_been_encoded(
    start: int, stop: int, new: str
) -> None:
    star = text_engine()
    edited = star.edit(star.encode(TEXT), start, stop, new)
    check_text(star, edited, star.encode(TEXT[:start] + new + TEXT[stop:]))


def test_texts_of_saved_and_extended_contexts(tmp_path: Path) -> None:
    star = text_engine()
    old = star.extend(star.encode(TEXT[:900]), TEXT[900:])
    old.save(tmp_path / "old.star")
    at = TEXT.index("river", 1000)
    expected = star.encode(TEXT[:at] + "creek" + TEXT[at + 5 :])
    for context in (old, star.load_context(tmp_path / "old.star")):
        check_text(star, star.edit(context, at, at + 5, "creek"), expected)


@pytest.mark.parametrize("question", [None, "Which house is the last?"])
def test_the_last_message_of_a_chat_is_edited(question: str | None) -> None:
    star = text_engine()

    def messages(text: str) -> list[dict[str, Any]]:
        parts = [dict(type="text", text=each) for each in (text, question)]
        return [
            dict(role="system", content="Be brief."),
            dict(role="user", content=text if question is None else parts),
        ]

    at = TEXT.index("river", 1000)
    edited = star.edit(star.encode(messages(TEXT)), at, at + 5, "creek")
    check_text(star, edited, star.encode(messages(TEXT[:at] + "creek" + TEXT[at + 5 :])))
    assert edited.reused_tokens > 0


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("start", "stop", "new", "message"),
    [
        (
            -1,
            2,
            "x",
            r"an edit from -1 to 2 lies outside of the context's 1,\d+ characters; give 0 <= start",
        ),
        (5, 4, "x", "an edit from 5 to 4 lies outside"),
        (0, 10**6, "x", "to 1,000,000 lies outside"),
        ("0", 1, "x", "expected two integers, got str and int; count characters"),
        (True, 1, "x", "expected two integers"),
        (0, 1.5, "x", "expected two integers"),
        (0, 1, [5, 6], "holds text, and got a replacement of type list; give a str"),
        (0, 1, None, "replacement of type NoneType"),
    ],
)
def test_places_outside_of_the_text_are_refused(
    start: Any, stop: Any, new: Any, message: str
) -> None:
    star = text_engine()
    with pytest.raises(InvalidInputError, match=message):
        star.edit(star.encode(TEXT), start, stop, new)


def test_other_bad_edits_are_refused() -> None:
    star = text_engine()
    text, tokens = star.encode(TEXT), star.encode(ids(CONTEXT))
    with pytest.raises(TokenError, match="empty"):
        star.edit(text, 0, len(TEXT), "")
    with pytest.raises(InvalidInputError, match="holds token ids and no text, got a str"):
        star.edit(tokens, 0, 1, "x")
    with pytest.raises(InvalidInputError, match="outside of the context's 101 tokens"):
        star.edit(tokens, 0, 102, [5])
    with pytest.raises(TokenError, match="vocabulary"):
        star.edit(tokens, 0, 1, [10**9])
    with pytest.raises(TokenError, match="empty"):
        star.edit(tokens, 0, 101, [])
    with pytest.raises(InvalidInputError, match="expected an EncodedContext, got str"):
        star.encode(TEXT, reuse="old.star")  # type: ignore[call-overload]
    parts = [dict(type="text", text="a"), dict(type="text", text="b"), dict(type="text", text="?")]
    chat = star.encode([dict(role="user", content=parts)])
    with pytest.raises(InvalidInputError, match=r"\(role 'user'\) has 2 texts; only one text"):
        star.edit(chat, 0, 1, "x")
    other = StarLLM(text_model(), bundled_tokenizer(), block_size=64)
    for call in (lambda: other.edit(text, 0, 1, "x"), lambda: other.encode(TEXT, reuse=text)):
        with pytest.raises(ContextMismatchError):
            call()


@pytest.mark.parametrize("method", ["dense", "ring", "streaming_llm"])
def test_methods_without_blocks_refuse(method: str) -> None:
    star = engine("llama", method=method)
    context = star.encode(ids(CONTEXT))
    with pytest.raises(InvalidInputError, match=f"a {method} context cannot be reused"):
        star.edit(context, 40, 42, NEW)
    with pytest.raises(InvalidInputError, match="encode the new text without it"):
        star.encode(ids(CONTEXT), reuse=context)
