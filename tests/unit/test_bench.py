"""Each benchmark runs, and refuses cases that it cannot measure. No time is asserted."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from star_attention import StarLLM
from star_attention.bench import models
from star_attention.bench.startup import run_in_new_processes
from star_attention.cli import app
from star_attention.errors import StarAttentionError
from star_attention.hf.shape import model_shape
from star_attention.planning import cost
from star_attention.planning.plan import BlockPlan
from star_attention.tools import machine
from star_attention.tools.baselines import official_encode, stock_prefill
from tests.engines import BUNDLED, bundled_model, ids, tiny

MODEL = ["-m", str(BUNDLED), "--dtype", "float32", "--device", "cpu", "--quiet"]


ceilings_of_this_machine = functools.cache(machine.measure_ceilings)


@pytest.fixture(autouse=True)
def ceilings_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half a second, and are those of the same machine for every test."""
    monkeypatch.setattr(machine, "measure_ceilings", ceilings_of_this_machine)


def bench(*arguments: object) -> tuple[str, dict[str, Any]]:
    """Run a benchmark; return its output above the line of JSON, and the JSON."""
    process = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert process.exit_code == 0, process.output
    text, _, last = process.stdout.rstrip("\n").rpartition("\n")
    return text, json.loads(last)


def failed(*arguments: object) -> str:
    """Run a benchmark that fails; return its error, a single line."""
    process = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert process.exit_code == 1, process.output
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    return line


@pytest.mark.filterwarnings("ignore:context 128 does not hold two blocks of 128")
def test_prefill(tmp_path: Path) -> None:
    sizes = ["--context", "128,256", "--block", "/4,128", "--repeats", "1"]
    text, record = bench("prefill", *MODEL, *sizes, "--out", tmp_path)
    assert text.startswith(f"{BUNDLED}, float32, on CPU")
    assert "ceilings: matrix product" in text
    rows = [(row["method"], row["context"], row["block"]) for row in record["rows"]]
    dense = [(name, length, None) for length in (128, 256) for name in ("stock", "dense")]
    blocks = [
        (name, *size)
        for name in ("official", "star")
        for size in ((128, 32), (256, 128), (256, 64))
    ]
    assert sorted(rows, key=str) == sorted(dense + blocks, key=str)
    assert all(row["seconds"] > 0 and row["failed"] is None for row in record["rows"])
    assert {"date", "hardware", "versions", "git", "ceilings", "command"} <= set(record)
    assert json.loads((tmp_path / "prefill.json").read_text()) == record
    assert {path.name for path in tmp_path.iterdir()} == {
        "prefill.json",
        "prefill-time.png",
        "prefill-speedup.png",
    }


def test_presets_of_look_back() -> None:
    sizes = ["--context", "1k", "--block", "128", "--repeats", "0"]
    _, record = bench("prefill", *MODEL, *sizes, "--methods", "star,high,balanced,dense")
    flops = {row["method"]: row["flops"] for row in record["rows"]}
    assert [*flops] == ["dense", "balanced", "high", "star"]
    assert flops["balanced"] < 1.02 * flops["star"]
    assert flops["balanced"] < flops["high"] < flops["dense"]


SMALL = ["--context", "128", "--block", "32", "--query-tokens", "8", "--repeats", "1"]


def test_decode(tmp_path: Path) -> None:
    answers = ["--answer-tokens", "4", "--queries", "2"]
    text, record = bench("decode", *MODEL, *SMALL, *answers, "--out", tmp_path)
    (row,) = record["rows"]
    assert row["tokens"] == 4
    assert not row["compiled"]
    assert "over floor" in text
    assert {path.name for path in tmp_path.iterdir()} == {"decode.json", "decode.png"}


def test_questions() -> None:
    _, record = bench("questions", *MODEL, *SMALL, "--answer-tokens", "2")
    assert [row["method"] for row in record["rows"]] == ["stock", "dense", "star"]
    assert all(row["question_s"] > 0 for row in record["rows"])
    assert all(row["edit_s"] is None for row in record["rows"])


def test_an_edit_beside_encoding_anew() -> None:
    text, record = bench(
        "questions", *MODEL, *SMALL, "--answer-tokens", "2", "--methods", "dense,star", "--edit"
    )
    dense, star = record["rows"]
    assert dense["edit_s"] is None
    assert star["edit_s"] > 0
    assert "edit / text" in text


def test_what_a_second_look_adds_to_a_question() -> None:
    sizes = [*SMALL, "--answer-tokens", "2", "--methods", "dense,star,balanced"]
    text, record = bench("questions", *MODEL, *sizes, "--second-look", "0.5")
    dense, *others = record["rows"]
    assert dense["second_look_s"] is None
    assert all(row["second_look_s"] > 0 for row in others)
    assert "second look of 0.5 adds s" in text


