"""What the reports say follows from the predictions: means, differences, tables, pictures, and what they cannot say."""

from __future__ import annotations

import base64
import csv
import itertools
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from star_attention.errors import InvalidInputError, MissingPackageError
from star_attention.evals.reports import plots, report
from star_attention.evals.reports.results import Results
from star_attention.evals.runs import run_folder
from star_attention.evals.runs.run_folder import Prediction
from star_attention.evals.runs.variants import parse

TASKS = {"niah": "retrieval", "vt": "multi-hop", "cwe": "aggregation"}
Score = Callable[[str, str, int, int], float]


def chance(part: float) -> Score:
    """Right with this probability; dense is always."""

    def of(task: str, variant: str, length: int, index: int) -> float:
        hit = random.Random(f"{task} {variant} {length} {index}").random() < part
        return 1.0 if variant == "dense" or hit else 0.0

    return of


def folder(
    place: Path,
    variants: str = "dense,star:/4",
    *,
    lengths: tuple[int, ...] = (1024, 2048),
    count: int = 8,
    score: Score | None = None,
    meta: Callable[[int], dict[str, Any]] = lambda index: {},
    tasks: dict[str, str] = TASKS,
    skipped: tuple[dict[str, Any], ...] = (),
    change: Callable[[Prediction], Prediction | None] = lambda one: one,
) -> Path:
    """A run as `runner.run` writes it, with scores by rule."""
    place.mkdir(parents=True, exist_ok=True)
    keys = variants.split(",")
    score = score or chance(0.4)
    made = []
    for task, group in tasks.items():
        for length in lengths:
            for index in range(count):
                for key in keys:
                    block, anchor = parse(key).sizes(length)
                    block = block or length or 1
                    one = Prediction(
                        sample=f"{task}-{length}-{index}",
                        variant=key,
                        settings="abc",
                        task=task,
                        group=group,
                        length=length,
                        sample_sha256="0",
                        context_sha256=f"{task}-{length}-{index}",
                        prediction="an answer",
                        answers=("an answer",),
                        metric="string_match_all",
                        score=score(task, key, length, index),
                        finish_reason="stop",
                        context_tokens=length,
                        query_tokens=9,
                        answer_tokens=3,
                        block_size=block,
                        anchor_size=block if anchor is None else anchor,
                        blocks=-(-length // block),
                        encode_s=length / 1000 * (2 if key == "dense" else 1),
                        sharing=2,
                        answer_s=0.25,
                        peak_bytes=None,
                        meta=meta(index),
                    )
                    kept = change(one)
                    made += [] if kept is None else [kept]
    cells = [
        {"task": task, "length": length, "samples": count} for task in tasks for length in lengths
    ]
    run = {
        "format": run_folder.FORMAT,
        "settings": {
            "suite": "ruler",
            "options": {"essays": "a|b"},
            "seed": 0,
            "chat": False,
            "max_new_tokens": None,
            "reserve_tokens": 64,
            "decoding": "greedy",
            "versions": {"torch": "1"},
            "model": {"dtype": "torch.float32", "weights": "w" * 64, "tokenizer": "t" * 64},
        },
        "settings_sha256": "abc",
        "cells": cells,
        "variants": {key: {"name": parse(key).name, "plans": [], "cells": cells} for key in keys},
        "skipped": list(skipped),
        "left_out": {},
        "prose": {"essays": "1234"},
        "sessions": [
            {
                "date": "d",
                "command": "c",
                "model": "m",
                "hardware": "h",
                "ranks": 1,
                "git": None,
                "options": {"squad": "s"},
                "answers": 1,
            }
        ],
    }
    (place / run_folder.RUN).write_text(json.dumps(run))
    (place / run_folder.PREDICTIONS).write_text(
        "".join(json.dumps(asdict(one)) + "\n" for one in made)
    )
    return place


def found(place: Path) -> dict[str, Any]:
    report.write(place)
    read: dict[str, Any] = json.loads((place / report.METRICS).read_text())
    return read


def test_overall_is_the_mean_of_task_means(tmp_path: Path) -> None:
    def score(task: str, variant: str, length: int, index: int) -> float:
        return (
            1.0
            if variant == "dense"
            else {"niah": 1.0, "vt": 0.5, "cwe": 0.0}[task] * (length == 1024)
        )

    told = found(folder(tmp_path, score=score))
    star = {line["length"]: line for line in told["overall"] if line["variant"] == "star:/4"}
    assert star[None]["mean"]["value"] == pytest.approx(0.25)
    assert star[1024]["mean"]["value"] == pytest.approx(0.5)
    assert star[2048]["mean"]["value"] == 0.0
    assert star[1024]["difference"] == {
        "value": -0.5,
        "low": -0.5,
        "high": -0.5,
        "n": 24,
        "verdict": "lower",
    }
    groups = {
        (one["group"], one["length"], one["variant"]): one["mean"]["value"]
        for one in told["groups"]
    }
    assert groups["multi-hop", 1024, "star:/4"] == 0.5
    tasks = {
        (one["task"], one["length"]): one for one in told["tasks"] if one["variant"] == "star:/4"
    }
    assert tasks["niah", 1024]["difference"]["verdict"] == "no difference seen"
    assert told["baseline"] == "dense"
    assert told["missing"] == 0


@pytest.mark.parametrize("sign", [-1, 1])
def test_no_interval_is_beyond_what_scores_can_differ_by(tmp_path: Path, sign: int) -> None:
    """It must not say "-100.5 to -68.9 points"."""

    def score(task: str, variant: str, length: int, index: int) -> float:
        return float((variant == "dense") == (sign < 0) or index == 0)

    told = found(folder(tmp_path, count=10, score=score))
    star = [one["difference"] for one in told["tasks"] if one["variant"] == "star:/4"]
    assert {one["value"] for one in star} == {sign * 0.9}
    limits = [one["low"] if sign < 0 else one["high"] for one in star]
    assert set(limits) == {float(sign)}


def test_the_same_predictions_give_the_same_files(tmp_path: Path) -> None:
    made = [folder(tmp_path / name) for name in "ab"]
    for place in made:
        report.write(place)
    for name in (report.METRICS, report.SUMMARY, report.MARKDOWN):
        assert (made[0] / name).read_text() == (made[1] / name).read_text()


def test_summary_has_a_line_for_each_cell_and_variant(tmp_path: Path) -> None:
    report.write(folder(tmp_path))
    with (tmp_path / report.SUMMARY).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["length"], row["variant"]) for row in rows] == [
        (task, length, variant)
        for task in TASKS
        for length in ("1024", "2048")
        for variant in ("dense", "star:/4")
    ]
    dense, star = rows[:2]
    assert (dense["accuracy"], dense["n"], dense["baseline"], dense["difference"]) == (
        "1.0",
        "8",
        "",
        "",
    )
    assert star["baseline"] == "dense"
    assert float(star["difference"]) == pytest.approx(float(star["accuracy"]) - 1)
    assert star["verdict"] in ("lower", "no difference seen")
    assert float(star["question_s"]) == pytest.approx(1.024 / 2 + 0.25)


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    depths = [0.0, 50.0, 100.0, 25.0]
    variants = "dense,star:/4,star:/8,star:/4:16"
    files = report.write(
        folder(tmp_path, variants, meta=lambda index: {"depth": depths[index % 4]})
    )
    drawn = {file.stem for file in files if file.suffix == ".png"}
    assert drawn == {"length", "groups", "blocks", "anchors", "depth", "speed"}
    page = (tmp_path / report.PAGE).read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 6
    assert all(base64.b64decode(data).startswith(b"\x89PNG") for data in pictures)
    assert not re.search(r'(src|href)="(?!data:)', page)
    text = (tmp_path / report.MARKDOWN).read_text()
    for name in re.findall(r"\]\((pictures/[^)]+)\)", text):
        assert (tmp_path / name).is_file()
    assert "essays=a\\|b" in text, "a bar in a value must not end its cell"
    assert len({line.count(" | ") for line in text.splitlines() if line.startswith("| niah")}) == 1


