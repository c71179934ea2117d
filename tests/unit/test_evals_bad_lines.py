"""Bad lines of data sets: an error that names file, line, field and value, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from star_attention.errors import InvalidInputError
from star_attention.evals.formats.files import read
from star_attention.evals.samples.sample import Sample
from tests.jsonl import write_lines

GOOD = {"context": "It is 7.\n", "query": "What is it?", "answers": ["7"]}

ROWS: dict[str, dict[str, Any]] = {
    "own": {**GOOD, "id": "a", "task": "own", "length": 9, "answer_prefix": " It is", "meta": {}},
    "official": {"index": 0, "input_context": "c", "input_query": "q", "outputs": ["1"]},
    "kvpress": {"context": "c", "question": "q", "answer": "1", "task": "vt", "meta": {"a": 1}},
    "qa1": {"input": "Mary is in the office.", "question": "Where?", "target": "office"},
    "longbook_choice_eng": {
        "id": 1,
        "context": "c",
        "input": "Who?",
        "answer": ["Cy"],
        "options": ["Bo", "Cy", "Di", "Ed"],
    },
    "math_find": {"id": 1, "context": "[3, 4]", "input": "Which?", "answer": 3, "options": []},
    "vt": {"index": 0, "input": "c\nQuestion: Find all variables.", "outputs": ["x"], "length": 5},
    "scbench_kv": {"id": 0, "context": "c", "multi_turns": [{"input": "a", "answer": "x"}]},
}
ODD: list[Any] = [
    None,
    "",
    " \n",
    "half \ud83d of it",
    3,
    -1,
    2.5,
    10**400,
    float("nan"),
    float("-inf"),
    True,
    [],
    [[]],
    [None],
    [""],
    ["half \udc00"],
    {},
    {"a": {"b": "\ud83d"}},
    {"a": float("nan")},
    "x" * 300,
]


@pytest.mark.parametrize("name", ROWS)
def test_no_value_of_a_field_leads_to_a_traceback(tmp_path: Path, name: str) -> None:
    """Each field of each format takes each odd value: it is refused with its line, or read."""
    refused = 0
    for field in ROWS[name]:
        for number, value in enumerate(ODD):
            path = tmp_path / f"{field}-{number}" / f"{name}.jsonl"
            write_lines(path, [ROWS[name], ROWS[name] | {"id": "b", field: value}])
            try:
                samples = read(path)
            except InvalidInputError as error:
                message = str(error)
                assert f"{path}, line 2: " in message
                assert len(message) - len(str(path)) < 400, message
                refused += 1
            else:
                assert all(isinstance(sample, Sample) for sample in samples)
                json.dumps([sample.as_dict() for sample in samples], allow_nan=False).encode()
                assert "\ud83d" not in repr(samples)
    assert refused > 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"context": "caf\\ud83d", "query": "q", "answers": ["x"]}',
            r"field 'context' holds a lone surrogate",
        ),
        (
            '{"context": "c", "query": "\\udc00?", "answers": ["x"]}',
            r"'query'.*\\udc00, at offset 0",
        ),
        (
            '{"context": "c", "query": "q", "answers": ["x", "\\ud83d"]}',
            r"field 'answers\[1\]' holds",
        ),
        (
            '{"input_context": "\\ud83d", "input_query": "q", "output": "x"}',
            "'input_context' holds",
        ),
        ('{"context": "c", "query": "q", "answers": [NaN]}', r"answers .* got \[nan\]"),
        ('{"context": NaN, "query": "q", "answers": ["x"]}', "context to be a string, got nan"),
        ('{"context": "c", "question": "q", "answer": NaN, "task": "vt"}', "answer .* got nan"),
        ('{"context": "c", "query": "q", "answers": ["x"], "meta": {"a": NaN}}', "meta .* as JSON"),
        (
            '{"context": "c", "query": "q", "answers": ["x"], "length": 1' + "0" * 30 + "}",
            "expected length to be a number of tokens",
        ),
        ('{"context": "c", "query": "q", "answers": ["x"], "length": 1' + "0" * 9999 + "}", "4300"),
        ("[" * 100_000 + "]" * 100_000, "invalid JSON .*recursion.*; "),
        ('{"context": "c", "query": "q", "answers": ["x"', r"cut off: get it whole"),
        ('{"context": "c"', "invalid JSON"),
        ("[", "name the file .json"),
        ("context,query", "invalid JSON .*, at 'context,query'"),
        (
            '{"context": "c", "query": "q", "answers": ["7"], "metric": "magic"}',
            "'magic' .* unknown",
        ),
        ('{"context": "c", "query": "q", "answers": ["x"], "metric": "last_integer"}', "numeric"),
        ('{"context": "c", "query": "q", "answers": [""]}', "non-empty strings"),
        ('{"context": " ", "query": "q", "answers": ["x"]}', "has no context"),
        ('{"context": "c", "query": "", "answers": ["x"]}', "has no query"),
        ('{"context": "c", "query": "q", "answers": ["x"], "id": 0}', "already that of line 1"),
        ('{"context": "c", "question": "q", "answer": true, "task": "vt"}', "got True"),
        (
            '{"context": "c", "context": "d", "query": "q", "answers": ["x"]}',
            "the field 'context' comes twice.; correct it",
        ),
    ],
    ids=lambda value: value[-40:],
)
def test_errors_name_line_field_value_and_remedy(tmp_path: Path, line: str, message: str) -> None:
    kind = "own" if '"query"' in line or "input_" not in line else "official"
    if '"question"' in line:
        kind = "kvpress"
    good = GOOD if kind == "own" else ROWS[kind]
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(good)}\n\n{line}", encoding="utf-8")
    with pytest.raises(InvalidInputError, match=rf"data\.jsonl, line 3: .*{message}"):
        read(path)


def test_a_column_that_comes_twice(tmp_path: Path) -> None:
    """Forbids reading the last one without a word."""
    path = tmp_path / "data.csv"
    path.write_text('context,query,answers,query\na,b,"[""x""]",c\n', encoding="utf-8")
    with pytest.raises(InvalidInputError, match=r"line 1: the column 'query' comes twice; rename"):
        read(path)


def test_a_pair_of_escapes_is_its_character(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [{**GOOD, "context": "\N{GRINNING FACE}!"}])
    assert "\\ud83d\\ude00" in path.read_text()
    assert read(path)[0].context == "\N{GRINNING FACE}!"


def test_marks_line_ends_and_blank_lines_do_not_matter(tmp_path: Path) -> None:
    """Byte-order marks, also in the middle of joined files, CRLF, CR, and lines of white space."""
    row = json.dumps(GOOD)
    path = tmp_path / "data.jsonl"
    for end in ("\n", "\r\n", "\r"):
        path.write_bytes(f"\ufeff{row}{end}{end} \t{end}\ufeff{row}".encode())
        assert [sample.id for sample in read(path)] == ["data-0", "data-1"]


def test_a_json_file_with_a_row_per_line_is_refused_with_the_right_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.json", [GOOD, GOOD])
    with pytest.raises(InvalidInputError, match=r"data\.json, line 2: .*per line, name it \.jsonl"):
        read(path)
