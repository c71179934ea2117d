"""Data of other people: the names that fields go by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from star_attention.errors import InvalidInputError
from star_attention.evals.formats.files import read
from tests.evals_cli import ok, predictions, save_model
from tests.jsonl import write_lines


@pytest.mark.parametrize(
    "row",
    [
        {"context": "c", "question": "q", "answer": "a"},
        {"context": "c", "question": "q", "answers": ["a"]},
        {"context": "c", "query": "q", "answer": "a"},
        {"context": "c", "prompt": "q", "completion": "a"},
        {"document": "c", "question": "q", "response": "a"},
        {"passage": "c", "query": "q", "target": "a", "title": "t"},
        {"instruction": "q", "input": "c", "output": "a"},
        {"context": "c", "input": "q", "output": "a"},
        {"text": "c", "question": "q", "reference": "a"},
        {"context": "c", "question": "q", "answers": {"text": ["a", "a"], "answer_start": [0, 0]}},
    ],
    ids=lambda row: ",".join(row),
)
def test_usual_names_of_fields(tmp_path: Path, row: dict[str, Any]) -> None:
    (sample,) = read(write_lines(tmp_path / "mine.jsonl", [row]))
    assert (sample.context, sample.query, sample.answers) == ("c", "q", ("a",))
    assert (sample.id, sample.task, sample.metric) == ("mine-0", "mine", "string_match_all")
    more = row | {"metric": "token_f1", "max_new_tokens": 9, "task": "vt", "id": "x"}
    (sample,) = read(write_lines(tmp_path / "mine.jsonl", [more]))
    assert (sample.id, sample.task, sample.metric, sample.max_new_tokens) == (
        "x",
        "vt",
        "token_f1",
        9,
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "completion": "a"}, "no text that is encoded before it; split the prompt"),
        ({"question": "q", "answer": "a"}, r"\(question\) and answers \(answer\), but no text"),
        ({"input": "p", "output": "a"}, "give the long text as context, the question as query"),
        ({"context": "c", "input": "q", "answer": "a"}, "name the fields of other data context"),
        ({"input": "c", "question": "q", "target": "a"}, "name the fields of other data context"),
        ({"messages": []}, "fields messages do not match any known format: samples has context"),
        ({"context": "c", "question": "q"}, "do not match any known format"),
        ({"context": ["c"], "question": "q", "answer": "a"}, "expected context to be a string"),
        ({"context": "c", "question": "q", "answer": "B"}, "'B' is a letter, which nearly every"),
        ({"context": "c", "query": "q", "answers": ["B"]}, "'B' is a letter, which nearly every"),
        (
            {"context": "c", "question": "q", "choices": ["x", "y"], "answer": "B"},
            r"choices holds options .*; write them into the question, and add a field metric",
        ),
        (
            {"context": "c", "question": "q", "choice_A": "x", "choice_B": "y", "answer": "B"},
            "choice_A holds options of a multiple-choice question, which the model would not see",
        ),
        (
            {"text": "c", "question": "q", "choices": {"text": ["x"], "label": ["A"]}}
            | {"answer": "A", "metric": "option_letter"},
            "choices holds options",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_other_fields_are_refused_with_what_to_do(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=rf"mine\.jsonl, line 1: .*{message}"):
        read(write_lines(tmp_path / "mine.jsonl", [row]))


def test_options_that_the_question_holds(tmp_path: Path) -> None:
    """Forbids scoring a letter by what every text contains, with options that nobody saw."""
    row = {"context": "c", "question": "Who?\nA. Al\nB. Bo", "choices": ["Al", "Bo"]}
    row |= {"answer": "B", "metric": "option_letter"}
    (sample,) = read(write_lines(tmp_path / "data.jsonl", [row]))
    assert (sample.query, sample.answers) == ("Who?\nA. Al\nB. Bo", ("B",))
    assert (sample.metric, sample.max_new_tokens) == ("option_letter", 128)


def test_questions_of_longbench_are_scored_as_published(tmp_path: Path) -> None:
    row = {
        "input": "Who?",
        "context": "c",
        "answers": ["Cy", "Mr Cy"],
        "length": 5021,
        "dataset": "hotpotqa",
        "language": "en",
        "all_classes": None,
        "_id": "1",
    }
    (sample,) = read(write_lines(tmp_path / "data.jsonl", [row]))
    assert (sample.query, sample.answers) == ("Who?", ("Cy", "Mr Cy"))
    assert (sample.metric, sample.max_new_tokens, sample.length) == ("token_f1", 32, 0)
    with pytest.raises(InvalidInputError, match="'samsum' of LongBench; add a field metric"):
        read(write_lines(tmp_path / "data.jsonl", [row | {"dataset": "samsum"}]))
    summed = row | {"dataset": "samsum", "metric": "rouge_lsum"}
    assert read(write_lines(tmp_path / "data.jsonl", [summed]))[0].metric == "rouge_lsum"


def test_default_variants_of_files_are_what_generate_runs(tmp_path: Path) -> None:
    """Forbids measuring blocks of a quarter of the text, which `generate` would not take."""
    model = save_model(tmp_path / "model")
    row = {"context": "It is 7.\n" * 260, "question": "What is it?", "answer": "7"}
    data = write_lines(tmp_path / "data.jsonl", [row])
    ok(model, "run", data, "--out", tmp_path / "out", "--max-new-tokens", "2", "--quiet")
    dense, star = predictions(tmp_path / "out")
    assert (dense.variant, star.variant) == ("dense", "star")
    assert star.context_tokens > star.block_size == star.anchor_size == 1024