def test_pictures_only_of_what_there_is(tmp_path: Path) -> None:
    place = folder(tmp_path, lengths=(1024,), tasks={"niah": "retrieval"})
    assert set(plots.draw(Results.read(place), tmp_path / "pictures")) == {"speed"}


def test_pictures_do_not_draw_what_is_not_known(tmp_path: Path) -> None:
    variants = "dense,star:/4,star:/8"
    places = [
        folder(tmp_path / f"{count}", variants, lengths=(0, 1024, 2048), count=count)
        for count in (1, 8)
    ]
    one, eight = map(Results.read, places)
    for results, bars in ((one, 0), (eight, 2)):
        length, sweep = plots._length(results), plots._sweep(results, "block")
        axes = length.axes[0]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1k", "2k"], (
            "0 is no length"
        )
        for figure in (length, sweep):
            drawn = [
                segment
                for lines in figure.axes[0].containers
                for bar in lines.lines[2]
                for segment in bar.get_segments()
                if len(segment)
            ]
            assert bool(drawn) == bool(bars), "no bars where the error is not known"
    titles = [axes.get_title(loc="left") for axes in plots._groups(eight).axes]
    assert titles == ["as given", "1k", "2k"]


def test_bars_of_errors_end_where_scores_do(tmp_path: Path) -> None:
    """No accuracy is below 0 % or above 100 %, with its error neither."""

    def score(task: str, variant: str, length: int, index: int) -> float:
        return float((index == 0) == (variant == "dense"))

    variants = "dense,star:/4,star:/8,star:/4:anchor=none"
    results = Results.read(
        folder(tmp_path, variants, count=8, tasks={"niah": "a", "vt": "b"}, score=score)
    )
    dense = results.compared("dense", task="vt", length=1024)
    assert dense is not None
    assert dense.mean.stderr is not None
    assert dense.mean.value < 2 * dense.mean.stderr
    for figure, axis in (
        (plots._length(results), 1),
        (plots._groups(results), 1),
        (plots._sweep(results, "block"), 1),
        (plots._variants(results), 0),
    ):
        bars = [bar for axes in figure.axes for bar in _error_bars(axes)]
        ends = [end for segment in bars for end in segment[:, axis]]
        assert ends
        assert min(ends) >= 0
        assert max(ends) <= 100


