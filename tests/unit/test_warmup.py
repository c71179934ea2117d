"""`star-attention warmup`: what it runs, and where it says the caches are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from star_attention import phase1
from star_attention.generation.batching.warming import warm_up
from tests.command_line import failed, ok
from tests.engines import BUNDLED, engine


def test_on_a_cpu_it_says_that_there_is_nothing_to_keep() -> None:
    done = ok("warmup", "-m", BUNDLED, "--device", "cpu")
    assert done.out == ""
    assert "warming up: a context of 64 tokens\n" in done.err
    assert "warming up: an answer by itself\n" in done.err
    assert "nothing is compiled on this device" in done.err
    assert ok("warmup", "-m", BUNDLED, "--device", "cpu", "--quiet").err == ""


def test_it_refuses_what_generate_refuses() -> None:
    assert "there is no model folder models/nope" in failed("warmup", "-m", "models/nope")
    calibration = ["--calibration", "models/nope.json"]
    assert "models/nope.json cannot be read" in failed("warmup", "-m", BUNDLED, *calibration)
    assert "block_size 'x' is not a number" in failed("warmup", "-m", BUNDLED, "--block-size", "x")


def test_a_server_does_not_warm_up_what_it_never_runs() -> None:
    star = engine("llama")
    pieces = list(warm_up(star, 2))
    assert pieces == ["a context of 64 tokens", "a query of 1 token"]
    assert list(warm_up(star, 2, is_for_generate=True)) == [*pieces, "an answer by itself"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
def test_it_fills_the_cache_that_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids a warm-up that compiles into another place, or nothing."""
    monkeypatch.setattr(phase1, "_WORTH_COMPILING", 1)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    sizes = ["--block-size", "128", "--tokens-per-forward", "128"]
    command = ["warmup", "-m", BUNDLED, "--device", "cpu", "--compile", "--dtype", "float32"]
    done = ok(*command, *sizes)
    assert done.out == f"TORCHINDUCTOR_CACHE_DIR={tmp_path}\n"
    assert f"{tmp_path}: " in done.err
    assert any(files for _, _, files in os.walk(tmp_path))
