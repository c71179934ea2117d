"""Reading and writing data sets: round trips, several files, and errors with file and line."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from star_attention.errors import InvalidInputError
from star_attention.evals.formats.files import FORMATS, WRITTEN, read, read_all, write
from star_attention.evals.metrics import METRICS
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.suites import get
from star_attention.evals.suites.infinitebench.tasks import TASKS as INFINITEBENCH
from tests.engines import bundled_tokenizer
from tests.jsonl import write_lines

NEEDLE = Sample(
    id="first",
    task="niah_single_1",
    length=4096,
    context="What is the special magic number for old-cat?"
    " A line separator:\u2028 and 'quotes', \"more\".\r\n",
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
    query="Answer the question based on the given documents. Only give me the answer.\n\n"
    "Question: who?",
    answer_prefix=" Answer:",
    answers=("[3]",),
    metric="string_match_part",
)
PAIR = [NEEDLE, QUESTION]


def test_a_line_needs_context_query_and_answers(tmp_path: Path) -> None:
    row: dict[str, Any] = {"context": "c", "query": "q", "answers": ["x"]}
    more = row | {"id": 7, "task": "vt", "max_new_tokens": 9}
    first, second = read(write_lines(tmp_path / "4k" / "own.jsonl", [row, more]))
    assert first == Sample(
        id="own-0",
        task="own",
        length=4096,
        context="c",
        query="q",
        answer_prefix="",
        answers=("x",),
        max_new_tokens=128,
        metric="string_match_all",
    )
    assert (second.id, second.task, second.max_new_tokens) == ("vt-7", "vt", 9)
    with pytest.raises(InvalidInputError, match="line 1: not a sample: promt is unknown"):
        read(write_lines(tmp_path / "typo.jsonl", [row | {"promt": "x"}]))


# ---------------------------------------------------------------- round trips


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


def test_parquet_without_pyarrow_is_refused_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_contexts_longer_than_the_default_limit_of_csv_fields(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    long = replace(NEEDLE, context="word " * 40_000)
    write(tmp_path / "long.csv", [long], format="kvpress")
    assert read(tmp_path / "long.csv") == [long]
    assert csv.field_size_limit() == limit


def test_published_formats_are_written_with_the_fields_that_others_read(tmp_path: Path) -> None:
    def first(format: str) -> dict[str, Any]:
        write(tmp_path / "one.jsonl", [NEEDLE], format=format)
        row: dict[str, Any] = json.loads((tmp_path / "one.jsonl").read_text(encoding="utf-8"))
        return row

    prompt = NEEDLE.context + NEEDLE.query + NEEDLE.answer_prefix
    official = first("star-attention")
    assert official["input_context"] + official["input_query"] == prompt
    assert (official["index"], official["outputs"], official["length"]) == (
        0,
        list(NEEDLE.answers),
        4096,
    )
    ruler = first("ruler")
    assert ruler["input"] + ruler["answer_prefix"] == prompt
    kvpress = first("kvpress")
    assert kvpress["context"] + kvpress["question"] + kvpress["answer_prefix"] == prompt
    assert (kvpress["answer"], kvpress["max_new_tokens"], kvpress["task"]) == (
        list(NEEDLE.answers),
        17,
        NEEDLE.task,
    )


# ---------------------------------------------------------------- several files

BARE = {"input_context": "c", "input_query": "q", "outputs": ["x"]}


@pytest.mark.parametrize(
    ("folder", "length"), [("4096", 4096), ("16k", 16384), ("2024", 0), ("run-4096", 0)]
)
def test_a_folder_named_as_a_size_is_the_length(tmp_path: Path, folder: str, length: int) -> None:
    place = tmp_path / folder / "vt"
    place.mkdir(parents=True)
    bare, full = read(write_lines(place / "validation.jsonl", [BARE, {**BARE, "length": 4011}]))
    assert (bare.length, full.length) == (length, 4011)
    assert bare.id == (f"vt-{length}-0" if length else "vt-0")
    story = {"input": "Mary went to the office.", "question": "Where is Mary?", "target": "office"}
    (sample,) = read(write_lines(place / "qa1.jsonl", [story]))
    assert sample.length == length


def test_repeated_ids_are_distinguished_by_folders(tmp_path: Path) -> None:
    places = [tmp_path / "a" / "data", tmp_path / "b" / "data", tmp_path / "c"]
    for place in places:
        place.mkdir(parents=True)
    files = [write_lines(place / "vt.jsonl", [BARE]) for place in places]
    files.append(write_lines(places[2] / "more.jsonl", [{**BARE, "task": "vt"}]))
    ids = ["vt-0", "b/data/vt-0", "c/vt-0", "more.jsonl/vt-0"]
    for count in range(1, 5):
        assert [sample.id for sample in read_all(files[:count])] == ids[:count], (
            "more files change no id"
        )
    with pytest.raises(InvalidInputError, match=r"vt\.jsonl is named twice; give it once"):
        read_all([files[0], files[0]])


# ---------------------------------------------------------------- errors


GOOD = NEEDLE.as_dict()
STRINGS = "expected answers to be a list of one or more non-empty strings, got "


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
            "line 1: fields a do not match any known format: samples has context, query",
        ),
        (
            json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "id": "x", "answers": "y"}),
            "data.jsonl, line 2: not a sample: expected answers to be a list of one or more"
            " non-empty strings, got 'y'",
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
    path = write_lines(tmp_path / "data.jsonl", [GOOD, {**GOOD, "id": "x", **wrong}])
    with pytest.raises(InvalidInputError, match=f"data.jsonl, line 2: not a sample: {message}"):
        read(path)


def test_errors_of_tables_and_files_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("context,question,answer,task\nc,q,a,vt\nc,q\n")
    with pytest.raises(
        InvalidInputError,
        match=r"data.csv, line 3: the header has 4 columns, this row has a different number",
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
    with pytest.raises(InvalidInputError, match=r"data.jsonl cannot be read: it is not UTF-8"):
        read(path)


def test_formats_that_the_file_does_not_have_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [GOOD])
    with pytest.raises(
        InvalidInputError,
        match="line 1: fields input, question, target of format babilong are missing",
    ):
        read(path, format="babilong")
    with pytest.raises(InvalidInputError, match="format 'xml' is unknown; choose one of samples"):
        read(path, format="xml")


def test_formats_suffixes_and_samples_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
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


def test_written_formats_and_metrics_of_tasks_exist() -> None:
    assert set(WRITTEN) <= set(FORMATS)
    assert {task.metric for task in INFINITEBENCH.values()} <= set(METRICS)