def _error_bars(axes: Any) -> list[Any]:
    from matplotlib.collections import LineCollection

    lines = [one for one in axes.get_children() if isinstance(one, LineCollection)]
    return [segment for one in lines for segment in one.get_segments() if len(segment)]


def test_bars_are_told_where_they_are_drawn(tmp_path: Path) -> None:
    """Not where there are too few samples for one."""
    variants = "dense,star:/4,star:/8,star:/4:anchor=none"
    one, eight = (
        Results.read(folder(tmp_path / f"{count}", variants, count=count)) for count in (1, 8)
    )
    for results, told in ((one, ""), (eight, "bars: ± two standard errors")):
        beside = f"mean over tasks; {told}" if told else "mean over tasks"
        assert plots._length(results).axes[0].get_title(loc="left") == beside
        assert plots._sweep(results, "block").axes[0].get_title(loc="left") == told
        assert plots._groups(results).get_supxlabel() == (f"grey {told}" if told else "")
        assert (
            plots._variants(results).get_supxlabel()
            == f"dashed: dense, 100.0{'; grey ' if told else ''}{told}"
        )


def test_ablations_have_a_picture_of_their_own(tmp_path: Path) -> None:
    """They had one of their times alone, in which most of them are not."""
    anchors = ("none", "constant", "random")
    variants = ",".join(("dense", "star:/4", *(f"star:/4:anchor={anchor}" for anchor in anchors)))
    place = folder(
        tmp_path,
        variants,
        score=lambda task, key, *_: {"dense": 1.0, "star:/4": 0.75}.get(key, 0.25),
    )
    results = Results.read(place)
    (axes,) = plots._variants(results).axes
    names = ["star b=/4", *(f"star b=/4 anchor={anchor}" for anchor in anchors)]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert [bar.get_width() for bar in axes.patches] == [75, 25, 25, 25]
    assert [text.get_text() for text in axes.texts] == ["75.0", "25.0", "25.0", "25.0"]
    (dense,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert dense.get_xdata() == [100, 100]
    drawn = {file.stem for file in report.write(place) if file.suffix == ".png"}
    assert "variants" in drawn
    assert (
        "![Accuracy of each variant](pictures/variants.png)"
        in (tmp_path / report.MARKDOWN).read_text()
    )
    assert '<img alt="Accuracy of each variant"' in (tmp_path / report.PAGE).read_text()
    assert "variants" not in plots.draw(Results.read(folder(tmp_path)), tmp_path / report.PICTURES)
    alone = folder(
        tmp_path,
        "dense,star:/4:anchor=none",
        change=lambda one: one if (one.variant == "dense") == (one.task == "vt") else None,
    )
    assert plots._variants(Results.read(alone)) is None, "no task and length has both"


@pytest.mark.parametrize("count", [2, 5, 12])
def test_names_of_categories_do_not_overlap(tmp_path: Path, count: int) -> None:
    """Names of twelve tasks were a smear."""
    tasks = {f"longdialogue_qa_{index}": f"longdialogue_qa_{index}" for index in range(count)}
    figure = plots._groups(
        Results.read(
            folder(tmp_path, "dense,star:/4,star:/8", count=1, lengths=(1024,), tasks=tasks)
        )
    )
    figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = axes.get_xticklabels()
    ends = [label.get_window_extent() for label in labels]
    angle = math.radians(labels[0].get_rotation())
    for one, other in itertools.pairwise(ends):
        apart = (
            (other.x1 - one.x1) * math.sin(angle) > labels[0].get_fontsize()
            if angle
            else other.x0 > one.x1
        )
        assert apart
    assert (angle > 0) == (count > 2)
    assert min(end.x0 for end in ends) >= 0
    assert axes.get_window_extent().height > 150, "labels take nothing from the bars"


def test_long_names_of_variants_leave_room_for_the_plot(tmp_path: Path) -> None:
    variants = "dense,star:/4:anchor=previous-block:positions=previous-block"
    figure = plots._length(Results.read(folder(tmp_path, variants, count=1)))
    figure.draw_without_rendering()
    assert figure.axes[0].get_window_extent().width > 500


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.55, 1.2), (0.139, 0.151), (0.08, 0.55), (1.0, 9.9), (0.5, 0.5), (0.02, 9.0)],
)
def test_an_axis_of_times_has_labels(tmp_path: Path, low: float, high: float) -> None:
    """From 0.55 to 1.2 s there was one."""

    def change(one: Prediction) -> Prediction:
        return replace(one, encode_s=0.0, answer_s=low if one.variant == "dense" else high)

    (axes,) = plots._speed(
        Results.read(folder(tmp_path, lengths=(1024,), count=1, change=change))
    ).axes
    left, right = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
    assert 3 <= len(ticks) <= 12
    names = axes.xaxis.get_major_formatter().format_ticks(ticks)
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 5


