"""Sentences and tables of a report: its warnings, and the names of variants."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

from star_attention.evals.reports import report
from star_attention.evals.reports.remarks import in_short
from star_attention.evals.reports.results import Results
from star_attention.evals.runs.predictions import Prediction
from star_attention.evals.runs.run_folder import FIGURES, MARKDOWN, PAGE, RUN, SUMMARY
from tests.evals_reports import (
    make_run,
    metrics_of,
    only_dense_has_vt,
    random_score,
    report_of,
)


def test_empty_predictions_and_single_blocks_are_reported(tmp_path: Path) -> None:
    def change(prediction: Prediction) -> Prediction:
        is_dense = prediction.variant == "dense"
        return replace(prediction, prediction=" \n") if is_dense else prediction

    text = report_of(make_run(tmp_path, "dense,star:2k", change=change))
    assert "- dense: 48 of 48 predictions are empty." in text
    assert (
        "One block holds the whole context, which makes it dense attention: star b=2k at 1k, star"
        " b=2k at 2k." in text
    )


def test_answers_that_were_cut_off_are_reported_unless_they_are_right(tmp_path: Path) -> None:
    """Forbids silence about answers that may be wrong only for lack of tokens."""

    def change(prediction: Prediction) -> Prediction:
        star = {"niah": 1.0, "vt": 0.5, "cwe": 0.0}[prediction.task]
        score = 1.0 if prediction.variant == "dense" else star
        reason = "stop" if prediction.task == "cwe" else "length"
        return replace(prediction, score=score, finish_reason=reason)

    folder = make_run(tmp_path, change=change)
    assert metrics_of(folder)["at_limit"] == [
        {"variant": "dense", "answers": 48, "ended": 32, "not_right": 0},
        {"variant": "star:/4", "answers": 48, "ended": 32, "not_right": 16},
    ]
    line = (
        "Answers that ended at the token limit and are not fully right: star b=/4 (16 of 48);"
        " raise --max-new-tokens. 48 right answers ended there too."
    )
    assert in_short(Results.read(folder))[2:] == [line]
    assert f"- {line}" in (tmp_path / MARKDOWN).read_text()
    assert line in (tmp_path / PAGE).read_text()
    with (tmp_path / SUMMARY).open(newline="") as file:
        cut_off = {
            (row["task"], row["length"], row["variant"]): row["cut_off"]
            for row in csv.DictReader(file)
        }
    assert {cell: count for cell, count in cut_off.items() if count != "0"} == {
        ("vt", "1024", "star:/4"): "8",
        ("vt", "2048", "star:/4"): "8",
    }


def test_right_answers_at_the_limit_are_not_mentioned(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path,
        score=lambda *_: 1.0,
        change=lambda prediction: replace(prediction, finish_reason="length"),
    )
    assert len(in_short(Results.read(folder))) == 2


def test_variants_without_a_common_cell_have_no_mean(tmp_path: Path) -> None:
    folder = make_run(tmp_path, change=only_dense_has_vt)
    report.write(folder)
    first = in_short(Results.read(folder))[0]
    assert first == "dense: – (no task and length that all variants have)"


def test_prose_and_prompts_other_than_the_published_ones_are_named(tmp_path: Path) -> None:
    tasks = {"niah_single_2": "retrieval", "qa1": "qa1"}
    report.write(
        make_run(
            tmp_path,
            tasks=tasks,
            meta=lambda index: {"prose": "pydoc_data.topics", "prose_sha256": "1"},
        )
    )
    text = (tmp_path / MARKDOWN).read_text()
    assert "- Tasks marked pydoc_data.topics use prose of the running Python" in text
    assert (
        "- qa1: prompts of our own, so the scores are not comparable with published BABILong or"
        " InfiniteBench scores." in text
    )
    report.write(
        make_run(tmp_path / "published", tasks=tasks, meta=lambda index: {"prompts_sha256": "1"})
    )
    assert "prompts of our own" not in (tmp_path / "published" / MARKDOWN).read_text()
    assert "| niah_single_2, 1k (pydoc_data.topics) |" in text
    with (tmp_path / SUMMARY).open(newline="") as file:
        assert {row["prose"] for row in csv.DictReader(file)} == {"pydoc_data.topics"}
    text = report_of(
        make_run(tmp_path, meta=lambda index: {"prose": "essays.json", "prose_sha256": "1"})
    )
    assert "not comparable" not in text
    assert "| niah, 1k (essays.json) |" in text


def test_variants_of_the_same_sizes_are_reported(tmp_path: Path) -> None:
    text = report_of(make_run(tmp_path, "dense,ring,star:/4,star:256,star:/4:kv=fp8"))
    assert "- star b=/4 and star b=256 have the same blocks and anchor at 1k." in text
    assert text.count("have the same blocks") == 1


def test_many_variants_are_rows(tmp_path: Path) -> None:
    """Forbids tables of twenty columns, which fit on no page."""
    anchors = ("none", "constant", "random", "shuffled", "previous-block")
    variants = ",".join(("dense", "star:/4", *(f"star:/4:anchor={anchor}" for anchor in anchors)))
    report.write(
        make_run(tmp_path, variants, score=lambda task, key, *_: float(key in ("dense", "star:/4")))
    )
    text = (tmp_path / MARKDOWN).read_text()
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
    assert '<table class="words"><tr><th></th><th>variant</th>' in (tmp_path / PAGE).read_text()


def test_marks_are_explained_below_the_tables_that_have_them(tmp_path: Path) -> None:
    """An asterisk must be explained next to its table."""

    def legends(folder: Path) -> list[str]:
        lines = [line for line in report_of(folder).splitlines() if line.startswith("Marks: ")]
        page = (folder / PAGE).read_text()
        assert [line for line in lines if f"<p>{line}</p>" not in page] == []
        return lines

    lower, none = (
        "* the interval does not contain 0",
        "(too few) no interval, as a task and length has fewer than 6 contexts",
    )
    assert (
        legends(make_run(tmp_path / "lower", score=random_score(0.0))) == [f"Marks: {lower}."] * 3
    )
    assert legends(make_run(tmp_path / "same", score=random_score(1.0))) == []
    assert (
        legends(make_run(tmp_path / "few", score=random_score(0.0), count=2))
        == [f"Marks: {none}."] * 3
    )

    def change(prediction: Prediction) -> Prediction | None:
        return (
            None if prediction.task == "vt" and not prediction.sample.endswith("-0") else prediction
        )

    both = legends(make_run(tmp_path / "both", score=random_score(0.0), change=change))
    assert both[-1] == f"Marks: {lower}; {none}."


def test_a_single_length_has_a_single_row(tmp_path: Path) -> None:
    text = report_of(make_run(tmp_path, lengths=(1024,)))
    assert "| 1k | 24 | 100.0" in text
    assert "| all lengths |" not in text


def test_variants_are_listed_by_name_and_as_written(tmp_path: Path) -> None:
    report.write(make_run(tmp_path, "dense,star:/4:0"))
    text = (tmp_path / MARKDOWN).read_text().partition("## Variants")[2]
    assert (
        "| variant | written |\n| --- | --- |\n| dense | dense |\n| star b=/4 a=0 | star:/4:0 |\n"
        in text
    )


def test_facts_are_in_plain_words(tmp_path: Path) -> None:
    """Forbids Python syntax such as `files=['my.jsonl']` or torch.bfloat16."""
    folder = make_run(tmp_path)
    run = json.loads((folder / RUN).read_text())
    run["sessions"][0]["options"] = {"files": ["my.jsonl", "b.jsonl"]}
    (folder / RUN).write_text(json.dumps(run))
    report.write(folder)
    facts = (folder / MARKDOWN).read_text().partition("## How it was run")[2]
    assert "| options | essays=a\\|b; files=my.jsonl, b.jsonl |" in facts
    assert "| precision | float32 |" in facts
    assert "| git | none |" in facts
    assert "| chat template | no |" in facts


def test_options_and_limits_are_in_the_facts(tmp_path: Path) -> None:
    text = report_of(make_run(tmp_path))
    assert "| options | essays=a\\|b; squad=s |" in text
    assert "| max_new_tokens | each sample's own |" in text


def test_ablations_are_not_timed(tmp_path: Path) -> None:
    report.write(make_run(tmp_path, "dense,star:/4,star:/4:anchor=none"))
    speed = (tmp_path / MARKDOWN).read_text().partition("## Speed")[2].partition("##")[0]
    assert "| star b=/4 | 1k |" in speed
    assert "anchor=none" not in speed
    report.write(make_run(tmp_path, "star:/4:anchor=none"))
    assert not (tmp_path / FIGURES / "speed.png").exists()
