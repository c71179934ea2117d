"""Benchmarks compute the right ratios from their rows, and draw the pictures of earlier ones."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from star_attention.bench import decode_plots, pictures
from star_attention.bench.decode_rows import DecodeRow
from star_attention.bench.decode_rows import table as decode_table
from star_attention.bench.prefill import plots
from star_attention.bench.prefill.rows import (
    PrefillRow,
    extrapolate,
    flop_ratio_reached,
    series,
    speed_up,
)
from star_attention.bench.questions import QuestionsRow
from star_attention.bench.rows import Rows, RowsRow
from star_attention.errors import InvalidInputError
from star_attention.planning.cost import Flops

DENSE = PrefillRow(method="dense", context=100, block=None, seconds=10.0, flops=100)
STAR = PrefillRow(method="star", context=100, block=25, asked="/4", seconds=4.0, flops=50)
DECODE = DecodeRow(
    context=10,
    block=5,
    compiled=True,
    queries=1,
    query_tokens=1,
    tokens=2,
    token_s=0.3,
    ttft_s=0.4,
    first_s=0.5,
    floor_s=0.2,
)


def test_ratios_of_prefill() -> None:
    stock = PrefillRow(method="stock", context=100, block=None, flops=100, failed="out of memory")
    rows = [stock, DENSE, STAR]
    assert speed_up(STAR, rows, "dense") == 2.5
    assert speed_up(STAR, rows, "stock") is None
    assert speed_up(DENSE, rows, "dense") is None
    assert flop_ratio_reached(STAR, rows) == 1.25
    assert flop_ratio_reached(DENSE, rows) is None
    assert [name for name, _ in series(rows)] == ["dense", "star, block length / 4"]


def test_ratios_of_answers() -> None:
    assert DECODE.over_floor == pytest.approx(1.5)
    assert DECODE.over_link is None
    far = replace(DECODE, link_bytes=4 * 10**8, link_bytes_per_s=2e9)
    assert far.over_link == pytest.approx(1.5)
    header, near_cells, far_cells = decode_table([DECODE, far])
    start = header.index("link MB per token")
    assert header[start : start + 3] == ("link MB per token", "link GB/s", "over link")
    assert near_cells[start : start + 3] == ("", "", "")
    assert far_cells[start : start + 3] == ("400", "2", "1.50")
    assert "over link" not in decode_table([DECODE])[0]
    row = QuestionsRow(method="star", context=10, questions=7, encode_s=3.0, question_s=2.0)
    assert row.total_s == 17.0


def test_ratios_of_rows() -> None:
    def row(case: str, rows: int, rate: float, texts: int = 2) -> RowsRow:
        sizes = dict(context=1024, texts=texts, answer_tokens=5)
        return RowsRow(case=case, rows=rows, tokens_per_s=rate, floor_tokens_per_s=80.0, **sizes)

    rows = [
        row("lockstep", 1, 10.0),
        row("lockstep", 4, 30.0),
        row("lockstep", 4, 90.0, texts=3),
        row("turnover", 4, 24.0),
    ]
    benchmark = Rows(
        contexts=[1024],
        block=64,
        texts=2,
        rows=[1, 4],
        cases=[],
        encode_tokens=9,
        query_tokens=3,
        answer_tokens=5,
        repeats=1,
    )
    header, *lines = benchmark.table(rows)
    cells = [dict(zip(header, line, strict=True)) for line in lines]
    assert [cell["of floor"] for cell in cells] == ["0.12", "0.38", "1.12", "0.30"]
    assert [cell["x one row"] for cell in cells] == ["", "3.00", "", ""]
    assert [cell["x lockstep"] for cell in cells] == ["", "", "", "0.80"]


def test_long_dense_times_are_extrapolated() -> None:
    """Two runs give separate rates of linear layers and attention; a single run gives none."""
    flops = [Flops(linear=10 * k, attention=3 * k * k) for k in (1, 4, 8)]
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
    longer = PrefillRow(method="dense", context=8192, block=None)
    row = extrapolate(longer, flops[2], rows)
    assert row.extrapolated
    assert row.seconds == pytest.approx(80 / 100 + 192 / 50)
    assert extrapolate(longer, flops[2], rows[:1]).failed
    star = PrefillRow(method="star", context=8192, block=1024, seconds=1.0, flops=1)
    assert speed_up(star, [*rows, row, star], "dense") == pytest.approx(row.seconds)


# ------------------------------------------------------------------ pictures

HEAD: dict[str, Any] = dict(model="m", dtype="d", hardware="h", ceilings={"flops_per_s": 1.0})


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """JSON of three measurements: two of prefill, one of decode."""
    pytest.importorskip("matplotlib")
    paths = []
    for name, benchmark, row in (
        ("a", "prefill", STAR),
        ("b", "prefill", DENSE),
        ("c", "decode", DECODE),
    ):
        paths.append(tmp_path / f"{name}.json")
        record = HEAD | dict(benchmark=benchmark, rows=[asdict(row)])
        paths[-1].write_text(json.dumps(record))
    return paths


def test_pictures_of_earlier_measurements(files: list[Path], tmp_path: Path) -> None:
    written = pictures.draw_files(files, tmp_path / "new")
    assert [path.name for path in written] == [
        "prefill-time.png",
        "prefill-speedup.png",
        "decode.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_the_floor_at_a_single_length_is_a_dash() -> None:
    """Forbids a line of one point, which cannot be seen."""
    pytest.importorskip("matplotlib")
    for figure in (plots.time_figure([STAR, DENSE], 1.0), decode_plots.token_figure([DECODE])):
        lines = figure.axes[0].lines
        assert {line.get_marker() for line in lines if line.get_linestyle() == "None"} == {"_"}


def test_measurements_of_several_machines_are_not_mixed(files: list[Path], tmp_path: Path) -> None:
    other = json.loads(files[1].read_text()) | {"hardware": "another"}
    files[1].write_text(json.dumps(other))
    with pytest.raises(InvalidInputError, match="draw them separately"):
        pictures.draw_files(files, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is not JSON of `bench prefill` or `bench decode`$"),
        ("no JSON", "is not JSON of `bench prefill` or `bench decode`$"),
        (
            json.dumps(HEAD | {"benchmark": "prefill", "rows": [{}]}),
            "is not JSON of `bench prefill` as this version writes it",
        ),
        (
            json.dumps(HEAD | {"benchmark": "kernels", "rows": []}),
            "is the JSON of `bench kernels`; give that of `bench prefill` or",
        ),
    ],
)
def test_other_files_are_refused(
    text: str, message: str, files: list[Path], tmp_path: Path
) -> None:
    files[0].write_text(text)
    with pytest.raises(InvalidInputError, match=rf"a\.json {message}"):
        pictures.draw_files(files, tmp_path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(InvalidInputError, match=r"there is no file .*none\.json; give the JSON"):
        pictures.draw_files([tmp_path / "none.json"], tmp_path)
    with pytest.raises(InvalidInputError, match=r"is a folder; give the JSON file of .* in it"):
        pictures.draw_files([tmp_path], tmp_path)
