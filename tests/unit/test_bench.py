"""Each benchmark runs, and what it computes from times is right. No time is asserted."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from star_attention import StarLLM
from star_attention.bench import decode, models, pictures
from star_attention.bench.decode import DecodeRow
from star_attention.bench.prefill import plots
from star_attention.bench.prefill.rows import (
    PrefillRow,
    extrapolate,
    flop_ratio_reached,
    series,
    speed_up,
)
from star_attention.bench.questions import QuestionsRow
from star_attention.bench.startup import run_in_new_processes
from star_attention.cli import app
from star_attention.errors import InvalidInputError, StarAttentionError
from star_attention.hf.shape import model_shape
from star_attention.planning import cost
from star_attention.planning.plan import BlockPlan
from star_attention.tools import machine
from star_attention.tools.baselines import official_encode, stock_prefill
from tests.engines import BUNDLED, bundled_model, ids, tiny

MODEL = ["-m", str(BUNDLED), "--dtype", "float32", "--device", "cpu", "--quiet"]


def bench(*arguments: object) -> tuple[str, dict[str, Any]]:
    """What is printed above the line of JSON, and that."""
    done = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    text, _, last = done.stdout.rstrip("\n").rpartition("\n")
    return text, json.loads(last)


def failed(*arguments: object) -> str:
    """The one line that an error of ours is."""
    done = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.filterwarnings("ignore:context 128 does not hold two blocks of 128")
def test_prefill(tmp_path: Path) -> None:
    text, found = bench(
        *(
            "prefill",
            *MODEL,
            "--context",
            "128,256",
            "--block",
            "/4,128",
            "--repeats",
            "1",
            "--out",
            tmp_path,
        )
    )
    assert text.startswith(f"{BUNDLED}, float32, on CPU")
    assert "ceilings: matrix product" in text
    rows = [(row["method"], row["context"], row["block"]) for row in found["rows"]]
    whole = [(name, length, None) for length in (128, 256) for name in ("stock", "dense")]
    cut = [
        (name, *sizes)
        for name in ("official", "star")
        for sizes in ((128, 32), (256, 128), (256, 64))
    ]
    assert sorted(rows, key=str) == sorted(whole + cut, key=str)
    assert all(row["seconds"] > 0 and row["failed"] is None for row in found["rows"])
    assert {"date", "hardware", "versions", "git", "ceilings", "command"} <= set(found)
    assert json.loads((tmp_path / "prefill.json").read_text()) == found
    assert {path.name for path in tmp_path.iterdir()} == {
        "prefill.json",
        "prefill-time.png",
        "prefill-speedup.png",
    }


def test_decode(tmp_path: Path) -> None:
    arguments = [
        "--context",
        "128",
        "--block",
        "32",
        "--query-tokens",
        "8",
        "--answer-tokens",
        "4",
        "--repeats",
        "1",
    ]
    text, found = bench("decode", *MODEL, *arguments, "--queries", "2", "--out", tmp_path)
    (row,) = found["rows"]
    assert row["tokens"] == 4
    assert not row["compiled"]
    assert "over floor" in text
    assert {path.name for path in tmp_path.iterdir()} == {"decode.json", "decode.png"}


def test_questions() -> None:
    arguments = [
        "--context",
        "128",
        "--block",
        "32",
        "--query-tokens",
        "8",
        "--answer-tokens",
        "2",
        "--repeats",
        "1",
    ]
    _, found = bench("questions", *MODEL, *arguments)
    assert [row["method"] for row in found["rows"]] == ["stock", "dense", "star"]
    assert all(row["question_s"] > 0 for row in found["rows"])


def test_kernels() -> None:
    _, found = bench("kernels", *MODEL, "--context", "512", "--block", "64", "--repeats", "1")
    calls = {row["what"] for row in found["rows"]}
    assert {"a block of 64", "64 over an anchor of 64", "merging 64", "a token over 512"} <= calls


BELOW = "is below 1; give a positive number of tokens"
COMMANDS = ("prefill", "decode", "questions", "kernels", "startup")


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
            [
                "prefill",
                *MODEL,
                "--context",
                "1k,4k",
                "--block",
                "4k,3k",
                "--methods",
                "star,official",
            ],
            "nothing is left to measure: no context holds two blocks of 4k or 3k; give smaller blocks or longer contexts",
        ),
        (["decode", *MODEL, "--kv-device", "gpu"], "kv_device 'gpu' is unknown"),
        *(([what, *MODEL, "--context", "0"], f"context 0 {BELOW}") for what in COMMANDS),
        *(([what, *MODEL, "--block", "-1"], f"block_size -1 {BELOW}") for what in COMMANDS[1:]),
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
def test_what_cannot_be_measured(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forbids measuring anything first: a minute's ceilings, or an hour's rows, before a mistake is told."""
    monkeypatch.delattr(machine, "measure_ceilings")
    assert message in failed(*arguments)


