"""Reading and writing data sets: round trips, and published files as they are."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from star_attention.errors import InvalidInputError
from star_attention.evals.formats.files import FORMATS, WRITTEN, read, read_all, write
from star_attention.evals.metrics import METRICS, score
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.suites import get
from star_attention.evals.suites.infinitebench.tasks import TASKS as INFINITEBENCH
from tests.engines import bundled_tokenizer

NEEDLE = Sample(
    id="first",
    task="niah_single_1",
    length=4096,
    context="What is the special magic number for old-cat? A line separator:\u2028 and 'quotes', \"more\".\r\n",
    query="What is the special magic number for shy-fox mentioned in the provided text?",
    answer_prefix=" The special magic number for shy-fox mentioned in the provided text is",
    answers=("1234567", "[7654321]"),
    max_new_tokens=17,
    metric="string_match_all",
    meta={"depths": [0.25, 0.5], "prose": "模型"},
)
QUESTION = replace(
    NEEDLE,
    id="second",
    task="qa_1",
    query="Answer the question based on the given documents. Only give me the answer.\n\nQuestion: who?",
    answer_prefix=" Answer:",
    answers=("[3]",),
    metric="string_match_part",
)
PAIR = [NEEDLE, QUESTION]


def lines(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ------------------------------------------------------------------ our own


def test_a_line_needs_context_query_and_answers(tmp_path: Path) -> None:
    row: dict[str, Any] = {"context": "c", "query": "q", "answers": ["x"]}
    more = row | {"id": 7, "task": "vt", "max_new_tokens": 9}
    one, two = read(lines(tmp_path / "4k" / "mine.jsonl", [row, more]))
    assert one == Sample(
        id="mine-0",
        task="mine",
        length=4096,
        context="c",
        query="q",
        answer_prefix="",
        answers=("x",),
        max_new_tokens=128,
        metric="string_match_all",
    )
    assert (two.id, two.task, two.max_new_tokens) == ("vt-7", "vt", 9)
    with pytest.raises(InvalidInputError, match="line 1: not a sample: promt is unknown"):
        read(lines(tmp_path / "typo.jsonl", [row | {"promt": "x"}]))


# ------------------------------------------------------------------ round trips


@pytest.mark.parametrize(
    ("format", "name"), [(format, "data.jsonl") for format in WRITTEN] + [("kvpress", "data.csv")]
)
@pytest.mark.parametrize("is_given", [True, False])
def test_written_samples_are_read_again(
    tmp_path: Path, format: str, name: str, is_given: bool
) -> None:
    path = tmp_path / name
    write(path, PAIR, format=format)
    assert read(path, format=format if is_given else None) == PAIR


def test_parquet_is_read_again(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write(tmp_path / "data.parquet", PAIR, format="kvpress")
    assert read(tmp_path / "data.parquet") == PAIR
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(InvalidInputError, match=r"data.parquet cannot be read"):
        read(tmp_path / "data.parquet")


def test_parquet_without_pyarrow_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidInputError, match=r"pip install pyarrow, or use .csv or .jsonl"):
        write(tmp_path / "data.parquet", PAIR, format="kvpress")
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(InvalidInputError, match="needs the package pyarrow"):
        read(tmp_path / "data.parquet")


@pytest.mark.parametrize("format", ["samples", "star-attention", "kvpress"])
def test_generated_samples_survive(tmp_path: Path, format: str) -> None:
    size = Size(tokenizer=bundled_tokenizer(), length=1200)
    samples = [
        *get("babilong").generate("qa5", size=size, count=2, seed=0, options={}),
        *get("infinitebench").generate("code_run", size=size, count=2, seed=0, options={}),
        *get("shared").generate("shared_kv", size=size, count=2, seed=0, options={}),
    ]
    write(tmp_path / "all.jsonl", samples, format=format)
    assert read(tmp_path / "all.jsonl") == samples


def test_contexts_longer_than_csv_fields_may_be_by_default(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    long = replace(NEEDLE, context="word " * 40_000)
    write(tmp_path / "long.csv", [long], format="kvpress")
    assert read(tmp_path / "long.csv") == [long]
    assert csv.field_size_limit() == limit


def test_the_fields_of_others_are_what_they_read(tmp_path: Path) -> None:
    def first(format: str) -> dict[str, Any]:
        write(tmp_path / "one.jsonl", [NEEDLE], format=format)
        row: dict[str, Any] = json.loads((tmp_path / "one.jsonl").read_text(encoding="utf-8"))
        return row

    asked = NEEDLE.query + NEEDLE.answer_prefix
    official = first("star-attention")
    assert official["input_context"] + official["input_query"] == NEEDLE.context + asked
    assert (official["index"], official["outputs"], official["length"]) == (
        0,
        list(NEEDLE.answers),
        4096,
    )
    ruler = first("ruler")
    assert ruler["input"] + ruler["answer_prefix"] == NEEDLE.context + asked
    kvpress = first("kvpress")
    assert (
        kvpress["context"] + kvpress["question"] + kvpress["answer_prefix"]
        == NEEDLE.context + asked
    )
    assert (kvpress["answer"], kvpress["max_new_tokens"], kvpress["task"]) == (
        list(NEEDLE.answers),
        17,
        NEEDLE.task,
    )


# ------------------------------------------------------------------ files of others


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
    one, two = read(lines(tmp_path / "qa_2" / "validation.jsonl", rows))
    assert (one.id, one.task, one.length, one.metric, one.max_new_tokens) == (
        "qa_2-3",
        "qa_2",
        99,
        "string_match_part",
        32,
    )
    assert (one.context, one.query, one.answer_prefix, one.answers) == ("c", "q is", "", ("1", "2"))
    assert two.answers == ("1",)
    (mine,) = read(lines(tmp_path / "mine.jsonl", rows[:1]))
    assert (mine.task, mine.metric, mine.max_new_tokens) == ("mine", "string_match_all", 128)


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
    head, asked = f"{QUESTIONS[task]} An example.\nA text.\n", QUESTIONS[task]
    row = {
        "index": 0,
        "input": head + asked + " Answer:",
        "outputs": ["x"],
        "length": 50,
        "answer_prefix": " Answer:",
    }
    (sample,) = read(lines(tmp_path / (f"{task}.jsonl" if named else "some.jsonl"), [row]))
    assert (sample.context, sample.query, sample.answer_prefix) == (head, asked, " Answer:")
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
    (sample,) = read(lines(tmp_path / "vt.jsonl", [row]))
    assert (sample.query, sample.answer_prefix) == (f"{QUESTIONS['vt']} Answer: they are", "")


def test_the_question_of_another_task_is_no_place_to_cut(tmp_path: Path) -> None:
    row = {"index": 0, "input": f"c\n{QUESTIONS['vt']}", "outputs": ["x"], "length": 50}
    with pytest.raises(
        InvalidInputError, match=r"cwe.jsonl, line 1: input contains no question of RULER's"
    ):
        read(lines(tmp_path / "cwe.jsonl", [row]))


def test_columns_of_kvpress_take_the_metric_of_their_task(tmp_path: Path) -> None:
    row = {
        "context": "c",
        "question": "q",
        "answer_prefix": "p",
        "answer": "[x]",
        "max_new_tokens": 9,
    }
    tasks = ["niah_multikey_1", "qa_1", "kv_retrieval", "longbook_qa_eng", "qa1"]
    samples = read(lines(tmp_path / "a.jsonl", [{**row, "task": task} for task in tasks]))
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
        read(lines(tmp_path / "b.jsonl", [{**row, "task": "vt"}, {**row, "task": "qasper"}]))
    (sample,) = read(lines(tmp_path / "b.jsonl", [{**row, "task": "qasper", "metric": "token_f1"}]))
    assert sample.metric == "token_f1"


def test_a_table_of_csv_has_lists_as_pandas_writes_them(tmp_path: Path) -> None:
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
        lines(path, rows)
    one, two = read(path)
    assert (one.id, two.id, one.task) == ("qa1-0", "qa1-1", "qa1")
    assert score("The office", one) == 1.0
    with pytest.raises(
        InvalidInputError,
        match="line 1: there is no field task, and neither the file nor a folder is named after",
    ):
        read(lines(tmp_path / "16k.jsonl", rows))


@pytest.mark.parametrize(
    "name", ["qa1/4k.jsonl", "4k/qa1.jsonl", "4k/qa1-00000-of-00001.jsonl", "4k/qa1/test.jsonl"]
)
def test_layouts_of_babilong(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    row = {"input": "Mary went to the office.", "question": "Where is Mary?", "target": "office"}
    (sample,) = read(lines(path, [row]))
    assert (sample.task, sample.length, sample.id) == ("qa1", 4096, "qa1-4096-0")


def test_files_of_infinitebench_and_scbench(tmp_path: Path) -> None:
    row = {
        "id": 7,
        "context": "c",
        "input": "What is the pass key?",
        "answer": ["71432"],
        "options": [],
    }
    (sample,) = read(lines(tmp_path / "passkey.jsonl", [row]))
    assert (sample.id, sample.task, sample.metric) == ("passkey-7", "passkey", "first_integer")
    row = {
        "id": 0,
        "context": "c",
        "multi_turns": [{"input": "a", "answer": "x"}, {"input": "b", "answer": "y"}],
    }
    samples = read(lines(tmp_path / "scbench_kv.jsonl", [row, {**row, "id": 1}]))
    assert [sample.id for sample in samples] == [
        f"scbench_kv-{i}-{turn}" for i in (0, 1) for turn in (0, 1)
    ]
    assert {sample.task for sample in samples} == {"scbench_kv"}
    for shard in ("test.jsonl", "test-00000-of-00001.jsonl"):
        assert read(lines(tmp_path / "scbench_kv" / shard, [row]))[0].task == "scbench_kv"
    (sample,) = read(
        lines(
            tmp_path / "scbench_mf.jsonl",
            [{**row, "context": [3, 14], "multi_turns": row["multi_turns"][:1]}],
        )
    )
    assert sample.context == "[3, 14]\n\n"


# ------------------------------------------------------------------ several files

BARE = {"input_context": "c", "input_query": "q", "outputs": ["x"]}


@pytest.mark.parametrize(
    ("folder", "length"), [("4096", 4096), ("16k", 16384), ("2024", 0), ("run-4096", 0)]
)
def test_a_folder_named_as_a_size_is_the_length(tmp_path: Path, folder: str, length: int) -> None:
    place = tmp_path / folder / "vt"
    place.mkdir(parents=True)
    bare, told = read(lines(place / "validation.jsonl", [BARE, {**BARE, "length": 4011}]))
    assert (bare.length, told.length) == (length, 4011)
    assert bare.id == (f"vt-{length}-0" if length else "vt-0")
    story = {"input": "Mary went to the office.", "question": "Where is Mary?", "target": "office"}
    (sample,) = read(lines(place / "qa1.jsonl", [story]))
    assert sample.length == length


def test_ids_that_repeat_are_told_apart_by_folders(tmp_path: Path) -> None:
    places = [tmp_path / "a" / "data", tmp_path / "b" / "data", tmp_path / "c"]
    for place in places:
        place.mkdir(parents=True)
    files = [lines(place / "vt.jsonl", [BARE]) for place in places]
    files.append(lines(places[2] / "more.jsonl", [{**BARE, "task": "vt"}]))
    ids = ["vt-0", "b/data/vt-0", "c/vt-0", "more.jsonl/vt-0"]
    for count in range(1, 5):
        assert [sample.id for sample in read_all(files[:count])] == ids[:count], (
            "more files change no id"
        )
    with pytest.raises(InvalidInputError, match=r"vt\.jsonl is named twice; give it once"):
        read_all([files[0], files[0]])


# ------------------------------------------------------------------ errors


GOOD = NEEDLE.as_dict()
STRINGS = "expected answers to be a list of non-empty strings, got "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(GOOD) + "\n{oops\n", r"data.jsonl, line 2: invalid JSON \("),
        (
            json.dumps(GOOD) + "\n\n[1]\n",
            "data.jsonl, line 3: expected a JSON object for each sample, .* got list",
        ),
        (
            '{"a": 1}\n',
            "data.jsonl, line 1: fields a do not match any known format: samples has context, query",
        ),
        (
            json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "id": "x", "answers": "y"}),
            "data.jsonl, line 2: not a sample: expected answers to be a list of non-empty strings, got 'y'",
        ),
        (
            json.dumps(GOOD) + "\n\n" + json.dumps(GOOD),
            "data.jsonl, line 3: id 'first' is already that of line 1",
        ),
        ("\n \n", "data.jsonl contains no samples"),
        (
            '{"input_context": "c", "input_query": 3, "output": "x"}',
            "line 1: expected input_query to be a string, got 3",
        ),
        (
            '{"input_context": "c", "input_query": "q"}',
            "line 1: expected answer to be a string or a list of them, got None",
        ),
        (
            '{"input_context": "c", "input_query": "q", "output": []}',
            r"line 1: expected answer to be a string or a list of them, got \[\]",
        ),
        (
            '{"input_context": "c", "input_query": "q", "output": "x", "length": -1}',
            "expected length to be a number of tokens, got -1",
        ),
        (
            '{"input_context": "c", "input_query": "q", "output": "x", "meta": 3}',
            "expected meta to be an object, got 3",
        ),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"answers": []}, STRINGS + r"\[\]"),
        ({"answers": 42}, STRINGS + "42"),
        ({"answers": None}, STRINGS + "None"),
        ({"answers": {"a": 1}}, STRINGS + r"\{'a': 1\}"),
        (
            {"answers": ["x", ""]},
            STRINGS + r"\['x', ''\]",
        ),
        ({"answers": [" "]}, STRINGS + r"\[' '\]"),
        ({"answers": ["x", 1]}, STRINGS + r"\['x', 1\]"),
        ({"meta": "text"}, "expected meta to be an object, got 'text'"),
        ({"meta": [1]}, r"expected meta to be an object, got \[1\]"),
        ({"meta": []}, r"expected meta to be an object, got \[\]"),
    ],
)
def test_samples_that_cannot_be_scored_are_refused_with_their_line(
    tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    path = lines(tmp_path / "data.jsonl", [GOOD, {**GOOD, "id": "x", **wrong}])
    with pytest.raises(InvalidInputError, match=f"data.jsonl, line 2: not a sample: {message}"):
        read(path)


def test_errors_of_tables_and_files_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("context,question,answer,task\nc,q,a,vt\nc,q\n")
    with pytest.raises(
        InvalidInputError,
        match=r"data.csv, line 3: the header has 4 columns, this row has another number",
    ):
        read(path)
    path = tmp_path / "data.json"
    path.write_text('{"a": 1}')
    with pytest.raises(InvalidInputError, match="does not hold a list of samples"):
        read(path)
    path.write_text("[\n1")
    with pytest.raises(InvalidInputError, match=r"data.json, line 2: invalid JSON"):
        read(path)
    with pytest.raises(
        InvalidInputError, match=r"file .*gone\.jsonl does not exist; check the path"
    ):
        read(tmp_path / "gone.jsonl")
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InvalidInputError, match=r"data.jsonl cannot be read"):
        read(path)


def test_formats_that_are_not_what_the_file_has(tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", [GOOD])
    with pytest.raises(
        InvalidInputError,
        match="line 1: fields input, question, target of format babilong are missing",
    ):
        read(path, format="babilong")
    with pytest.raises(InvalidInputError, match="format 'xml' is unknown; choose one of samples"):
        read(path, format="xml")


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInputError, match="format 'babilong' cannot be written; choose one of samples"
    ):
        write(tmp_path / "a.jsonl", PAIR, format="babilong")
    with pytest.raises(
        InvalidInputError, match=r"cannot hold format ruler; name a file ending in .jsonl"
    ):
        write(tmp_path / "a.csv", PAIR, format="ruler")
    for query in ("Which number?", f"So: {NEEDLE.query}", f"{NEEDLE.query} {NEEDLE.query}"):
        with pytest.raises(
            InvalidInputError,
            match=r"sample first cannot be written as ruler|contains no question of RULER's",
        ):
            write(
                tmp_path / "a.jsonl", [replace(NEEDLE, context="c\n", query=query)], format="ruler"
            )
    assert not (tmp_path / "a.jsonl").exists()


def test_every_format_is_known_by_its_fields_and_metrics_exist() -> None:
    assert set(WRITTEN) <= set(FORMATS)
    assert {task.metric for task in INFINITEBENCH.values()} <= set(METRICS)