def test_the_legend_of_a_sweep_is_as_drawn(tmp_path: Path) -> None:
    """Its solid line had no name where samples have no length, and dense attention was grey in it and blue in the picture."""

    def legend(results: Results, what: str) -> dict[str, str]:
        (axes,) = plots._sweep(results, what).axes
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

    def change(one: Prediction) -> Prediction:
        sizes = {"dense": 4096, "star:256": 256, "star:512": 512}
        return replace(one, block_size=sizes[one.variant])

    given = Results.read(folder(tmp_path, "dense,star:256,star:512", lengths=(0,), change=change))
    assert legend(given, "block") == {"star": "", "dense": "#000000"}
    two = Results.read(folder(tmp_path, "dense,star:/4,star:/8"))
    assert legend(two, "block") == {
        "star, 1k": "",
        "star, 2k": "",
        "dense, 1k": "#0072B2",
        "dense, 2k": "#D55E00",
    }
    anchors = Results.read(
        folder(tmp_path, "dense,star:/4:16,star:/4:64,star:/8:16,star:/8:64", lengths=(1024,))
    )
    assert legend(anchors, "anchor") == {
        "star, 1k, block 128": "",
        "star, 1k, block 256": "",
        "dense": "#000000",
    }


def test_a_missing_bar_is_not_a_bar_of_zero(tmp_path: Path) -> None:
    def change(one: Prediction) -> Prediction | None:
        return None if one.variant == "star:/4" and one.group == "multi-hop" else one

    place = folder(tmp_path, lengths=(1024,), change=change, score=lambda *_: 0.0)
    (axes,) = plots._groups(Results.read(place)).axes
    assert [text.get_text() for text in axes.texts] == ["–", "–"]


def test_many_depths_are_drawn_by_tenths(tmp_path: Path) -> None:
    place = folder(
        tmp_path, count=20, tasks={"niah": "retrieval"}, meta=lambda index: {"depth": index * 5.1}
    )
    axes = plots._depth(Results.read(place)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"{depth} %" for depth in range(0, 101, 10)
    ]


def test_one_sample_a_cell_is_told_so(tmp_path: Path) -> None:
    place = folder(tmp_path, count=1, tasks={"niah": "retrieval"}, meta=lambda index: {"depth": 50})
    figure = plots._depth(Results.read(place))
    assert figure.get_supxlabel() == "length, tokens (accuracy in %, 1 sample a cell)"


