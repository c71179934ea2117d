"""KV formats, fp8 and host memory: stored values, values that attention reads, files, extension."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import EncodedContext, StarLLM
from star_attention.config import KV_DTYPES
from star_attention.errors import InvalidInputError
from star_attention.planning import model_shape
from star_attention.planning.segments import Segments
from star_attention.storage import kv
from star_attention.storage.kv import FP8, KVFormat, LayerKV, quantize
from tests.engines import BUNDLED, engine, ids
from tests.needles import make

SIZES: dict[str, Any] = dict(block_size=24, anchor_size=10, tokens_per_forward=48)


def test_fp8_has_four_bits_of_precision() -> None:
    """Three bits of mantissa: errors up to a sixteenth, or the smallest step of the row."""
    torch.manual_seed(0)
    x = torch.randn(3, 50, 64) * torch.logspace(-20, 20, 50)[:, None]
    quantized, scale = quantize(x)
    assert quantized.dtype == FP8
    assert scale.shape == (3, 50)
    back = quantized.float() * scale[..., None]
    assert ((back - x).abs() <= x.abs() / 16 + scale[..., None] * 2**-9).all()
    torch.testing.assert_close(back.abs().amax(-1), x.abs().amax(-1))


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 16), torch.full((2, 16), 3e38), torch.full((1, 16), 1e-42)]
)
def test_extreme_rows_stay_finite(x: torch.Tensor) -> None:
    quantized, scale = quantize(x)
    back = quantized.float() * scale[..., None]
    assert back.isfinite().all()
    torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-38)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "gemma3n"])
def test_stored_values_are_computed_ones_rounded_once(name: str) -> None:
    """Blocks read the anchor as computed, so that fp8 changes stored values only."""
    plain, small = engine(name, **SIZES), engine(name, kv_dtype="fp8", **SIZES)
    expected, context = plain.encode(ids(101)), small.encode(ids(101))
    for actual_layer, expected_layer in zip(context.kv.layers, expected.kv.layers, strict=True):
        if expected_layer.is_empty:
            assert actual_layer.is_empty
            continue
        rounded = [quantize(tensor) for tensor in expected_layer.pair()]
        expected_parts = [rounded[0][0], rounded[1][0], rounded[0][1], rounded[1][1]]
        for a, b in zip(actual_layer.stored(), expected_parts, strict=True):
            assert torch.equal(a.float(), b.float())


def as_plain(star: StarLLM, context: EncodedContext) -> EncodedContext:
    """The same context, with the values that attention reads stored unquantized."""
    encoded = star.encode(context.token_ids)
    for layer, small in zip(encoded.kv.layers, context.kv.layers, strict=True):
        if not small.is_empty:
            layer.write(small.segments[0][0], *(tensor[0] for tensor in small.pair()))
    return encoded


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "gemma3n"])
def test_answers_come_from_the_stored_values(name: str) -> None:
    plain, small = engine(name, **SIZES), engine(name, kv_dtype="fp8", **SIZES)
    context = small.encode(ids(101))
    same = as_plain(plain, context)
    kwargs: dict[str, Any] = dict(max_new_tokens=5, ignore_eos=True, return_logits=True)
    a, b = (
        small.generate(context, ids(7, seed=2), **kwargs),
        plain.generate(same, ids(7, seed=2), **kwargs),
    )
    assert a.token_ids == b.token_ids
    torch.testing.assert_close(a.logits, b.logits)
    exact = plain.generate(plain.encode(ids(101)), ids(7, seed=2), **kwargs).logits
    assert not torch.equal(a.logits[0], exact[0]), "the stored values are rounded"


def test_fp8_takes_one_byte_per_element_and_a_scale_per_row() -> None:
    plain, small = (
        engine("llama", **SIZES).encode(ids(101)),
        engine("llama", kv_dtype="fp8", **SIZES).encode(ids(101)),
    )
    size = plain.kv.layers[0].pair()[0].shape[-1]
    assert small.nbytes / plain.nbytes == (size + 4) / (4 * size)


def test_batches_and_growing_contexts() -> None:
    star = engine("llama", kv_dtype="fp8", **SIZES)
    both = star.encode([ids(101), ids(101, seed=3)])
    alone = star.encode(ids(101, seed=3))
    kwargs: dict[str, Any] = dict(max_new_tokens=4, ignore_eos=True)
    assert (
        star.generate(both[1], ids(5), **kwargs).token_ids
        == star.generate(alone, ids(5), **kwargs).token_ids
    )
    longer = star.extend(alone, ids(30, seed=6))
    for old, new in zip(alone.kv.layers, longer.kv.layers, strict=True):
        for a, b in zip(old.stored(), new.stored(), strict=True):
            assert torch.equal(a.float(), b[:, :, :101].float()), (
                "tokens encoded before are not rounded again"
            )
    assert len(star.generate(longer, ids(5), **kwargs).token_ids) == 4


def test_files_keep_the_precision(tmp_path: Path) -> None:
    small, plain = engine("llama", kv_dtype="fp8", **SIZES), engine("llama", **SIZES)
    context = small.encode(ids(101))
    context.save(tmp_path / "small.star")
    plain.encode(ids(101)).save(tmp_path / "plain.star")
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes["small.star"] < 0.5 * sizes["plain.star"]
    kwargs: dict[str, Any] = dict(max_new_tokens=5, ignore_eos=True)
    expected = small.generate(context, ids(5), **kwargs).token_ids
    # The file decides the format, not the engine.
    for star in (small, plain):
        loaded = star.load_context(tmp_path / "small.star")
        assert loaded.kv.kv_format == KVFormat(dtype="fp8", windows="last")
        assert loaded.nbytes == context.nbytes
        assert star.generate(loaded, ids(5), **kwargs).token_ids == expected
        assert star.generate(star.extend(loaded, ids(9)), ids(5), **kwargs).token_ids
    as_computed = small.load_context(tmp_path / "plain.star").kv.kv_format
    assert as_computed == KVFormat(windows="last")


def test_host_memory_changes_nothing_on_a_cpu() -> None:
    plain, host = engine("llama", **SIZES), engine("llama", kv_device="cpu", **SIZES)
    kwargs: dict[str, Any] = dict(max_new_tokens=5, ignore_eos=True)
    answers = [
        star.generate(star.encode(ids(101)), ids(5), **kwargs).token_ids for star in (plain, host)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("setting", [dict(kv_dtype="int4"), dict(kv_device="disk")])
def test_unknown_formats_are_refused(setting: dict[str, str]) -> None:
    with pytest.raises(InvalidInputError, match="is unknown; choose"):
        engine("llama", **SIZES, **setting)


def test_an_unwritten_layer_is_empty() -> None:
    assert LayerKV(Segments.prefix(5), kv_format=KVFormat(dtype="fp8")).is_empty


def test_the_bundled_model_still_finds_its_facts() -> None:
    hits = {}
    for kv_dtype in (None, "fp8"):
        star = StarLLM.from_pretrained(BUNDLED, dtype="float32", block_size=512, kv_dtype=kv_dtype)
        sample = make("niah_multikey", star.tokenizer, 2048, seed=0)
        context = star.encode(sample.context)
        replies = star.generate(context, [fact.query for fact in sample.facts], max_new_tokens=12)
        hits[kv_dtype] = [
            fact.value in reply.text for fact, reply in zip(sample.facts, replies, strict=True)
        ]
    assert len(hits["fp8"]) == 16
    assert sum(hits[None]) >= 15
    assert sum(hits["fp8"]) >= sum(hits[None]) - 1


def test_every_precision_is_stored_and_counted() -> None:
    """Forbids a precision that is named but stored, or counted, as another."""
    assert set(KV_DTYPES) == set(kv.QUANTIZERS) == set(model_shape.STORED_BYTES)
    x = torch.randn(2, 3, 16)
    for name, quantizer in kv.QUANTIZERS.items():
        values, scale = quantizer(x)
        assert values.element_size() == model_shape.STORED_BYTES[name]
        assert values.shape == x.shape
        assert (scale.shape, scale.dtype) == (x.shape[:-1], torch.float32)