def test_rows() -> None:
    cases = ["--texts", "2", "--rows", "1,3", "--cases", "lockstep,turnover,encode,turn"]
    text, record = bench("rows", *MODEL, *SMALL, *cases, "--answer-tokens", "4")
    rows = record["rows"]
    assert [(row["case"], row["rows"]) for row in rows] == [
        ("lockstep", 1),
        ("lockstep", 3),
        ("turnover", 3),
        ("encode", 3),
        ("turn", 1),
    ]
    assert all(row["failed"] is None for row in rows)
    assert all(row["tokens_per_s"] > 0 for row in rows[:4])
    assert rows[3]["longest_gap_s"] < rows[3]["encode_s"] > 0 < rows[3]["encode_alone_s"]
    assert rows[4]["first_token_s"] > 0
    assert "x lockstep" in text


def test_kernels() -> None:
    _, record = bench("kernels", *MODEL, "--context", "512", "--block", "64", "--repeats", "1")
    calls = {row["what"] for row in record["rows"]}
    assert {"a block of 64", "64 over an anchor of 64", "merging 64", "a token over 512"} <= calls


BELOW = "is below 1; give a positive number of tokens"
LARGE_BLOCKS = ["--context", "1k,4k", "--block", "4k,3k"]


def test_a_token_reads_the_experts_that_it_is_routed_to() -> None:
    """Two of five experts in two of three layers, and no input embedding."""
    model = tiny("deepseek_v3")
    whole = models.weight_bytes(model) - model.get_input_embeddings().weight.nbytes
    experts: Any = model.model.layers[2].mlp.experts
    one = (experts.gate_up_proj.nbytes + experts.down_proj.nbytes) // 5
    layers = sum(hasattr(layer.mlp, "experts") for layer in model.model.layers)
    assert models.weight_bytes_per_token(model) == whole - layers * 3 * one < whole
    dense = tiny("llama")
    assert models.weight_bytes_per_token(dense) in (
        models.weight_bytes(dense),
        models.weight_bytes(dense) - dense.get_input_embeddings().weight.nbytes,
    )


COMMANDS = ("prefill", "decode", "questions", "kernels", "startup", "rows")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prefill"], "give either a model (-m) or the shapes of one (--shapes)"),
        (["decode", "--shapes", "gpt-9"], "shapes 'gpt-9' are unknown; choose one of llama-3.1-8b"),
        (
            ["prefill", *MODEL, "--methods", "star,magic"],
            "method 'magic' is unknown; choose from stock",
        ),
        (
            ["prefill", *MODEL, "--methods", "stock-cudnn"],
            "'stock-cudnn' needs a CUDA device, this is cpu; leave it out",
        ),
        (["prefill", *MODEL, "--block", "/x"], "block size '/x' is not a fraction of the context"),
        (["prefill", *MODEL, "--block", "0"], "block size '0' is below 1; give tokens, or /4"),
        (["prefill", *MODEL, "--context", "many"], "context 'many' is not a number of tokens"),
        (["prefill", *MODEL, "--tokens-per-forward", "0"], "tokens_per_forward 0 is below 1"),
        (["prefill", *MODEL, "--kv-dtype", "fp9"], "kv_dtype 'fp9' is unknown"),
        (
            ["prefill", *MODEL, "--methods", "star,official", *LARGE_BLOCKS],
            "nothing is left to measure: no context holds two blocks of 4k or 3k; give smaller"
            " blocks or longer contexts",
        ),
        (["decode", *MODEL, "--kv-device", "gpu"], "kv_device 'gpu' is unknown"),
        (["questions", *MODEL, "--second-look", "2"], "second_look 2.0 is not a share from 0 to 1"),
        (["questions", *MODEL, "--methods", "best"], "method 'best' is unknown"),
        (["rows", *MODEL, "--rows", "1,0"], "rows '0' is not a number from 1; give e.g. 1,32"),
        (["rows", *MODEL, "--cases", "all"], "case 'all' is unknown; choose from lockstep, turn"),
        *(([name, *MODEL, "--context", "0"], f"context 0 {BELOW}") for name in COMMANDS),
        *(([name, *MODEL, "--block", "-1"], f"block_size -1 {BELOW}") for name in COMMANDS[1:]),
        (
            ["prefill", *MODEL, "--context", "65537"],
            "65,537 tokens are more than the model's 65,536 positions; give a shorter",
        ),
        (
            ["decode", *MODEL, "--context", "64k"],
            "65,856 tokens are more than the model's 65,536 positions",
        ),
    ],
)
def test_impossible_measurements_are_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forbids measuring before checking: a minute of ceilings, or an hour of rows."""
    monkeypatch.delattr(machine, "measure_ceilings")
    assert message in failed(*arguments)


@pytest.mark.filterwarnings("default")
def test_blocks_left_out_are_reported_and_rows_are_counted() -> None:
    arguments = ["prefill", *MODEL, "--methods", "star", "--repeats", "0"]
    arguments += ["--context", "256,512", "--block", "/4,256"]
    arguments.remove("--quiet")
    process = CliRunner().invoke(app, ["bench", *arguments])
    assert process.exit_code == 0, process.output
    said, *rest = process.stderr.splitlines()
    assert said == (
        "warning: context 256 does not hold two blocks of 256; this block size is left out"
    )
    # Each row is followed by its figures, for those who wait for the others.
    assert rest[::2] == [
        "1 of 3: star, context 256, block 64",
        "2 of 3: star, context 512, block 256",
        "3 of 3: star, context 512, block 128",
    ]
    for line, start in zip(rest[1::2], ["256", "512", "512"], strict=True):
        assert line.startswith(f"context {start}, method star, block ")
        assert re.search(r", s [\d.]+, TFLOP/s [\d.]+", line)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_measurement_is_never_overwritten(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked before the model is loaded."""
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("it is loaded"))
    (tmp_path / f"{command}.json").write_text("a day's work")
    line = failed(command, "-m", BUNDLED, "--out", tmp_path)
    assert (
        line == f"error: {tmp_path / command}.json exists, and a measurement is never overwritten;"
        " give another folder with --out"
    )
    assert [path.read_text() for path in tmp_path.iterdir()] == ["a day's work"]