@pytest.mark.filterwarnings("default")
def test_what_is_left_out_is_told_and_rows_are_counted() -> None:
    arguments = [
        "prefill",
        *MODEL,
        "--context",
        "64,128",
        "--block",
        "/4,64",
        "--methods",
        "star",
        "--repeats",
        "0",
    ]
    arguments.remove("--quiet")
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines() == [
        "warning: context 64 does not hold two blocks of 64; this block size is left out",
        "1 of 3: star, context 64, block 16",
        "2 of 3: star, context 128, block 64",
        "3 of 3: star, context 128, block 32",
    ]


@pytest.mark.parametrize("what", COMMANDS)
def test_a_measurement_is_never_replaced(tmp_path: Path, what: str) -> None:
    """Asked before the model is loaded: there is none here."""
    (tmp_path / f"{what}.json").write_text("a day's work")
    line = failed(what, "-m", "no such model", "--out", tmp_path)
    assert (
        line == f"error: {tmp_path / what}.json exists, and a measurement is never overwritten;"
        " give another folder with --out"
    )
    assert [path.read_text() for path in tmp_path.iterdir()] == ["a day's work"]


def test_results_go_to_folders(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("a book")
    for command in (
        ["decode", "-m", "no such model"],
        ["startup", "-m", "no such model"],
        ["plot", "none.json"],
    ):
        for out in (book, book / "new"):
            assert (
                failed(*command, "--out", out)
                == f"error: {book} is no folder; give another one with --out"
            )


def test_one_thread_is_no_plural(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, told in ((1, "CPU, 1 thread ("), (2, "CPU, 2 threads (")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert machine.hardware(torch.device("cpu")).startswith(told)


# ------------------------------------------------------------------ baselines compute what they are said to


@pytest.mark.parametrize("tokens_per_forward", [24, 48, 512])
def test_the_official_scheme_gives_the_same_keys(tokens_per_forward: int) -> None:
    star = StarLLM(tiny("llama"), block_size=24, tokens_per_forward=tokens_per_forward)
    tokens = torch.tensor(ids(101))
    expected = star.encode(tokens)
    store = official_encode(star.runtime.handle, tokens, expected.plan, tokens_per_forward)
    for ours, theirs in zip(store.layers, expected.kv.layers, strict=True):
        for a, b in zip(ours.pair(), theirs.pair(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_stock_prefill_is_dense_attention() -> None:
    model = bundled_model()
    before = model.config._attn_implementation
    tokens = torch.tensor(ids(300)) + 100
    cache = stock_prefill(model, tokens, None)
    expected = StarLLM(model, method="dense").encode(tokens)
    for layer, kept in zip(cache.layers, expected.kv.layers, strict=True):
        torch.testing.assert_close(layer.keys, kept.pair()[0], atol=1e-4, rtol=1e-4)
    assert model.config._attn_implementation == before


def test_random_shapes_are_the_models() -> None:
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
    """Model FLOPs as they are counted for it elsewhere: 2 x 6.98e9 L + 4 x 4096 x 32 b^2 (0.5 + 1.5 (n - 1))."""
    from transformers import LlamaConfig

    shape = model_shape(LlamaConfig(**models.SHAPES["llama-3.1-8b"]), "bfloat16")
    plan = BlockPlan.resolve(131072, 16384, None, 1)
    counted = cost.phase1(shape, plan, tokens_per_forward=16384)
    assert counted.linear == pytest.approx(2 * 6.98e9 * 131072, rel=1e-3)
    assert counted.attention == pytest.approx(4 * 4096 * 32 * 16384**2 * (0.5 + 1.5 * 7), rel=1e-3)


SHORT = ["--context", "256", "--block", "128", "--query-tokens", "4"]


def test_startup() -> None:
    text, found = bench("startup", *MODEL, *SHORT, "--in-this-process")
    assert [row["what"] for row in found["rows"]] == ["a context", "a query", "a further token"]
    assert all(row["first_s"] > 0 and row["again_s"] > 0 for row in found["rows"])
    assert "cost s" in text


@pytest.mark.slow
def test_startup_in_processes_of_its_own(tmp_path: Path) -> None:
    _, found = bench("startup", *MODEL, *SHORT, "--out", tmp_path / "new")
    assert [row["caches"] for row in found["rows"]] == ["empty"] * 3 + ["filled"] * 3
    assert json.loads((tmp_path / "new" / "startup.json").read_text()) == found
    with pytest.raises(StarAttentionError, match=r"the measured process failed: .*no such model"):
        run_in_new_processes(
            ["bench", "startup", "--in-this-process", "-m", "no such model"], print
        )


# ------------------------------------------------------------------ ratios


def test_ratios_of_prefill() -> None:
    dense = PrefillRow(method="dense", context=100, block=None, seconds=10.0, flops=100)
    star = PrefillRow(method="star", context=100, block=25, asked="/4", seconds=4.0, flops=50)
    gone = PrefillRow(method="stock", context=100, block=None, flops=100, failed="out of memory")
    rows = [gone, dense, star]
    assert speed_up(star, rows, "dense") == 2.5
    assert speed_up(star, rows, "stock") is None
    assert speed_up(dense, rows, "dense") is None
    assert flop_ratio_reached(star, rows) == 1.25
    assert flop_ratio_reached(dense, rows) is None
    assert [name for name, _ in series(rows)] == ["dense", "star, block length / 4"]


def test_ratios_of_answers() -> None:
    row = DecodeRow(
        context=10,
        block=5,
        compiled=True,
        queries=1,
        query_tokens=1,
        tokens=2,
        token_s=0.3,
        floor_s=0.2,
    )
    assert row.over_floor == pytest.approx(1.5)
    asked = QuestionsRow(method="star", context=10, questions=7, encode_s=3.0, question_s=2.0)
    assert asked.total_s == 17.0


def test_dense_times_beyond_what_is_run_are_worked_out() -> None:
    """From two runs, the linear part and that of attention apart; from one, nothing."""
    flops = [cost.Flops(linear=10 * k, attention=3 * k * k) for k in (1, 4, 8)]
    rows = [
        PrefillRow(
            method="dense",
            context=1024 * k,
            block=None,
            seconds=(10 * k) / 100 + (3 * k * k) / 50,
            linear_flops=10 * k,
            attention_flops=3 * k * k,
        )
        for k in (1, 4)
    ]
    far = extrapolate("dense", 8192, flops[2], rows)
    assert far.extrapolated
    assert far.seconds == pytest.approx(80 / 100 + 192 / 50)
    assert extrapolate("dense", 8192, flops[2], rows[:1]).failed
    star = PrefillRow(method="star", context=8192, block=1024, seconds=1.0, flops=1)
    assert speed_up(star, [*rows, far, star], "dense") == pytest.approx(far.seconds)


def test_pictures_of_earlier_measurements(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    star, dense = (
        PrefillRow(method=m, context=10, block=b, seconds=2.0, flops=4)
        for m, b in (("star", 5), ("dense", None))
    )
    steps = DecodeRow(
        context=10,
        block=5,
        compiled=True,
        queries=1,
        query_tokens=1,
        tokens=2,
        token_s=0.3,
        floor_s=0.2,
    )
    head: dict[str, Any] = dict(model="m", dtype="d", hardware="h", ceilings={"flops_per_s": 1.0})
    for name, kind, rows in (
        ("a", "prefill", [star]),
        ("b", "prefill", [dense]),
        ("c", "decode", [steps]),
    ):
        found = head | dict(benchmark=kind, rows=[asdict(row) for row in rows])
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    files = [tmp_path / f"{name}.json" for name in "abc"]
    made = pictures.draw_files(files, tmp_path / "new")
    assert [path.name for path in made] == ["prefill-time.png", "prefill-speedup.png", "decode.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    for figure in (
        plots.time_figure([star, dense], 1.0),
        decode.token_figure([steps]),
    ):
        (floor,) = {
            line.get_marker() for line in figure.axes[0].lines if line.get_linestyle() == "None"
        }
        assert floor == "_"  # of one length: a line would not be seen
    other = json.loads(files[1].read_text()) | {"hardware": "another"}
    files[1].write_text(json.dumps(other))
    with pytest.raises(InvalidInputError, match="draw them separately"):
        pictures.draw_files(files, tmp_path)
    for text, message in (
        ("{}", "is not JSON of `bench prefill` or `bench decode`$"),
        ("no JSON", "is not JSON of `bench prefill` or `bench decode`$"),
        (
            json.dumps(head | {"benchmark": "prefill", "rows": [{}]}),
            "is not JSON of `bench prefill` as this version writes it",
        ),
        (
            json.dumps(head | {"benchmark": "kernels", "rows": []}),
            "is the JSON of `bench kernels`; give that of `bench prefill` or",
        ),
    ):
        files[0].write_text(text)
        with pytest.raises(InvalidInputError, match=rf"a\.json {message}"):
            pictures.draw_files(files, tmp_path)
    with pytest.raises(InvalidInputError, match=r"there is no file .*none\.json; give the JSON"):
        pictures.draw_files([tmp_path / "none.json"], tmp_path)
    with pytest.raises(InvalidInputError, match=r"is a folder; give the JSON file of .* in it"):
        pictures.draw_files([tmp_path], tmp_path)