def test_without_matplotlib_there_are_tables_and_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise MissingPackageError("no matplotlib")

    monkeypatch.setattr(plots, "require_matplotlib", missing)
    files = report.write(folder(tmp_path))
    assert not [file for file in files if file.suffix == ".png"]
    text = (tmp_path / report.MARKDOWN).read_text()
    assert (
        'Without pictures: matplotlib is not installed; run: pip install "star-attention[plot]"'
        in text
    )
    assert "| niah, 1k |" in text
    assert issubclass(MissingPackageError, ImportError)


def test_what_is_missing_is_said_and_not_paired(tmp_path: Path) -> None:
    def change(one: Prediction) -> Prediction | None:
        return None if one.variant != "dense" and one.sample == "vt-1024-3" else one

    told = found(folder(tmp_path, change=change))
    assert told["missing"] == 1
    star = next(
        one
        for one in told["tasks"]
        if (one["task"], one["length"], one["variant"]) == ("vt", 1024, "star:/4")
    )
    assert star["difference"] is None
    assert "1 samples have a score on one side only, vt-1024-3 first" in star["unpaired"]
    text = (tmp_path / report.MARKDOWN).read_text()
    assert "This run is not complete: 1 predictions are missing" in text
    assert "not compared" in text


def test_empty_predictions_and_single_blocks_are_told(tmp_path: Path) -> None:
    def change(one: Prediction) -> Prediction:
        return Prediction(
            **vars(one) | {"prediction": " \n" if one.variant == "dense" else one.prediction}
        )

    report.write(folder(tmp_path, "dense,star:2k", change=change))
    text = (tmp_path / report.MARKDOWN).read_text()
    assert "- dense: 48 of 48 predictions are empty." in text
    assert (
        "One block holds the whole context, which is then dense attention: star b=2k at 1k, star b=2k at 2k."
        in text
    )


def test_answers_that_were_cut_off_are_told_where_they_are_not_right(tmp_path: Path) -> None:
    """Cut off before it is complete, an answer is wrong for want of tokens, and the report must not keep quiet about it."""

    def change(one: Prediction) -> Prediction:
        star = {"niah": 1.0, "vt": 0.5, "cwe": 0.0}[one.task]
        score = 1.0 if one.variant == "dense" else star
        reason = "stop" if one.task == "cwe" else "length"
        return replace(one, score=score, finish_reason=reason)

    place = folder(tmp_path, change=change)
    told = found(place)
    assert told["at_limit"] == [
        {"variant": "dense", "answers": 48, "ended": 32, "not_right": 0},
        {"variant": "star:/4", "answers": 48, "ended": 32, "not_right": 16},
    ]
    line = "Answers that ended at the token limit and are not fully right: star b=/4 (16 of 48); --max-new-tokens"
    line += " gives more. 48 right ones ended there too."
    assert report.short(Results.read(place))[2:] == [line]
    assert f"- {line}" in (tmp_path / report.MARKDOWN).read_text()
    assert line in (tmp_path / report.PAGE).read_text()
    with (tmp_path / report.SUMMARY).open(newline="") as file:
        cut_off = {
            (row["task"], row["length"], row["variant"]): row["cut_off"]
            for row in csv.DictReader(file)
        }
    assert {cell: count for cell, count in cut_off.items() if count != "0"} == {
        ("vt", "1024", "star:/4"): "8",
        ("vt", "2048", "star:/4"): "8",
    }


def test_answers_that_are_right_at_the_limit_are_not_worth_a_word(tmp_path: Path) -> None:
    place = folder(
        tmp_path, score=lambda *_: 1.0, change=lambda one: replace(one, finish_reason="length")
    )
    assert len(report.short(Results.read(place))) == 2


def test_without_dense_the_first_variant_is_the_baseline(tmp_path: Path) -> None:
    assert found(folder(tmp_path, "star:/4,star:/8"))["baseline"] == "star:/4"


def test_samples_of_one_cluster_are_one_draw(tmp_path: Path) -> None:
    place = folder(
        tmp_path,
        count=12,
        meta=lambda index: {"depth": index % 2 * 50, "cluster": f"c{index // 2}"},
    )
    (star,) = (
        one
        for one in found(place)["tasks"]
        if (one["task"], one["length"], one["variant"]) == ("vt", 1024, "star:/4")
    )
    assert (star["mean"]["n"], star["mean"]["contexts"]) == (12, 6)


