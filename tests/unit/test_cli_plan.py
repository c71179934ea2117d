"""`plan`: blocks, memory and operations, without weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from star_attention.config import MAX_NEW_TOKENS
from tests.command_line import failed, ok
from tests.engines import BUNDLED


def test_plan_needs_no_weights(bare_config: Path) -> None:
    done = ok("plan", "-m", bare_config, "--context", "32k", "--ranks", "2")
    assert done.err == ""
    assert done.out.startswith("context 32,768 tok, 4 blocks x 8k, anchor 8k, 2 ranks\nrank 0  b0 ")
    assert "rank 1  b3   |AAAA" in done.out
    assert "17,309,568 parameters of 2 bytes, 10 layers" in done.out
    for word in (
        "weights",
        "keys and values",
        "working memory",
        "star",
        "dense",
        "official",
        "x 1.50",
        "phase 2",
    ):
        assert word in done.out


def test_plan_counts_a_second_look(bare_config: Path) -> None:
    command = ["plan", "-m", bare_config, "--context", "16k"]
    plain, look = (
        json.loads(ok(*command, "--second-look", share, "--json").out) for share in ("0", "0.1")
    )
    assert (plain["second_look"], look["second_look"]) == (0, 0.1)
    assert plain["flops"]["second_look"]["total"] == 0 < look["flops"]["second_look"]["total"]
    assert look["memory"]["total"] - plain["memory"]["total"] == look["memory"]["kv"]
    shown = ok(*command, "--second-look", "0.1", "--quality", "balanced").out
    assert "once more" in shown
    (row,) = (line for line in shown.splitlines() if "second look " in line and "FLOP" in line)
    assert len(re.split(r" {2,}", row.strip())) == 2, "the other methods have none"
    assert "second look" not in ok(*command).out
    assert failed(*command, "--second-look", "2").startswith(
        "error: second_look 2.0 is not a share"
    )


def test_plan_as_json(bare_config: Path) -> None:
    sizes = ["--context", "16k", "--block-size", "4k", "--anchor-size", "1k", "--dtype", "float32"]
    plan = json.loads(ok("plan", "-m", bare_config, *sizes, "--json", "--queries", "3").out)
    assert (plan["context_tokens"], plan["block_size"], plan["anchor_size"]) == (16384, 4096, 1024)
    assert (plan["blocks"], plan["ranks"], plan["queries"], plan["answer_tokens"]) == (
        4,
        1,
        3,
        MAX_NEW_TOKENS,
    )
    memory, flops = plan["memory"], plan["flops"]
    assert memory["weights"] == 4 * 17_309_568
    assert memory["kv"] == 16384 * plan["kv_bytes_per_token"] == 16384 * 10 * 2 * 2 * 64 * 4
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    assert (
        flops["phase1_star"]["linear"]
        == flops["phase1_dense"]["linear"]
        < flops["phase1_official"]["linear"]
    )
    assert (
        plan["dense_over_star"]
        == flops["phase1_dense"]["total"] / flops["phase1_star"]["total"]
        > 1
    )


def test_plan_shows_the_size_of_the_saved_context(texts: Path) -> None:
    command = ["plan", "-m", BUNDLED, "--dtype", "float32", "--context", "567"]
    saved = json.loads(ok(*command, "--json").out)["saved_bytes"]
    header = (texts / "book.star").stat().st_size - saved
    assert 0 < header < 16 * 1024
    assert "saved context: 5.5 MiB; 1.5 MiB with --kv-dtype fp8\n" in ok(*command).out
    assert "saved context: 1.5 MiB\n" in ok(*command, "--kv-dtype", "fp8").out


def test_plan_shows_the_memory_of_each_rank(bare_config: Path) -> None:
    sizes = ["-m", bare_config, "--context", "32k", "--block-size", "4k", "--ranks", "3"]
    plan = json.loads(ok("plan", *sizes, "--json").out)
    first, second, third = plan["memory_by_rank"]
    block = 4096 * plan["kv_bytes_per_token"]
    # Three blocks each; the second also holds the anchor, and the first some layers of a block,
    # of which a copy is on its way to the second.
    (helped,) = plan["helped"]
    assert (helped["rank"], helped["stop"] - helped["start"]) == (1, 4096)
    assert second - first == block - block * helped["layers"] // 10
    assert f"other ranks' last blocks: {helped['layers']} for rank 1\n" in ok("plan", *sizes).out
    assert third < second
    assert plan["memory"]["total"] == max(first, second, third)
    assert re.search(
        r"fullest device \(rank \d; total of the others: [\d.]+ \w+ to [\d.]+ \w+\)",
        ok("plan", *sizes).out,
    )
    single = ok("plan", "-m", bare_config, "--context", "32k", "--block-size", "4k").out
    assert "fullest" not in single


def test_plan_follows_the_switch_of_ranks(bare_config: Path) -> None:
    """All that rank 0 would do for others is left out: layers, bytes, operations and time."""
    sizes = ["-m", bare_config, "--context", "32k", "--block-size", "8k", "--ranks", "2"]
    sizes += ["--tokens-per-forward", "4k"]
    on, off = (
        json.loads(ok("plan", *sizes, flag, "--json").out)
        for flag in ("--balance-ranks", "--no-balance-ranks")
    )
    assert json.loads(ok("plan", *sizes, "--json").out) == on
    assert on["helped"]
    assert not off["helped"]
    assert off["wire_bytes_phase1"] == 8192 * off["kv_bytes_per_token"] < on["wire_bytes_phase1"]
    busiest = "phase1_star_busiest_rank"
    assert off["flops"][busiest] > on["flops"][busiest]
    assert off["predicted"]["phase1_s"] > on["predicted"]["phase1_s"]
    assert "last blocks:" not in ok("plan", *sizes, "--no-balance-ranks").out
    for plan, flag in ((on, "--balance-ranks"), (off, "--no-balance-ranks")):
        (times,) = json.loads(ok("estimate", *sizes, flag, "--json").out)["estimates"]
        assert times["star"]["encode_s"] == plan["predicted"]["phase1_s"]


@pytest.mark.filterwarnings("default")
def test_plan_warns_about_positions_and_idle_ranks(bare_config: Path) -> None:
    err = ok("plan", "-m", bare_config, "--context", "64k", "--ranks", "8").err
    assert (
        "warning: context, query and answer need 65,856 positions, but the model has 65,536" in err
    )
    assert (
        "warning: 4 of 8 ranks are idle: the context has 4 blocks; lower --block-size or --ranks\n"
        in err
    )
    err = ok("plan", "-m", bare_config, "--context", "1k", "--ranks", "2").err
    assert (
        err
        == "warning: 1 of 2 ranks is idle: the context has 1 block; lower --block-size or --ranks\n"
    )


def test_plan_names_a_model_that_cannot_run(bare_config: Path) -> None:
    (bare_config / "config.json").write_text('{"model_type": "mamba"}')
    assert "cannot run with Star Attention: it keeps a running state" in failed(
        "plan", "-m", bare_config, "--context", "4k"
    )


def test_plan_with_lookback_shows_what_blocks_see_and_what_the_paper_costs(
    bare_config: Path,
) -> None:
    sizes = ["--context", "16k", "--block-size", "2k", "--lookback", "2"]
    sizes += ["--lookback-layers", "lower"]
    shown = ok("plan", "-m", bare_config, *sizes).out
    assert shown.startswith(
        "context 16,384 tok, 8 blocks x 2k, anchor 64, 1 rank, look-back 2 in the lower layers\n"
    )
    assert f"b3   |A{'.' * 8}{'+' * 18}{'#' * 9}." in shown
    assert "without look-back" in shown
    plan = json.loads(ok("plan", "-m", bare_config, *sizes, "--json").out)
    assert (plan["anchor_size"], plan["lookback"], plan["lookback_layers"]) == (64, 2, "lower")
    ratio = plan["flops"]["phase1_star"]["attention"] / plan["flops"]["phase1_paper"]["attention"]
    assert 0.9 < ratio < 1, "star's price"
    paper = json.loads(ok("plan", "-m", bare_config, *sizes[:4], "--json").out)
    assert plan["flops"]["phase1_paper"] == paper["flops"]["phase1_star"]
    assert plan["flops"]["phase1_official"] == paper["flops"]["phase1_official"]
    fp8 = json.loads(ok("plan", "-m", bare_config, *sizes, "--kv-dtype", "fp8", "--json").out)
    recent = 2 * 2048 + 2048
    assert fp8["memory"]["working"] - plan["memory"]["working"] == recent * 5 * 2 * 2 * 64 * 2


def test_plan_says_what_ranks_that_look_back_send(bare_config: Path) -> None:
    sizes = ["-m", bare_config, "--context", "16k", "--block-size", "2k", "--ranks", "2"]
    remark, blocks = "the anchor to every rank", ", and blocks to those that look back to them"
    for quality, expected in (("paper", remark), ("balanced", remark + blocks)):
        shown = ok("plan", *sizes, "--no-balance-ranks", "--quality", quality).out
        (row,) = (line for line in shown.splitlines() if remark in line)
        assert row.endswith(expected)


def test_plan_refuses_layers_that_the_model_does_not_have(bare_config: Path) -> None:
    sizes = ["--context", "16k", "--lookback", "1", "--lookback-layers", "0-10"]
    error = failed("plan", "-m", bare_config, *sizes)
    assert "lookback_layers '0-10' contains layer 10, and the model has layers 0 to 9" in error
