"""Reports follow from the predictions: means, differences, and the same files every time."""

from __future__ import annotations

import base64
import csv
import re
from pathlib import Path

import pytest

from star_attention.errors import InvalidInputError, MissingPackageError
from star_attention.evals.reports import plots, report
from star_attention.evals.runs.predictions import PREDICTIONS, Prediction
from star_attention.evals.runs.run_folder import MARKDOWN, METRICS, PAGE, RUN, SUMMARY
from tests.evals_reports import TASKS, make_run, metrics_of


def test_overall_is_the_mean_of_task_means(tmp_path: Path) -> None:
    def score(task: str, variant: str, length: int, index: int) -> float:
        return (
            1.0
            if variant == "dense"
            else {"niah": 1.0, "vt": 0.5, "cwe": 0.0}[task] * (length == 1024)
        )

    metrics = metrics_of(make_run(tmp_path, score=score))
    star = {line["length"]: line for line in metrics["overall"] if line["variant"] == "star:/4"}
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
        (line["group"], line["length"], line["variant"]): line["mean"]["value"]
        for line in metrics["groups"]
    }
    assert groups["multi-hop", 1024, "star:/4"] == 0.5
    tasks = {
        (line["task"], line["length"]): line
        for line in metrics["tasks"]
        if line["variant"] == "star:/4"
    }
    assert tasks["niah", 1024]["difference"]["verdict"] == "no difference seen"
    assert metrics["baseline"] == "dense"
    assert metrics["missing"] == 0


@pytest.mark.parametrize("sign", [-1, 1])
def test_intervals_stay_within_what_scores_can_differ_by(tmp_path: Path, sign: int) -> None:
    """Forbids "-100.5 to -68.9 points"."""

    def score(task: str, variant: str, length: int, index: int) -> float:
        return float((variant == "dense") == (sign < 0) or index == 0)

    metrics = metrics_of(make_run(tmp_path, count=10, score=score))
    star = [line["difference"] for line in metrics["tasks"] if line["variant"] == "star:/4"]
    assert {difference["value"] for difference in star} == {sign * 0.9}
    limits = [difference["low" if sign < 0 else "high"] for difference in star]
    assert set(limits) == {float(sign)}


def test_the_same_predictions_give_the_same_files(tmp_path: Path) -> None:
    first, second = (make_run(tmp_path / name) for name in "ab")
    report.write(first)
    report.write(second)
    for name in (METRICS, SUMMARY, MARKDOWN):
        assert (first / name).read_text() == (second / name).read_text()


def test_summary_has_a_line_for_each_cell_and_variant(tmp_path: Path) -> None:
    report.write(make_run(tmp_path))
    with (tmp_path / SUMMARY).open(newline="") as file:
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
        make_run(tmp_path, variants, meta=lambda index: {"depth": depths[index % 4]})
    )
    drawn = {file.stem for file in files if file.suffix == ".png"}
    assert drawn == {"length", "groups", "blocks", "anchors", "depth", "speed"}
    page = (tmp_path / PAGE).read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 6
    assert all(base64.b64decode(data).startswith(b"\x89PNG") for data in pictures)
    assert not re.search(r'(src|href)="(?!data:)', page)
    text = (tmp_path / MARKDOWN).read_text()
    for name in re.findall(r"\]\((pictures/[^)]+)\)", text):
        assert (tmp_path / name).is_file()
    assert "essays=a\\|b" in text, "a `|` in a value must not end its cell"
    assert len({line.count(" | ") for line in text.splitlines() if line.startswith("| niah")}) == 1


def test_without_matplotlib_there_are_tables_and_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise MissingPackageError("no matplotlib")

    monkeypatch.setattr(plots, "require_matplotlib", missing)
    files = report.write(make_run(tmp_path))
    assert not [file for file in files if file.suffix == ".png"]
    text = (tmp_path / MARKDOWN).read_text()
    assert (
        "Without figures, as matplotlib is not installed;"
        ' run: pip install "star-attention[plot]"' in text
    )
    assert "| niah, 1k |" in text
    assert issubclass(MissingPackageError, ImportError)


def test_missing_predictions_are_reported_and_not_paired(tmp_path: Path) -> None:
    def change(prediction: Prediction) -> Prediction | None:
        return (
            None
            if prediction.variant != "dense" and prediction.sample == "vt-1024-3"
            else prediction
        )

    metrics = metrics_of(make_run(tmp_path, change=change))
    assert metrics["missing"] == 1
    star = next(
        line
        for line in metrics["tasks"]
        if (line["task"], line["length"], line["variant"]) == ("vt", 1024, "star:/4")
    )
    assert star["difference"] is None
    assert "1 samples have a score on one side only, vt-1024-3 first" in star["unpaired"]
    text = (tmp_path / MARKDOWN).read_text()
    assert "This run is incomplete: 1 predictions are missing" in text
    assert "not compared" in text


def test_without_dense_the_first_variant_is_the_baseline(tmp_path: Path) -> None:
    assert metrics_of(make_run(tmp_path, "star:/4,star:/8"))["baseline"] == "star:/4"


def test_samples_of_one_cluster_are_one_draw(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path,
        count=12,
        meta=lambda index: {"depth": index % 2 * 50, "cluster": f"c{index // 2}"},
    )
    (star,) = (
        line
        for line in metrics_of(folder)["tasks"]
        if (line["task"], line["length"], line["variant"]) == ("vt", 1024, "star:/4")
    )
    assert (star["mean"]["n"], star["mean"]["contexts"]) == (12, 6)


def test_means_are_over_the_cells_that_all_variants_have(tmp_path: Path) -> None:
    def change(prediction: Prediction) -> Prediction | None:
        return (
            prediction
            if prediction.variant == "dense"
            or (prediction.task == "niah" and prediction.length == 1024)
            else None
        )

    def score(task: str, variant: str, length: int, index: int) -> float:
        return float(task == "niah")

    metrics = metrics_of(make_run(tmp_path, change=change, score=score))
    overall = {(line["variant"], line["length"]): line["mean"] for line in metrics["overall"]}
    assert set(overall) == {
        (variant, length) for variant in ("dense", "star:/4") for length in (None, 1024)
    }
    assert {(mean["value"], mean["n"]) for mean in overall.values()} == {(1.0, 8)}
    assert [
        line["variant"]
        for line in metrics["tasks"]
        if (line["task"], line["length"]) == ("vt", 2048)
    ] == ["dense"]
    text = (tmp_path / MARKDOWN).read_text()
    assert (
        "Some variants lack niah at 2k, vt at 1k, vt at 2k, cwe at 1k, cwe at 2k: means over"
        " several" in text
    )
    assert "| 2k (no cell that all variants have) | – | – | – | – |" in text


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInputError, match=r"holds no run\.json; give a folder that `eval` has written"
    ):
        report.write(tmp_path)
    folder = make_run(tmp_path)
    (folder / PREDICTIONS).write_bytes(b"")
    with pytest.raises(InvalidInputError, match="holds no predictions"):
        report.write(folder)
    (folder / RUN).write_text("{}")
    with pytest.raises(InvalidInputError, match=r"run\.json is damaged"):
        report.write(folder)