def test_means_are_over_the_cells_that_all_variants_have(tmp_path: Path) -> None:
    def change(one: Prediction) -> Prediction | None:
        return (
            one if one.variant == "dense" or (one.task == "niah" and one.length == 1024) else None
        )

    def score(task: str, variant: str, length: int, index: int) -> float:
        return float(task == "niah")

    told = found(folder(tmp_path, change=change, score=score))
    overall = {(line["variant"], line["length"]): line["mean"] for line in told["overall"]}
    assert set(overall) == {
        (variant, length) for variant in ("dense", "star:/4") for length in (None, 1024)
    }
    assert {(mean["value"], mean["n"]) for mean in overall.values()} == {(1.0, 8)}
    assert [
        line["variant"] for line in told["tasks"] if (line["task"], line["length"]) == ("vt", 2048)
    ] == ["dense"]
    text = (tmp_path / report.MARKDOWN).read_text()
    assert (
        "Not all variants have niah at 2k, vt at 1k, vt at 2k, cwe at 1k, cwe at 2k: means over several"
        in text
    )
    assert "| 2k (no cell that all variants have) | – | – | – | – |" in text


def test_variants_without_a_common_cell_have_no_mean(tmp_path: Path) -> None:
    place = folder(
        tmp_path, change=lambda one: one if (one.variant == "dense") == (one.task == "vt") else None
    )
    report.write(place)
    assert (
        report.short(Results.read(place))[0]
        == "dense: – (no task and length that all variants have)"
    )


def test_ablations_are_not_timed(tmp_path: Path) -> None:
    report.write(folder(tmp_path, "dense,star:/4,star:/4:anchor=none"))
    speed = (tmp_path / report.MARKDOWN).read_text().partition("## Speed")[2].partition("##")[0]
    assert "| star b=/4 | 1k |" in speed
    assert "anchor=none" not in speed
    report.write(folder(tmp_path, "star:/4:anchor=none"))
    assert not (tmp_path / report.PICTURES / "speed.png").exists()


def test_prose_and_prompts_that_are_not_the_published_ones_are_named(tmp_path: Path) -> None:
    tasks = {"niah_single_2": "retrieval", "qa1": "qa1"}
    report.write(
        folder(
            tmp_path,
            tasks=tasks,
            meta=lambda index: {"prose": "pydoc_data.topics", "prose_sha256": "1"},
        )
    )
    text = (tmp_path / report.MARKDOWN).read_text()
    assert "- Tasks marked pydoc_data.topics stand in prose of the running Python" in text
    assert (
        "- qa1: prompts of our own, so that these are no numbers of BABILong or InfiniteBench."
        in text
    )
    report.write(
        folder(tmp_path / "asked", tasks=tasks, meta=lambda index: {"prompts_sha256": "1"})
    )
    assert "prompts of our own" not in (tmp_path / "asked" / report.MARKDOWN).read_text()
    assert "| niah_single_2, 1k (pydoc_data.topics) |" in text
    with (tmp_path / report.SUMMARY).open(newline="") as file:
        assert {row["prose"] for row in csv.DictReader(file)} == {"pydoc_data.topics"}
    report.write(folder(tmp_path, meta=lambda index: {"prose": "essays.json", "prose_sha256": "1"}))
    text = (tmp_path / report.MARKDOWN).read_text()
    assert "are no" not in text
    assert "| niah, 1k (essays.json) |" in text


def test_variants_of_the_same_sizes_are_told(tmp_path: Path) -> None:
    report.write(folder(tmp_path, "dense,ring,star:/4,star:256,star:/4:kv=fp8"))
    text = (tmp_path / report.MARKDOWN).read_text()
    assert "- star b=/4 and star b=256 have the same blocks and anchor at 1k." in text
    assert text.count("have the same blocks") == 1