def test_results_go_to_folders(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("a book")
    for command in (
        ["decode", "-m", BUNDLED],
        ["startup", "-m", BUNDLED],
        ["plot", "none.json"],
    ):
        for out in (book, book / "new"):
            assert (
                failed(*command, "--out", out)
                == f"error: {book} is not a folder; give another one with --out"
            )


def test_one_thread_is_singular(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, name in ((1, "CPU, 1 thread ("), (2, "CPU, 2 threads (")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert machine.hardware(torch.device("cpu")).startswith(name)


# ------------------------------------------------------------------ baselines


@pytest.mark.parametrize("tokens_per_forward", [24, 48, 512])
def test_the_official_scheme_gives_the_same_keys(tokens_per_forward: int) -> None:
    star = StarLLM(tiny("llama"), block_size=24, tokens_per_forward=tokens_per_forward)
    tokens = torch.tensor(ids(101))
    expected = star.encode(tokens)
    store = official_encode(star.runtime.handle, tokens, expected.plan, tokens_per_forward)
    for layer, expected_layer in zip(store.layers, expected.kv.layers, strict=True):
        for a, b in zip(layer.pair(), expected_layer.pair(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_stock_prefill_is_dense_attention() -> None:
    model = bundled_model()
    implementation = model.config._attn_implementation
    tokens = torch.tensor(ids(300)) + 100
    cache = stock_prefill(model, tokens, None)
    expected = StarLLM(model, method="dense").encode(tokens)
    for layer, expected_layer in zip(cache.layers, expected.kv.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected_layer.pair()[0], atol=1e-4, rtol=1e-4)
    assert model.config._attn_implementation == implementation


def test_a_random_model_has_the_known_shapes() -> None:
    with pytest.MonkeyPatch.context() as patch:
        small = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=200)
        patch.setitem(
            models.SHAPES, "small", small | dict(num_attention_heads=4, num_key_value_heads=2)
        )
        model = models.load_model(None, "small", dtype="auto", device="cpu")
    assert models.model_name(model) == "small"
    assert next(model.parameters()).dtype == torch.float32
    head = model.get_output_embeddings().weight
    assert models.weight_bytes_per_token(model) == 4 * (
        sum(p.numel() for p in model.parameters()) - head.numel()
    )
    assert float(head.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_tied_embeddings_are_read_for_each_token() -> None:
    model = bundled_model()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert models.weight_bytes_per_token(model) == 4 * sum(p.numel() for p in model.parameters())


def test_eight_billion_shapes_cost_what_the_paper_model_does() -> None:
    """The usual count is 2 x 6.98e9 L + 4 x 4096 x 32 b^2 (0.5 + 1.5 (n - 1))."""
    from transformers import LlamaConfig

    shape = model_shape(LlamaConfig(**models.SHAPES["llama-3.1-8b"]), "bfloat16")
    plan = BlockPlan.resolve(131072, 16384, None, 1)
    flops = cost.phase1(shape, plan, tokens_per_forward=16384)
    assert flops.linear == pytest.approx(2 * 6.98e9 * 131072, rel=1e-3)
    assert flops.attention == pytest.approx(4 * 4096 * 32 * 16384**2 * (0.5 + 1.5 * 7), rel=1e-3)


SHORT = ["--context", "256", "--block", "128", "--query-tokens", "4"]


def test_startup() -> None:
    text, record = bench("startup", *MODEL, *SHORT, "--in-this-process")
    assert [row["what"] for row in record["rows"]] == ["a context", "a query", "a further token"]
    assert all(row["first_s"] > 0 and row["again_s"] > 0 for row in record["rows"])
    assert "cost s" in text


@pytest.mark.slow
def test_startup_in_processes_of_its_own(tmp_path: Path) -> None:
    _, record = bench("startup", *MODEL, *SHORT, "--out", tmp_path / "new")
    assert [row["caches"] for row in record["rows"]] == ["empty"] * 3 + ["filled"] * 3
    assert json.loads((tmp_path / "new" / "startup.json").read_text()) == record
    with pytest.raises(StarAttentionError, match=r"the measured process failed: .*no such model"):
        run_in_new_processes(
            ["bench", "startup", "--in-this-process", "-m", "no such model"], print
        )
