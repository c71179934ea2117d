"""Questions with right answers and those of all variants side by side, in both reports."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path

from star_attention.config import DEFAULT_BLOCK_RULE
from star_attention.evals.reports import report
from star_attention.evals.reports.answers import MOST_QUESTIONS, answers_table
from star_attention.evals.reports.results import Results
from star_attention.evals.runs.predictions import PREDICTIONS
from star_attention.evals.runs.run_folder import MARKDOWN, PAGE
from star_attention.evals.runs.variants import parse_all
from tests.evals_runs import engine, lines, run, samples


def test_a_question_has_its_answers_in_one_row(tmp_path: Path) -> None:
    odd = replace(
        samples(2)[1], query="Is <b>7|8</b> `it`?\nReally?", answers=("no|never", "*seven*")
    )
    run(engine(), [samples(1)[0], odd], parse_all("dense,star"), tmp_path)
    report.write(tmp_path)
    dense, star = (line for line in lines(tmp_path) if line["sample"] == "needles-1")
    head, *rows = answers_table(Results.read(tmp_path))
    assert head == ("question", "right answers", "dense", "star")
    (row,) = (row for row in rows if "needles-1" in row[0])
    assert row[:2] == ("Is <b>7|8</b> `it`?\nReally? It is [needles-1]", "no|never / *seven*")
    for cell, line in zip(row[2:], (dense, star), strict=True):
        assert cell.startswith(line["prediction"].strip())
        assert cell.endswith("(0 %, cut off)")
    text = (tmp_path / MARKDOWN).read_text()
    assert "## Questions and answers" in text
    assert (
        r"| Is \<b>7\|8\</b> \`it\`? Really? It is \[needles-1] | no\|never / \*seven\* |" in text
    )
    assert (
        html.escape("Is <b>7|8</b> `it`?\nReally? It is [needles-1]")
        in (tmp_path / PAGE).read_text()
    )
    rule = f"- star: blocks as `generate` and the engine choose them ({DEFAULT_BLOCK_RULE})."
    assert rule in text


def test_many_variants_are_rows_and_wrong_answers_come_first(tmp_path: Path) -> None:
    variants = parse_all("dense,star,star:/2,star:/3,star:/4,star:/5")
    run(engine(), samples(3), variants, tmp_path)
    path = tmp_path / PREDICTIONS
    records = lines(tmp_path)
    for record in records:
        record["score"] = float(record["sample"] != "needles-1")
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    head, *rows = answers_table(Results.read(tmp_path))
    assert head == ("question", "right answers", "variant", "answer")
    assert [row[2] for row in rows[:6]] == [variant.name for variant in variants]
    assert [row[0].rpartition(" ")[2] for row in rows[::6]] == [
        "[needles-1]",
        "[needles-0]",
        "[needles-2]",
    ]
    assert {row[0] for row in rows[1:6]} == {""}


def test_long_runs_show_the_first_and_say_so(tmp_path: Path) -> None:
    run(engine(), samples(1), parse_all("dense"), tmp_path)
    (record,) = lines(tmp_path)
    # As written by earlier versions, and an answer as long as a book.
    del record["query"]
    record["prediction"] = "long " * 1000
    several = [record | {"sample": f"s{i}"} for i in range(MOST_QUESTIONS + 1)]
    path = tmp_path / PREDICTIONS
    path.write_text("".join(json.dumps(record) + "\n" for record in several))
    report.write(tmp_path)
    text = (tmp_path / MARKDOWN).read_text()
    assert f"{MOST_QUESTIONS} of {MOST_QUESTIONS + 1} questions" in text
    assert text.count("… (0 %") == MOST_QUESTIONS
    assert len(text) < MOST_QUESTIONS * 700