def test_many_variants_stand_below_one_another(tmp_path: Path) -> None:
    """Ten variants beside one another made tables of twenty columns, which no page can hold."""
    anchors = ("none", "constant", "random", "shuffled", "previous-block")
    variants = ",".join(("dense", "star:/4", *(f"star:/4:anchor={anchor}" for anchor in anchors)))
    report.write(
        folder(tmp_path, variants, score=lambda task, key, *_: float(key in ("dense", "star:/4")))
    )
    text = (tmp_path / report.MARKDOWN).read_text()
    assert text.startswith("# ruler: 7 variants\n")
    tables = text.partition("## Accuracy by length")[2].partition("## Speed")[0]
    rows = [line for line in tables.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {6}
    assert rows[:5] == [
        "|  | variant | n | accuracy | difference |",
        "| --- | --- | ---: | ---: | ---: |",
        "| all lengths | dense | 48 | 100.0 ± 0.0 |  |",
        "|  | star b=/4 | 48 | 100.0 ± 0.0 | 0.0 [0.0, 0.0] |",
        "|  | star b=/4 anchor=none | 48 | 0.0 ± 0.0 | −100.0 [−100.0, −100.0] * |",
    ]
    assert len(rows) == 3 * 2 + 7 * (3 + 3 + 6)
    assert (
        '<table class="words"><tr><th></th><th>variant</th>' in (tmp_path / report.PAGE).read_text()
    )


def test_marks_are_explained_below_the_tables_that_have_them(tmp_path: Path) -> None:
    """A star behind an interval says nothing to one who has not read the code."""

    def told(place: Path) -> list[str]:
        report.write(place)
        lines = [
            line
            for line in (place / report.MARKDOWN).read_text().splitlines()
            if line.startswith("Marks: ")
        ]
        assert [
            line for line in lines if f"<p>{line}</p>" not in (place / report.PAGE).read_text()
        ] == []
        return lines

    lower, none = (
        "* the interval does not hold 0",
        "(too few) no interval, where a task and length has fewer than 6 contexts",
    )
    assert told(folder(tmp_path / "lower", score=chance(0.0))) == [f"Marks: {lower}."] * 3
    assert told(folder(tmp_path / "same", score=chance(1.0))) == []
    assert told(folder(tmp_path / "few", score=chance(0.0), count=2)) == [f"Marks: {none}."] * 3

    def change(one: Prediction) -> Prediction | None:
        return None if one.task == "vt" and not one.sample.endswith("-0") else one

    both = told(folder(tmp_path / "both", score=chance(0.0), change=change))
    assert both[-1] == f"Marks: {lower}; {none}."


def test_one_length_is_told_once(tmp_path: Path) -> None:
    report.write(folder(tmp_path, lengths=(1024,)))
    text = (tmp_path / report.MARKDOWN).read_text()
    assert "| 1k | 24 | 100.0" in text
    assert "| all lengths |" not in text


def test_variants_are_told_by_name_and_as_they_are_written(tmp_path: Path) -> None:
    report.write(folder(tmp_path, "dense,star:/4:0"))
    text = (tmp_path / report.MARKDOWN).read_text().partition("## Variants")[2]
    assert (
        "| variant | written |\n| --- | --- |\n| dense | dense |\n| star b=/4 a=0 | star:/4:0 |\n"
        in text
    )


def test_facts_are_in_plain_words(tmp_path: Path) -> None:
    """No words of Python's, as `files=['my.jsonl']` or torch.bfloat16."""
    place = folder(tmp_path)
    run = json.loads((place / run_folder.RUN).read_text())
    run["sessions"][0]["options"] = {"files": ["my.jsonl", "b.jsonl"]}
    (place / run_folder.RUN).write_text(json.dumps(run))
    report.write(place)
    facts = (place / report.MARKDOWN).read_text().partition("## How it was run")[2]
    assert "| options | essays=a\\|b; files=my.jsonl, b.jsonl |" in facts
    assert "| precision | float32 |" in facts
    assert "| git | none |" in facts
    assert "| chat template | no |" in facts


def test_options_and_limits_are_in_the_facts(tmp_path: Path) -> None:
    report.write(folder(tmp_path))
    text = (tmp_path / report.MARKDOWN).read_text()
    assert "| options | essays=a\\|b; squad=s |" in text
    assert "| max_new_tokens | each sample's own |" in text


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInputError, match=r"holds no run\.json; give a folder that `eval` has written"
    ):
        report.write(tmp_path)
    place = folder(tmp_path)
    (place / run_folder.PREDICTIONS).write_bytes(b"")
    with pytest.raises(InvalidInputError, match="holds no predictions"):
        report.write(place)
    (place / run_folder.RUN).write_text("{}")
    with pytest.raises(InvalidInputError, match=r"run\.json is damaged"):
        report.write(place)
