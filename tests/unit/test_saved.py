"""Saved contexts: the same answers after a round trip, and never a half-written file."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from star_attention import EncodedContext, StarLLM
from star_attention.errors import (
    ContextNotFoundError,
    ContextSaveError,
    CorruptContextError,
    InvalidInputError,
)
from tests.engines import (
    BUNDLED,
    CONTEXT,
    QUERY,
    assert_same_kv,
    engine,
    ids,
    tiny,
)
from tests.families import build
from tests.saved_contexts import BLOCK, answer, load_fully, small_context

# Families whose layers store different things: plain KV, KV shared between layers, compressed KV
# (MLA), two per layer, pinned frequencies, sinks.
KINDS = ["llama", "gemma3n", "deepseek_v3", "longcat_flash", "phi3_longrope", "gpt_oss"]


@pytest.fixture(scope="module")
def context() -> EncodedContext:
    return small_context()


@pytest.fixture
def path(tmp_path: Path, context: EncodedContext) -> Path:
    context.save(tmp_path / "a.star")
    return tmp_path / "a.star"


# ---------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_a_round_trip_keeps_every_bit_and_every_answer(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    star = StarLLM(
        tiny(name) if dtype == torch.float32 else build(name, dtype),
        block_size=BLOCK,
        anchor_size=7,
    )
    context = star.encode(ids(CONTEXT))
    context.save(tmp_path / "a.star")
    again = star.load_context(tmp_path / "a.star")
    assert torch.equal(again.token_ids, context.token_ids)
    assert again.token_ids.dtype == torch.int64
    assert (again.plan, again.method, again.identity) == (
        context.plan,
        context.method,
        context.identity,
    )
    assert (again.rope_length, again.chat, again.encode_s) == (
        context.rope_length,
        None,
        context.encode_s,
    )
    assert (again.rope_length is not None) == (name == "phi3_longrope")
    assert [layer.expands for layer in again.kv.layers] == [
        layer.expands for layer in context.kv.layers
    ]
    assert [layer.is_empty for layer in again.kv.layers] == [
        layer.is_empty for layer in context.kv.layers
    ]
    assert_same_kv(again, context, tolerance=0)
    assert again.nbytes == context.nbytes
    first, second = (
        star.generate(c, ids(QUERY), max_new_tokens=6, return_logits=True) for c in (context, again)
    )
    assert first.token_ids == second.token_ids
    assert torch.equal(first.logits, second.logits)


def test_the_families_store_different_things() -> None:
    """Forbids a round-trip test over layers that are all alike."""
    contexts = {name: engine(name, block_size=BLOCK).encode(ids(CONTEXT)) for name in KINDS}
    assert [layer.is_empty for layer in contexts["gemma3n"].kv.layers] == [False, False, True, True]
    assert all(layer.expands for layer in contexts["deepseek_v3"].kv.layers)
    assert len(contexts["longcat_flash"].kv.layers) == 4
    assert contexts["phi3_longrope"].rope_length == CONTEXT + 1024


def test_a_loaded_context_can_be_extended_and_saved_again(
    path: Path, context: EncodedContext
) -> None:
    star = engine("llama", block_size=64)
    extended = star.extend(star.load_context(path), ids(31, seed=3))
    assert_same_kv(extended, star.extend(context, ids(31, seed=3)), tolerance=0)
    extended.save(path)  # over the file that the first part is still mapped from
    assert_same_kv(star.load_context(path), extended, tolerance=0)
    assert answer(star, star.load_context(path)) == answer(star, extended)


def test_the_bundled_model_answers_the_same_from_a_file(tmp_path: Path) -> None:
    star = StarLLM.from_pretrained(BUNDLED, dtype="float32", block_size=256, anchor_size=64)
    text = (
        "The hill is tall and the road is long.\nThe secret number for torpidity-kill is 4910508.\n"
        * 30
    )
    messages = [{"role": "user", "content": text}]
    question = "What is the secret number for torpidity-kill?"
    context = star.encode(messages)
    context.save(tmp_path / "a.star")
    reply = star.generate(context, question, max_new_tokens=24, return_logits=True)
    # A fresh engine with other sizes of its own: everything comes from the file.
    other = StarLLM.from_pretrained(BUNDLED, dtype="float32", block_size="4k")
    again = other.load_context(tmp_path / "a.star")
    assert again.chat == context.chat
    assert (again.plan.block_size, again.plan.anchor_size) == (256, 64)
    loaded = other.generate(again, question, max_new_tokens=24, return_logits=True)
    assert (loaded.text, loaded.token_ids) == (reply.text, reply.token_ids)
    assert torch.equal(loaded.logits, reply.logits)
    assert "4910508" in loaded.text


def test_sizes_come_from_the_file(path: Path) -> None:
    again = engine("llama", block_size=50, anchor_size=3).load_context(path)
    assert (again.plan.block_size, again.plan.anchor_size, len(again)) == (BLOCK, BLOCK, CONTEXT)


# ---------------------------------------------------------------------- the file


def test_the_file_is_plain_safetensors_for_its_owner_only(path: Path) -> None:
    """It contains the text and its ids: only the owner may read it, and nothing in it runs."""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("token_ids").tolist() == ids(CONTEXT)
        assert set(file.keys()) == {
            "token_ids",
            *(f"layers.{i}.{kv}" for i in range(3) for kv in "kv"),
        }


def test_opening_a_file_reads_no_keys(path: Path) -> None:
    """Damage in the last layer shows when the layer is read, not when the file is opened."""
    star = engine("llama")
    with safe_open(path, framework="pt") as file:
        needle = file.get_tensor("layers.2.v").numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(needle) + 100] ^= 1
    path.write_bytes(data)
    opened = star.load_context(path)
    assert all(not layer.is_loaded for layer in opened.kv.layers)
    opened.kv.layers[0].pair()
    opened.kv.layers[1].pair()
    assert not opened.kv.layers[2].is_loaded
    for _ in range(2):
        with pytest.raises(
            CorruptContextError, match=r"layers\.2\.v in .*a\.star does not match its checksum"
        ):
            answer(star, opened)


def test_keys_are_pages_of_the_file(path: Path) -> None:
    """Pages that were read can be dropped, and a context larger than memory can be opened."""
    opened = load_fully(path)
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            low, _, high = line.split()[0].partition("-")
            mapped.append(range(int(low, 16), int(high, 16)))
    for k_1GLD, v_1GLD in (layer.pair() for layer in opened.kv.layers):
        assert any(k_1GLD.data_ptr() in area for area in mapped)
        assert any(v_1GLD.data_ptr() in area for area in mapped)


@pytest.mark.parametrize("target", [".", "missing/a.star", "a.star/b", "x" * 300, "nul\0byte"])
def test_a_target_that_cannot_be_written(target: str, path: Path, context: EncodedContext) -> None:
    before = path.read_bytes()
    with pytest.raises(ContextSaveError, match="cannot save the context to") as caught:
        context.save(path.parent / target)
    assert isinstance(caught.value, OSError)
    assert os.listdir(path.parent) == ["a.star"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("target", [5, None, ["a.star"]])
def test_only_paths_are_accepted(target: Any, context: EncodedContext) -> None:
    message = r"expected a str or Path, got (int|NoneType|list)$"
    with pytest.raises(ContextSaveError, match=message):
        context.save(target)
    with pytest.raises(InvalidInputError, match=message):
        engine("llama").load_context(target)


def test_a_tilde_is_not_expanded_and_the_error_says_so(context: EncodedContext) -> None:
    """Python does not expand it anywhere; forbids the advice to create a folder `~`."""
    says = "; ~ is not expanded here: write the folder out"
    with pytest.raises(ContextSaveError, match=f"the folder ~ does not exist{says}"):
        context.save("~/nowhere.star")
    with pytest.raises(ContextNotFoundError, match=f"no saved context at ~/nowhere.star{says}"):
        engine("llama").load_context("~/nowhere.star")


def test_the_longest_possible_name_works(tmp_path: Path, context: EncodedContext) -> None:
    """Forbids a temporary name that is longer than the target's."""
    context.save(tmp_path / ("x" * 255))
    assert os.listdir(tmp_path) == ["x" * 255]


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 1000, 60_000])
def test_a_write_that_fails_halfway_leaves_the_old_file(limit: int, path: Path) -> None:
    before = path.read_bytes()
    assert len(before) > 60_000
    other = engine("llama", block_size=BLOCK).encode(ids(CONTEXT, seed=5))
    with (
        file_size_limit(limit),
        pytest.raises(
            ContextSaveError,
            match=r"cannot save .*File too large.*free space or choose another place",
        ),
    ):
        other.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["a.star"]
    other.save(path)
    assert load_fully(path).token_ids.tolist() == ids(CONTEXT, seed=5)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(small_disk: Path, context: EncodedContext) -> None:
    """Forbids a half-written file, and a crash: writing to mapped pages of a full disk is fatal."""
    target = small_disk / "a.star"
    context.save(target)  # 117 KiB
    before = target.read_bytes()
    with pytest.raises(
        ContextSaveError,
        match=r"No space left on device.*a file that was there before is unchanged",
    ):
        context.save(target)
    assert target.read_bytes() == before
    assert os.listdir(small_disk) == ["a.star"]
