"""Figures show the known values: bars, labels and legends agree with the results."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from star_attention.evals.reports import plots, report
from star_attention.evals.reports.plots.bars import by_group, by_variant
from star_attention.evals.reports.plots.depth import by_depth
from star_attention.evals.reports.plots.lines import by_length, by_speed
from star_attention.evals.reports.plots.sweep import sweep
from star_attention.evals.reports.results import Results
from star_attention.evals.runs.predictions import Prediction
from star_attention.evals.runs.run_folder import FIGURES, MARKDOWN, PAGE
from tests.evals_reports import make_run, only_dense_has_vt

pytest.importorskip("matplotlib")
from matplotlib.collections import LineCollection


def test_figures_without_anything_to_show_are_not_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path, lengths=(1024,), tasks={"niah": "retrieval"})
    assert set(plots.draw(Results.read(folder), tmp_path / "pictures")) == {"speed"}


def test_unknown_lengths_and_errors_are_not_drawn(tmp_path: Path) -> None:
    variants = "dense,star:/4,star:/8"
    folders = [
        make_run(tmp_path / f"{count}", variants, lengths=(0, 1024, 2048), count=count)
        for count in (1, 8)
    ]
    few_samples, many_samples = map(Results.read, folders)
    for results, bars in ((few_samples, 0), (many_samples, 2)):
        figures = by_length(results), sweep(results, "block")
        axes = figures[0].axes[0]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1k", "2k"], (
            "0 means an unknown length"
        )
        for figure in figures:
            drawn = [
                segment
                for lines in figure.axes[0].containers
                for bar in lines.lines[2]
                for segment in bar.get_segments()
                if len(segment)
            ]
            assert bool(drawn) == bool(bars), "no bars if the error is unknown"
    titles = [axes.get_title(loc="left") for axes in by_group(many_samples).axes]
    assert titles == ["as given", "1k", "2k"]


def test_error_bars_end_where_scores_do(tmp_path: Path) -> None:
    """No accuracy is below 0 % or above 100 %, not even with its error."""

    def score(task: str, variant: str, length: int, index: int) -> float:
        return float((index == 0) == (variant == "dense"))

    variants = "dense,star:/4,star:/8,star:/4:anchor=none"
    results = Results.read(
        make_run(tmp_path, variants, count=8, tasks={"niah": "a", "vt": "b"}, score=score)
    )
    dense = results.compared("dense", task="vt", length=1024)
    assert dense is not None
    assert dense.mean.stderr is not None
    assert dense.mean.value < 2 * dense.mean.stderr
    for figure, axis in (
        (by_length(results), 1),
        (by_group(results), 1),
        (sweep(results, "block"), 1),
        (by_variant(results), 0),
    ):
        bars = [bar for axes in figure.axes for bar in _error_bars(axes)]
        ends = [end for segment in bars for end in segment[:, axis]]
        assert ends
        assert min(ends) >= 0
        assert max(ends) <= 100


def _error_bars(axes: Any) -> list[Any]:
    collections = [child for child in axes.get_children() if isinstance(child, LineCollection)]
    segments = [segment for lines in collections for segment in lines.get_segments()]
    return [segment for segment in segments if len(segment)]


def test_error_bars_are_explained_if_they_are_drawn(tmp_path: Path) -> None:
    """Too few samples give no error bars."""
    variants = "dense,star:/4,star:/8,star:/4:anchor=none"
    few_samples, many_samples = (
        Results.read(make_run(tmp_path / f"{count}", variants, count=count)) for count in (1, 8)
    )
    for results, caption in ((few_samples, ""), (many_samples, "bars: ± two standard errors")):
        subtitle = f"mean over tasks; {caption}" if caption else "mean over tasks"
        assert by_length(results).axes[0].get_title(loc="left") == subtitle
        assert sweep(results, "block").axes[0].get_title(loc="left") == caption
        assert by_group(results).get_supxlabel() == (f"gray {caption}" if caption else "")
        assert (
            by_variant(results).get_supxlabel()
            == f"dashed: dense, 100.0{'; gray ' if caption else ''}{caption}"
        )


def test_ablations_have_a_figure_of_their_own(tmp_path: Path) -> None:
    """Forbids a run of ablations without a figure of their accuracy."""
    anchors = ("none", "constant", "random")
    variants = ",".join(("dense", "star:/4", *(f"star:/4:anchor={anchor}" for anchor in anchors)))
    folder = make_run(
        tmp_path,
        variants,
        score=lambda task, key, *_: {"dense": 1.0, "star:/4": 0.75}.get(key, 0.25),
    )
    results = Results.read(folder)
    (axes,) = by_variant(results).axes
    names = ["star b=/4", *(f"star b=/4 anchor={anchor}" for anchor in anchors)]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert [bar.get_width() for bar in axes.patches] == [75, 25, 25, 25]
    assert [text.get_text() for text in axes.texts] == ["75.0", "25.0", "25.0", "25.0"]
    (dense,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert dense.get_xdata() == [100, 100]
    drawn = {file.stem for file in report.write(folder) if file.suffix == ".png"}
    assert "variants" in drawn
    assert "![Accuracy of each variant](pictures/variants.png)" in (tmp_path / MARKDOWN).read_text()
    assert '<img alt="Accuracy of each variant"' in (tmp_path / PAGE).read_text()
    assert "variants" not in plots.draw(Results.read(make_run(tmp_path)), tmp_path / FIGURES)
    disjoint = make_run(
        tmp_path,
        "dense,star:/4:anchor=none",
        change=only_dense_has_vt,
    )
    assert by_variant(Results.read(disjoint)) is None, "no task and length has both"


@pytest.mark.parametrize("count", [2, 5, 12])
def test_names_of_categories_do_not_overlap(tmp_path: Path, count: int) -> None:
    """The names of twelve tasks ran into one another."""
    tasks = {f"longdialogue_qa_{index}": f"longdialogue_qa_{index}" for index in range(count)}
    figure = by_group(
        Results.read(
            make_run(tmp_path, "dense,star:/4,star:/8", count=1, lengths=(1024,), tasks=tasks)
        )
    )
    figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = axes.get_xticklabels()
    ends = [label.get_window_extent() for label in labels]
    angle = math.radians(labels[0].get_rotation())
    for left, right in itertools.pairwise(ends):
        apart = (
            (right.x1 - left.x1) * math.sin(angle) > labels[0].get_fontsize()
            if angle
            else right.x0 > left.x1
        )
        assert apart
    assert (angle > 0) == (count > 2)
    assert min(end.x0 for end in ends) >= 0
    assert axes.get_window_extent().height > 150, "labels must not shrink the bars"


def test_long_names_of_variants_leave_room_for_the_plot(tmp_path: Path) -> None:
    variants = "dense,star:/4:anchor=previous-block:positions=previous-block"
    figure = by_length(Results.read(make_run(tmp_path, variants, count=1)))
    figure.draw_without_rendering()
    assert figure.axes[0].get_window_extent().width > 500


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.55, 1.2), (0.139, 0.151), (0.08, 0.55), (1.0, 9.9), (0.5, 0.5), (0.02, 9.0)],
)
def test_the_time_axis_has_labels(tmp_path: Path, low: float, high: float) -> None:
    """The axis had a single label from 0.55 to 1.2 s."""

    def change(prediction: Prediction) -> Prediction:
        return replace(
            prediction, encode_s=0.0, answer_s=low if prediction.variant == "dense" else high
        )

    (axes,) = by_speed(
        Results.read(make_run(tmp_path, lengths=(1024,), count=1, change=change))
    ).axes
    left, right = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
    assert 3 <= len(ticks) <= 12
    names = axes.xaxis.get_major_formatter().format_ticks(ticks)
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 5


def test_the_legend_of_a_sweep_is_as_drawn(tmp_path: Path) -> None:
    """Forbids a line without a name, and dense attention in another color than drawn."""

    def legend(results: Results, size: Literal["block", "anchor"]) -> dict[str, str]:
        (axes,) = sweep(results, size).axes
        drawn = {
            line.get_label(): line.get_color()
            for line in axes.lines
            if line.get_linestyle() == "--"
        }
        shown = zip(axes.get_legend().get_texts(), axes.get_legend().legend_handles, strict=True)
        named = {text.get_text(): handle for text, handle in shown}
        lines = {name: handle for name, handle in named.items() if name.startswith("dense")}
        assert {name: handle.get_color() for name, handle in lines.items()} == drawn
        return {name: drawn.get(name, "") for name in named}

    def change(prediction: Prediction) -> Prediction:
        sizes = {"dense": 4096, "star:256": 256, "star:512": 512}
        return replace(prediction, block_size=sizes[prediction.variant])

    no_length = Results.read(
        make_run(tmp_path, "dense,star:256,star:512", lengths=(0,), change=change)
    )
    assert legend(no_length, "block") == {"star": "", "dense": "#000000"}
    two_lengths = Results.read(make_run(tmp_path, "dense,star:/4,star:/8"))
    assert legend(two_lengths, "block") == {
        "star, 1k": "",
        "star, 2k": "",
        "dense, 1k": "#0072B2",
        "dense, 2k": "#D55E00",
    }
    anchors = Results.read(
        make_run(tmp_path, "dense,star:/4:16,star:/4:64,star:/8:16,star:/8:64", lengths=(1024,))
    )
    assert legend(anchors, "anchor") == {
        "star, 1k, block 128": "",
        "star, 1k, block 256": "",
        "dense": "#000000",
    }


def test_a_missing_bar_is_not_a_bar_of_zero(tmp_path: Path) -> None:
    def change(prediction: Prediction) -> Prediction | None:
        return (
            None
            if prediction.variant == "star:/4" and prediction.group == "multi-hop"
            else prediction
        )

    folder = make_run(tmp_path, lengths=(1024,), change=change, score=lambda *_: 0.0)
    (axes,) = by_group(Results.read(folder)).axes
    assert [text.get_text() for text in axes.texts] == ["–", "–"]


def test_many_depths_are_drawn_in_tenths(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path, count=20, tasks={"niah": "retrieval"}, meta=lambda index: {"depth": index * 5.1}
    )
    axes = by_depth(Results.read(folder)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"{depth} %" for depth in range(0, 101, 10)
    ]


def test_the_caption_gives_the_samples_per_cell(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path, count=1, tasks={"niah": "retrieval"}, meta=lambda index: {"depth": 50}
    )
    figure = by_depth(Results.read(folder))
    assert figure.get_supxlabel() == "length, tokens (accuracy in %, 1 sample per cell)"
