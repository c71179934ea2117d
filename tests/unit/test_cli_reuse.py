"""`encode --reuse`: a new version of a text takes the blocks that it shares from a saved one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from star_attention import StarLLM
from tests.command_line import CHAT, MODEL, failed, ok
from tests.engines import assert_same_kv, bundled_model, bundled_tokenizer

TEXT = "".join(f"Line {number}: the river runs past house {number * 7}.\n" for number in range(60))
AT = TEXT.index("river", 2000)
NEW_TEXT = TEXT[:AT] + "river" + TEXT[AT + 5 :].replace("house", "court", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("reuse")
    (folder / "old.txt").write_text(TEXT)
    (folder / "new.txt").write_text(NEW_TEXT)
    old = ["-o", folder / "old.star", "--lookback", "1", "--lookback-layers", "0", "-q"]
    ok("encode", *MODEL, "--block-size", "128", *old, folder / "old.txt")
    return folder


def test_a_new_version_copies_what_is_the_same(folder: Path) -> None:
    saved = ["--reuse", folder / "old.star", "-o", folder / "new.star"]
    done = ok("encode", *MODEL, folder / "new.txt", *saved)
    star = StarLLM(bundled_model(), bundled_tokenizer(), lookback=1, lookback_layers="0")
    old, new = (star.load_context(folder / f"{name}.star") for name in ("old", "new"))
    assert (new.plan.block_size, new.plan.lookback_layers, new.text) == (128, "0", NEW_TEXT)
    assert old.reused_tokens == 0 < new.reused_tokens < len(new)
    again = new.plan.num_blocks - new.reused_blocks
    copied = f"copied {new.reused_tokens:,} tokens"
    assert f"encoded {again} of {new.plan.num_blocks} blocks again, {copied}" in done.err
    anew = star.with_config(block_size=128).encode(NEW_TEXT)
    assert_same_kv(new, anew)


def test_a_saved_context_may_be_replaced_by_its_new_version(folder: Path) -> None:
    path = folder / "book.star"
    ok("encode", *CHAT, folder / "old.txt", "--kv-dtype", "fp8", "-o", path, "-q")
    done = ok("encode", *CHAT, folder / "new.txt", "--reuse", path, "-o", path)
    assert "blocks again" in done.err
    star = StarLLM(bundled_model(), bundled_tokenizer())
    loaded = star.load_context(path)
    assert loaded.kv.kv_format.dtype == "fp8"
    assert loaded.chat is not None
    assert NEW_TEXT in loaded.chat["head"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--block-size", "1k"], "--block-size 1k does not fit .*, which has 128; leave it out"),
        (["--lookback", "2"], "--lookback 2 does not fit .*, which has 1; leave it out"),
        (["--lookback-layers", "all"], "--lookback-layers all does not fit .*, which has 0;"),
        (["--kv-dtype", "fp8"], "--kv-dtype fp8 does not fit .*, which has None; leave it out"),
        (["--method", "dense"], "--method dense does not fit .*, which has star; leave it out"),
        (["--quality", "high"], "--quality high has no effect with --reuse"),
        (["--chat"], "is no chat, and the new text would share no block with it; drop --chat"),
    ],
)
def test_options_that_differ_are_refused_before_the_model_is_loaded(
    folder: Path, options: list[str], message: str
) -> None:
    saved = ["--reuse", folder / "old.star", "-o", folder / "none.star"]
    error = failed("encode", *MODEL, folder / "new.txt", *saved, *options)
    assert re.search(message, error)
    assert not (folder / "none.star").exists()


def test_dense_contexts_are_refused(folder: Path) -> None:
    path = folder / "dense.star"
    ok("encode", *MODEL, folder / "old.txt", "--method", "dense", "-o", path, "-q")
    error = failed(
        "encode", *MODEL, folder / "new.txt", "--reuse", path, "-o", folder / "none.star"
    )
    assert "a dense context cannot be reused for a changed one" in error
