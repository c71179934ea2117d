"""Estimates of both phases on hardware that may not be available."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from star_attention.bench.models import SHAPES
from star_attention.cli import app
from star_attention.cli.estimate import HARDWARE_NAMES
from star_attention.errors import InvalidInputError
from star_attention.hf.shape import model_shape
from star_attention.planning import cost, estimate
from star_attention.planning.cost import Flops
from star_attention.planning.hardware import HARDWARE, calibrate, parse_hardware
from star_attention.planning.plan import BlockPlan

SHAPE = model_shape(LlamaConfig(**SHAPES["llama-3.1-8b"]), "bfloat16")
H200 = HARDWARE["h200-nvlink"]
K = 1024


def seconds(
    scheme: str,
    *,
    context: int = 256 * K,
    ranks: int = 8,
    block: int = 32 * K,
    on: Any = H200,
    **settings: Any,
) -> estimate.Estimate:
    plan = BlockPlan.resolve(context, block, ranks=ranks, **settings)
    return estimate.estimate(SHAPE, on, scheme, plan, tokens_per_forward=16 * K)


def test_one_rank_takes_its_operations_divided_by_the_rates() -> None:
    flops = cost.phase1(
        SHAPE, BlockPlan.resolve(256 * K, 32 * K, None, 1), tokens_per_forward=16 * K
    )
    star = seconds("star", ranks=1)
    assert star.encode_s == pytest.approx(
        flops.linear / H200.matrix + flops.attention / H200.attention
    )
    assert star.wire_s == star.exposed_s == 0
    dense = cost.phase1(SHAPE, BlockPlan.dense(256 * K), tokens_per_forward=16 * K)
    for scheme in ("ring", "ring-plain"):
        expected = dense.linear / H200.matrix + dense.attention / H200.attention
        assert seconds(scheme, ranks=1).encode_s == pytest.approx(expected)


def test_a_token_takes_reading_and_merging() -> None:
    alone = seconds("star", ranks=1)
    weights_s = (SHAPE.linear_parameters + SHAPE.head_parameters) * 2 / H200.bandwidth
    gaps_s = SHAPE.layers * H200.gap
    read_s = 256 * K * SHAPE.kv_bytes_per_token / H200.bandwidth
    assert alone.token_s == pytest.approx(weights_s + read_s + gaps_s)
    assert alone.sliced_token_s is None
    shared = seconds("star")
    merges_s = SHAPE.layers * H200.exchange
    assert shared.token_s == pytest.approx(weights_s + read_s / 8 + gaps_s + merges_s, rel=1e-2)
    assert shared.sliced_token_s == pytest.approx(
        weights_s / 8 + read_s / 8 + gaps_s + 4 * merges_s, rel=2e-2
    )


def test_a_token_on_a_mesh_of_tensor_parallel_ranks_reads_a_share_of_the_layers() -> None:
    """The head stays whole, and each layer takes two sums; keys and values are shared twice."""
    mesh = estimate.estimate(
        SHAPE,
        H200,
        "star",
        BlockPlan.resolve(256 * K, 32 * K, ranks=2),
        tokens_per_forward=16 * K,
        tensor_parallel=4,
    )
    weights_s = (SHAPE.linear_parameters / 4 + SHAPE.head_parameters) * 2 / H200.bandwidth
    read_s = 256 * K * SHAPE.kv_bytes_per_token / 8 / H200.bandwidth
    others_s = SHAPE.layers * (H200.gap + 3 * H200.exchange)
    assert mesh.token_s == pytest.approx(weights_s + read_s + others_s, rel=1e-2)
    assert mesh.sliced_token_s is None
    alone = seconds("star", ranks=2)
    assert mesh.compute_s == pytest.approx(alone.compute_s / 4)
    assert alone.exposed_s < mesh.exposed_s


def test_ranks_wait_for_an_anchor_of_several_forwards() -> None:
    """Their first forward attends to all of it, so they begin once rank 0 is in its last one."""
    late = cost.phase1(SHAPE, BlockPlan.dense(16 * K), tokens_per_forward=16 * K)
    at_once = seconds("star-local", context=64 * K, ranks=2, block=16 * K).compute_s
    assert seconds("star", context=64 * K, ranks=2, block=16 * K).compute_s < at_once
    two_forwards = seconds("star", context=64 * K, ranks=2)
    own = cost.phase1(
        SHAPE, BlockPlan.resolve(64 * K, 32 * K, None, 2), tokens_per_forward=16 * K, rank=1
    )
    spent = (late, own)
    assert two_forwards.compute_s == pytest.approx(
        sum(flops.linear / H200.matrix + flops.attention / H200.attention for flops in spent)
    )


def test_schemes_are_ordered_by_their_work() -> None:
    """Eight blocks on eight ranks: encoding the anchor again takes longer, on any link."""
    star, local, official = (seconds(scheme) for scheme in ("star", "star-local", "official"))
    assert star.encode_s < local.encode_s == pytest.approx(official.encode_s)
    two_each = [seconds(scheme, context=512 * K) for scheme in ("star", "star-local", "official")]
    assert two_each[0].encode_s < two_each[1].encode_s < two_each[2].encode_s


def test_a_contiguous_ring_does_nearly_twice_the_attention() -> None:
    ring, plain = (seconds(scheme, context=2**20, ranks=64) for scheme in ("ring", "ring-plain"))
    free = parse_hardware("h200-nvlink,attention=1e30")
    linear = seconds("ring", context=2**20, ranks=64, on=free).compute_s
    assert (plain.compute_s - linear) / (ring.compute_s - linear) == pytest.approx(
        2 * 63.5 / 64, rel=1e-3
    )


def test_a_slow_link_shows() -> None:
    slow = parse_hardware("h200-nvlink,link=1e9")
    assert seconds("star").exposed_s == 0
    star, local = seconds("star", on=slow), seconds("star-local", on=slow)
    assert star.wire_s == pytest.approx(32 * K * SHAPE.kv_bytes_per_token / 1e9 + 32 * slow.latency)
    assert 0 < star.exposed_s < star.wire_s
    assert local.wire_s == 0
    assert local.encode_s < star.encode_s, "computing the anchor again pays"
    assert seconds("ring", on=slow).exposed_s > star.exposed_s


def test_memory_is_that_of_the_fullest_rank() -> None:
    kv, two = SHAPE.kv_bytes_per_token, seconds("star", context=512 * K)
    arriving = 2 * kv // SHAPE.layers + SHAPE.hidden_size * SHAPE.bytes_per_element
    assert two.memory - seconds("star").memory == 32 * K * (kv + arriving), (
        "two blocks per rank, next to the anchor, and what rank 0 computes of the second"
    )
    assert seconds("star", ranks=1, context=2**20).fits is False
    assert seconds("star", ranks=16, context=2**20).fits


def test_the_best_block_is_the_fastest_allowed_one() -> None:
    def best(context: int, ranks: int, smallest: int, forward: int = 16 * K) -> estimate.Estimate:
        return estimate.best_block(
            SHAPE,
            H200,
            lambda size: BlockPlan.resolve(context, size, ranks=ranks),
            smallest=smallest,
            tokens_per_forward=forward,
        )

    times = {
        b: seconds("star", context=512 * K, block=b).encode_s
        for b in (8 * K, 16 * K, 32 * K, 64 * K, 128 * K)
    }
    assert best(512 * K, 8, 8 * K).block == min(times, key=times.__getitem__)
    assert best(512 * K, 8, 128 * K).block == 128 * K
    assert best(700, 2, 1, forward=512).block == 700


# ------------------------------------------------------------------ hardware


def test_calibration_recovers_the_rates() -> None:
    samples = [
        (Flops(linear=linear, attention=rest), linear / 7e14 + rest / 5e14)
        for linear, rest in ((10**15, 10**14), (2 * 10**15, 9 * 10**15))
    ]
    calibrated = calibrate(H200, samples, 4e12)
    assert (calibrated.matrix, calibrated.attention, calibrated.bandwidth) == pytest.approx(
        (7e14, 5e14, 4e12)
    )
    assert (calibrated.link, calibrated.name) == (H200.link, "h200-nvlink, calibrated")
    with pytest.raises(InvalidInputError, match="do not separate the rates"):
        calibrate(H200, samples[:1], 4e12)


def test_the_command_line_names_all_hardware() -> None:
    assert tuple(HARDWARE) == HARDWARE_NAMES


def test_hardware_by_name_and_by_values() -> None:
    assert parse_hardware("h200-ib") is HARDWARE["h200-ib"]
    assert parse_hardware("h200-ib, link=5").link == 5
    own = parse_hardware("matrix=1,attention=2,bandwidth=3,memory=4,link=5,latency=6")
    assert (own.matrix, own.latency) == (1, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h300", "hardware 'h300' is unknown; choose one of h200-nvlink"),
        ("h200-ib,speed=3", "hardware 'speed=3' is unknown; give matrix="),
        ("h200-ib,link=fast", "hardware link 'fast' is not a number"),
        ("h200-ib,link=0", "hardware link 0.0 is not above 0"),
        ("matrix=1,link=2", "lacks attention, bandwidth, memory, latency"),
    ],
)
def test_invalid_hardware(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        parse_hardware(text)


# ------------------------------------------------------------------ command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("config")
    settings: dict[str, Any] = dict(
        architectures=["LlamaForCausalLM"], dtype="bfloat16", max_position_embeddings=1 << 20
    )
    LlamaConfig(**SHAPES["llama-3.1-8b"], **settings).save_pretrained(folder)
    return str(folder)


def run(command: str, model: str, *arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, [command, "-m", model, *arguments])
    assert done.exit_code == status, done.output
    return done.stdout if status == 0 else done.stderr


def test_plan_with_hardware_still_estimates_and_says_what_to_use(model: str) -> None:
    arguments = ["-m", model, "--context", "128k", "--hardware", "h200-ib", "--json"]
    former = CliRunner().invoke(app, ["plan", *arguments])
    assert former.exit_code == 0
    assert former.stdout == CliRunner().invoke(app, ["estimate", *arguments]).stdout
    assert former.stderr == (
        "`plan --hardware` is deprecated and will be removed; use `star-attention estimate`\n"
    )
    table = ["-m", model, "--context", "128k..256k", "--ranks", "1,8", "--block-size", "quarter"]
    former = CliRunner().invoke(app, ["plan", *table, "--hardware", "h200-ib"])
    assert (
        former.stdout
        == CliRunner().invoke(app, ["estimate", *table, "--hardware", "h200-ib"]).stdout
    )


def test_the_hardware_defaults_to_the_one_that_was_measured(model: str) -> None:
    assert " on h200-nvlink: " in run("estimate", model, "--context", "128k")


def test_a_row_for_each_length_and_number_of_ranks(model: str) -> None:
    text = run(
        "estimate",
        model,
        "--hardware",
        "h200-ib",
        "--context",
        "128k..512k",
        "--ranks",
        "1,8",
        "--block-size",
        "16k",
    )
    rows = [
        line.split()[:3]
        for line in text.splitlines()
        if line.startswith("  ") and "16k" in line.split()[2:3]
    ]
    assert rows == [
        [length, ranks, "16k"] for length in ("128k", "256k", "512k") for ranks in ("1", "8")
    ]
    assert "link 40 GB/s" in text


@pytest.mark.filterwarnings("default")
def test_lengths_beyond_the_models_positions_are_reported_once(model: str) -> None:
    arguments = ["estimate", "-m", model, "--hardware", "h200-ib", "--ranks", "1,8", "--context"]
    assert CliRunner().invoke(app, [*arguments, "512k"]).stderr == ""
    (line,) = CliRunner().invoke(app, [*arguments, "512k..2m"]).stderr.splitlines()
    assert line == (
        "warning: context, query and answer need 2,097,472 positions, but the model has"
        " 1,048,576: it would refuse to encode this context"
    )


def test_json_and_the_rule_of_a_quarter(model: str) -> None:
    arguments = [
        "--hardware",
        "a100-nvlink",
        "--context",
        "128k",
        "--ranks",
        "4",
        "--block-size",
        "quarter",
        "--json",
    ]
    (by_scheme,) = json.loads(run("estimate", model, *arguments))["estimates"]
    assert list(by_scheme) == list(estimate.SCHEMES)
    assert by_scheme["star"]["block"] == 32 * K
    assert (
        by_scheme["star"]["encode_s"]
        == by_scheme["star"]["compute_s"] + by_scheme["star"]["exposed_s"]
    )


def test_calibrated_by_a_benchmark(model: str, tmp_path: Path) -> None:
    row = dict(method="dense", block=None, linear_flops=10**15, attention_flops=10**14)
    rows = [
        row | dict(context=16 * K, seconds=1.7),
        row | dict(context=64 * K, attention_flops=10**16, seconds=22.0),
    ]
    file = tmp_path / "prefill.json"
    measured = {
        "benchmark": "prefill",
        "ceilings": {"flops_per_s": 7e14, "bytes_per_s": 2.5e12},
        "rows": rows,
    }
    file.write_text(json.dumps(measured))
    options = ["--hardware", "h200-ib", "--context", "64k", "--calibrate"]
    text = run("estimate", model, *options, str(file))
    assert "h200-ib, calibrated" in text
    assert "predicted s" in text
    assert "memory 2.5 TB/s, link 40 GB/s" in text
    hardware = json.loads(run("estimate", model, *options, str(file), "--json"))["hardware"]
    assert (hardware["bandwidth"], hardware["link"]) == (2.5e12, 4e10)
    for text, message in (
        (
            json.dumps(measured | {"benchmark": "decode"}),
            " is the JSON of `bench decode`; give that of `bench prefill`",
        ),
        (
            json.dumps(measured | {"rows": [{}]}),
            " is not JSON of `bench prefill` as this version writes it; run it again",
        ),
        ("{}", " is not JSON of `bench prefill`"),
    ):
        file.write_text(text)
        assert run("estimate", model, *options, str(file), status=1) == f"error: {file}{message}\n"
    file.unlink()
    assert run("estimate", model, *options, str(file), status=1).startswith(
        f"error: there is no file {file}; give the JSON"
    )


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["--context", "1m..128k", "--hardware", "h200-ib"],
            1,
            "context '1m..128k' ends before it begins; write the smaller number first",
        ),
        (
            ["--context", "1m", "--hardware", "h200-ib", "--ranks", "many"],
            1,
            "ranks 'many' is not a number of ranks",
        ),
        (
            ["--context", "0..8k", "--hardware", "h200-ib"],
            1,
            "context 0 is below 1; give a positive number of tokens",
        ),
        (
            ["--context", "1m", "--ranks", "1..8"],
            2,
            "'1..8' is not a number above 0; `star-attention estimate` takes several",
        ),
        (
            ["--context", "8k,16k"],
            2,
            "--context: '8k,16k' has several lengths; give one, or use `star-attention estimate`",
        ),
        (
            ["--context", "8k..16k"],
            2,
            "--context: '8k..16k' has several lengths; give one, or use `star-attention estimate`",
        ),
        (
            ["--context", "8k", "--block-size", "quarter"],
            2,
            "--block-size: 'quarter' chooses by time; give a size, or use `star-attention",
        ),
        (
            ["--context", "1m", "--calibrate", "x.json"],
            2,
            "`plan` has no times; use `star-attention estimate`",
        ),
        *(
            (
                ["--context", "1m", "--hardware", "h200-ib", name, value],
                2,
                f"{name}: estimates do not take it into account",
            )
            for name, value in (
                ("--tensor-parallel", "2"),
                ("--queries", "9"),
                ("--kv-device", "cpu"),
            )
        ),
    ],
)
def test_invalid_estimates(model: str, arguments: list[str], status: int, message: str) -> None:
    assert message in " ".join(
        run("plan", model, *arguments, status=status).replace("│", " ").split()
    )
