"""Published formats: files as their authors write them, and their layouts in folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from star_attention.errors import InvalidInputError
from star_attention.evals.formats.files import read
from star_attention.evals.metrics import score
from tests.jsonl import write_lines


def test_files_of_the_official_implementation(tmp_path: Path) -> None:
    rows = [
        {
            "index": 3,
            "input_context": "c",
            "input_query": "q is",
            "outputs": ["1", "2"],
            "length": 99,
        },
        {"index": 4, "input_context": "c", "input_query": "q is", "output": "1", "length": 99},
    ]
    first, second = read(write_lines(tmp_path / "qa_2" / "validation.jsonl", rows))
    assert (first.id, first.task, first.length, first.metric, first.max_new_tokens) == (
        "qa_2-3",
        "qa_2",
        99,
        "string_match_part",
        32,
    )
    assert (first.context, first.query, first.answer_prefix) == ("c", "q is", "")
    assert first.answers == ("1", "2")
    assert second.answers == ("1",)
    (own,) = read(write_lines(tmp_path / "own.jsonl", rows[:1]))
    assert (own.task, own.metric, own.max_new_tokens) == ("own", "string_match_all", 128)


QUESTIONS = {
    "niah_single_1": "What is the special magic number for a?",
    "niah_multivalue": "What are all the special magic numbers for a?",
    "vt": "Question: Find all variables that are assigned the value 1.",
    "cwe": "Question: What are the 10 most common words in the above list?",
    "fwe": "Question: Do not provide any explanation. What are they?",
    "qa_1": "Answer the question based on the given documents. Only.\n\nQuestion: who?",
}
TOKENS = {"niah_single_1": 128, "niah_multivalue": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32}


@pytest.mark.parametrize("task", QUESTIONS)
@pytest.mark.parametrize("named", [True, False])
def test_plain_ruler_is_cut_at_the_last_question(tmp_path: Path, task: str, named: bool) -> None:
    head, question = f"{QUESTIONS[task]} An example.\nA text.\n", QUESTIONS[task]
    row = {
        "index": 0,
        "input": head + question + " Answer:",
        "outputs": ["x"],
        "length": 50,
        "answer_prefix": " Answer:",
    }
    (sample,) = read(write_lines(tmp_path / (f"{task}.jsonl" if named else "some.jsonl"), [row]))
    assert (sample.context, sample.query, sample.answer_prefix) == (head, question, " Answer:")
    if named:
        assert sample.max_new_tokens == TOKENS[task]
        assert sample.metric == ("string_match_part" if task == "qa_1" else "string_match_all")


def test_plain_ruler_without_a_prefix_keeps_its_whole_end(tmp_path: Path) -> None:
    row = {
        "index": 0,
        "input": f"c\n{QUESTIONS['vt']} Answer: they are",
        "outputs": ["x"],
        "length": 50,
    }
    (sample,) = read(write_lines(tmp_path / "vt.jsonl", [row]))
    assert (sample.query, sample.answer_prefix) == (f"{QUESTIONS['vt']} Answer: they are", "")


def test_ruler_is_not_cut_at_the_question_of_another_task(tmp_path: Path) -> None:
    row = {"index": 0, "input": f"c\n{QUESTIONS['vt']}", "outputs": ["x"], "length": 50}
    with pytest.raises(
        InvalidInputError, match=r"cwe.jsonl, line 1: input contains no question of RULER's"
    ):
        read(write_lines(tmp_path / "cwe.jsonl", [row]))


def test_rows_of_kvpress_take_the_metric_of_their_task(tmp_path: Path) -> None:
    row = {
        "context": "c",
        "question": "q",
        "answer_prefix": "p",
        "answer": "[x]",
        "max_new_tokens": 9,
    }
    tasks = ["niah_multikey_1", "qa_1", "kv_retrieval", "longbook_qa_eng", "qa1"]
    samples = read(write_lines(tmp_path / "a.jsonl", [{**row, "task": task} for task in tasks]))
    assert [sample.metric for sample in samples] == [
        "string_match_all",
        "string_match_part",
        "whole_word",
        "token_f1",
        "babilong",
    ]
    assert samples[0].answers == ("[x]",)
    assert samples[0].max_new_tokens == 9
    with pytest.raises(
        InvalidInputError,
        match=r"b.jsonl, line 2: no metric is known for task 'qasper'; add a column",
    ):
        read(write_lines(tmp_path / "b.jsonl", [{**row, "task": "vt"}, {**row, "task": "qasper"}]))
    (sample,) = read(
        write_lines(tmp_path / "b.jsonl", [{**row, "task": "qasper", "metric": "token_f1"}])
    )
    assert sample.metric == "token_f1"


def test_lists_in_csv_are_read_as_pandas_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "context,question,answer,max_new_tokens,task\nc,q,\"['it''s', 'b']\",7,vt\n".replace(
            "''", ""
        )
    )
    assert read(path)[0].answers == ("its", "b")
    path.write_text('context,question,answer,max_new_tokens,task\nc,q,"[a",,vt\n')
    assert read(path)[0].answers == ("[a",)
    assert read(path)[0].max_new_tokens == 30


@pytest.mark.parametrize("name", ["qa1.jsonl", "babilong_qa1_16k.json", "qa1.csv"])
def test_files_of_babilong(tmp_path: Path, name: str) -> None:
    rows = [
        {"input": "Mary went to the office.", "question": "Where is Mary?", "target": "office"}
    ] * 2
    path = tmp_path / name
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        path.write_text(
            "input,question,target\n" + "Mary went to the office.,Where is Mary?,office\n" * 2
        )
    else:
        write_lines(path, rows)
    first, second = read(path)
    assert (first.id, second.id, first.task) == ("qa1-0", "qa1-1", "qa1")
    assert score("The office", first) == 1.0
    with pytest.raises(
        InvalidInputError,
        match="line 1: there is no field task, and neither the file nor a folder is named after",
    ):
        read(write_lines(tmp_path / "16k.jsonl", rows))
    with_task = [rows[0] | {"task": "qa1"}]
    assert read(write_lines(tmp_path / "16k.jsonl", with_task))[0].id == "qa1-16384-0"


@pytest.mark.parametrize(
    "name", ["qa1/4k.jsonl", "4k/qa1.jsonl", "4k/qa1-00000-of-00001.jsonl", "4k/qa1/test.jsonl"]
)
def test_layouts_of_babilong(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    row = {"input": "Mary went to the office.", "question": "Where is Mary?", "target": "office"}
    (sample,) = read(write_lines(path, [row]))
    assert (sample.task, sample.length, sample.id) == ("qa1", 4096, "qa1-4096-0")


def test_files_of_infinitebench_and_scbench(tmp_path: Path) -> None:
    row = {
        "id": 7,
        "context": "c",
        "input": "What is the pass key?",
        "answer": ["71432"],
        "options": [],
    }
    (sample,) = read(write_lines(tmp_path / "passkey.jsonl", [row]))
    assert (sample.id, sample.task, sample.metric) == ("passkey-7", "passkey", "first_integer")
    row = {
        "id": 0,
        "context": "c",
        "multi_turns": [{"input": "a", "answer": "x"}, {"input": "b", "answer": "y"}],
    }
    samples = read(write_lines(tmp_path / "scbench_kv.jsonl", [row, {**row, "id": 1}]))
    assert [sample.id for sample in samples] == [
        f"scbench_kv-{i}-{turn}" for i in (0, 1) for turn in (0, 1)
    ]
    assert {sample.task for sample in samples} == {"scbench_kv"}
    for shard in ("test.jsonl", "test-00000-of-00001.jsonl"):
        assert read(write_lines(tmp_path / "scbench_kv" / shard, [row]))[0].task == "scbench_kv"
    (sample,) = read(
        write_lines(
            tmp_path / "scbench_mf.jsonl",
            [{**row, "context": [3, 14], "multi_turns": [{"input": "a", "answer": 3}]}],
        )
    )
    assert sample.context == "[3, 14]\n\n"
