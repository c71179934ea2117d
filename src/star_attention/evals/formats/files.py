"""Data sets from and to files: our own records and the formats that others publish.

format            fields of a line                                               read    written
samples           context, query, answers, and the others of `Sample`            jsonl   jsonl
star-attention    index, input_context, input_query, outputs | output, length    jsonl   jsonl
kvpress           context, question, answer_prefix, answer, max_new_tokens, task jsonl, csv, parquet (with pyarrow): both
ruler             index, input, outputs, length, (answer_prefix)                 jsonl   jsonl
babilong          input, question, target                                        jsonl, json, csv
infinitebench     id, context, input, answer, options                            jsonl
scbench           id, context, multi_turns                                       jsonl

A `.json` file holds a list of what would be the lines. What is written in the formats of others has our remaining fields beside
theirs (which their readers pass over), so that reading it gives the same samples again. Where they are missing, in files that
others wrote:

- task: the field `task`, else the file's name; for names of splits and shards (`niah_single_1/validation.jsonl`, as RULER lays its
  data out, `test-00000-of-00001.parquet`) the folder's. BABILong's is the `qa1` in the file's name, or the nearest folder `qa1`.
- metric: babilong, infinitebench, scbench: the task's own. star-attention, ruler: RULER's rule, string_match_part for tasks that
  begin with "qa", string_match_all for all others; except for names of tasks of BABILong and InfiniteBench. kvpress: the same,
  but a task of unknown name is refused, because its data sets have many other metrics.
- max_new_tokens: the task's, as published; 128 for tasks of unknown name.
- length: that of the file, or else of the nearest folder, that is named as a size (`4096`, `16k`).
- id: the task, the folder's size where there is one, and the line's own number (`id` or `index`), else how many lines stand before
  it.
"""

from __future__ import annotations

import ast
import csv
import importlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from star_attention.errors import InvalidInputError
from star_attention.evals.samples.sample import Sample
from star_attention.evals.suites import babilong, infinitebench, shared
from star_attention.planning.plan import parse_size

FORMATS = {
    "samples": ("context", "query", "answers"),
    "star-attention": ("input_context", "input_query"),
    "scbench": ("context", "multi_turns"),
    "kvpress": ("context", "question", "answer"),
    "babilong": ("input", "question", "target"),
    "infinitebench": ("context", "input", "answer"),
    "ruler": ("input", "outputs"),
}
"""Each with the fields that it is known by."""
WRITTEN = ("samples", "star-attention", "kvpress", "ruler")
_SUFFIXES = {"kvpress": (".jsonl", ".csv", ".parquet")}

_RULER = {
    "niah": (128, r"What (?:is|are all) the special magic"),
    "vt": (30, r"Question: Find all variables"),
    "cwe": (120, r"Question: What are the 10 most common"),
    "fwe": (50, r"Question: Do not provide any explanation"),
    "qa": (32, r"Answer the question based on the given documents"),
}
"""Families of RULER's tasks: tokens to generate, and how the question begins (as in kvpress)."""
_EXTRAS = ("id", "task", "length", "answer_prefix", "max_new_tokens", "metric", "meta")
_PLACEHOLDER = re.compile(r"(?:validation|test|train)(?:-\d+-of-\d+)?")


def read(
    path: str | Path, *, format: str | None = None, prompts: str | None = None
) -> list[Sample]:
    """The samples of a file, in its order. format: a name in `FORMATS`; by the fields of the first line where it is not given.
    prompts: path of BABILong's published ones, for its rows; else prompts of our own.

    Raises `InvalidInputError`, with file and line, for what is missing, malformed, empty or of an unknown format, for two
    samples of one id, and for prompts where the format has none.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise InvalidInputError(f"format {format!r} is unknown; choose one of {', '.join(FORMATS)}")
    samples: list[Sample] = []
    seen: dict[str, str] = {}
    for index, (place, row) in enumerate(_rows(path)):
        try:
            format = format or _detected(row)
            if prompts is not None and format != "babilong":
                raise InvalidInputError(
                    f"prompts are for BABILong's files, and this one is of format {format}; leave them out"
                )
            for sample in _samples(row, format, path, index, prompts):
                if sample.id in seen:
                    raise InvalidInputError(
                        f"id {sample.id!r} was {seen[sample.id]}'s already; ids must differ"
                    )
                seen[sample.id] = place
                samples.append(sample)
        except InvalidInputError as error:
            raise InvalidInputError(f"{path}, {place}: {error}") from None
    if not samples:
        raise InvalidInputError(f"{path} holds no samples")
    return samples


def read_all(
    paths: Sequence[str | Path], *, format: str | None = None, prompts: str | None = None
) -> list[Sample]:
    """The samples of several files. Where a file has an id that an earlier one has, its ids begin with the names of as many of its
    folders as tell it from the earlier ones (or its own, in the same folder).

    Raises `InvalidInputError` as `read` does, and for a file that is named twice.
    """
    found: list[Sample] = []
    before: list[Path] = []
    ids: set[str] = set()
    for path in paths:
        folder = Path(path).resolve().parent
        if Path(path).resolve() in before:
            raise InvalidInputError(f"{path} is named twice; give it once")
        samples = read(path, format=format, prompts=prompts)
        if any(sample.id in ids for sample in samples):
            tails = (Path(*folder.parts[-count:]) for count in range(1, len(folder.parts) + 1))
            tail = next(
                (one for one in tails if not any(_ends_in(other.parent, one) for other in before)),
                None,
            )
            name = Path(path).name if tail is None else tail.as_posix()
            samples = [replace(sample, id=f"{name}/{sample.id}") for sample in samples]
        before.append(Path(path).resolve())
        ids.update(sample.id for sample in samples)
        found += samples
    return found


def _ends_in(folder: Path, tail: Path) -> bool:
    return folder.parts[-len(tail.parts) :] == tail.parts


def write(path: str | Path, samples: Iterable[Sample], *, format: str) -> None:
    """A file of samples, in a format of `WRITTEN`, as the path's suffix says; one that is there is overwritten.

    Raises `InvalidInputError` for formats and suffixes that cannot be written, and for samples that could not be read again: to
    "ruler", those that have no question of RULER's where the context ends.
    """
    path = Path(path)
    if format not in WRITTEN:
        raise InvalidInputError(
            f"format {format!r} cannot be written; choose one of {', '.join(WRITTEN)}"
        )
    suffixes = _SUFFIXES.get(format, (".jsonl",))
    if path.suffix not in suffixes:
        raise InvalidInputError(
            f"{path} cannot hold format {format}; name a file ending in {' or '.join(suffixes)}"
        )
    rows = [_row(sample, format, index) for index, sample in enumerate(samples)]
    if path.suffix == ".parquet":
        table = _pyarrow("pyarrow").Table.from_pylist(
            [row | {"meta": json.dumps(row["meta"])} for row in rows]
        )
        _pyarrow("pyarrow.parquet").write_table(table, path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
            writer.writeheader()
            for row in rows:
                lists = {
                    name: json.dumps(row[name], ensure_ascii=False) for name in ("answer", "meta")
                }
                writer.writerow(row | lists)
    else:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _row(sample: Sample, format: str, index: int) -> dict[str, Any]:
    values = sample.as_dict()
    extras = {name: values[name] for name in _EXTRAS}
    if format == "star-attention":
        query = sample.query + sample.answer_prefix
        named = {
            "index": index,
            "input_context": sample.context,
            "input_query": query,
            "outputs": values["answers"],
        }
    elif format == "kvpress":
        named = {"context": sample.context, "question": sample.query, "answer": values["answers"]}
    elif format == "ruler":
        named = {
            "index": index,
            "input": sample.context + sample.query,
            "outputs": values["answers"],
        }
        if _cut(named["input"], sample.task)[0] != len(sample.context):
            raise InvalidInputError(
                f"sample {sample.id} cannot be written as ruler, whose lines are cut where RULER's questions begin: write another"
                " format"
            )
    else:
        return values
    return named | extras


# ------------------------------------------------------------------ rows


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What stands on each line or row, with its place for messages."""
    try:
        if path.suffix == ".parquet":
            table = _pyarrow("pyarrow.parquet").read_table(path).to_pylist()
            yield from ((f"row {number}", row) for number, row in enumerate(table, 1))
        elif path.suffix == ".csv":
            yield from _csv_rows(path)
        else:
            yield from _json_rows(path)
    except InvalidInputError:
        raise
    except FileNotFoundError:
        hint = "; data sets are not read from stdin" if str(path) == "-" else ""
        raise InvalidInputError(f"there is no file {path}; check the path{hint}") from None
    except IsADirectoryError:
        raise InvalidInputError(f"{path} is a folder; name the files in it") from None
    except (OSError, ValueError) as error:  # UnicodeDecodeError, and pyarrow's ArrowInvalid
        raise InvalidInputError(f"{path} cannot be read: {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        if path.suffix == ".json":
            try:
                found = json.load(file)
            except json.JSONDecodeError as error:
                raise InvalidInputError(
                    f"{path}, line {error.lineno}: no JSON ({error.msg})"
                ) from None
            if not isinstance(found, list):
                raise InvalidInputError(
                    f"{path} holds no list of samples; give .json with a list, or .jsonl"
                )
            pairs: Iterable[tuple[str, Any]] = (
                (f"row {number}", row) for number, row in enumerate(found, 1)
            )
        else:
            pairs = _json_lines(path, file)
        for place, row in pairs:
            if not isinstance(row, dict):
                raise InvalidInputError(
                    f'{path}, {place}: no object with named fields; give one JSON object for each sample, as {{"context": ...}}'
                )
            yield place, row


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise InvalidInputError(
                    f"{path}, line {number}: no JSON ({error.msg}, column {error.colno})"
                ) from None


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    limit = csv.field_size_limit(sys.maxsize)  # 131,072 characters, which a long context exceeds
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise InvalidInputError(
                        f"{path}, line {reader.line_num}: {len(reader.fieldnames or [])} columns have names, this row has others"
                    )
                yield f"line {reader.line_num}", dict(row)
    except csv.Error as error:
        raise InvalidInputError(f"{path}, line {reader.line_num}: no CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _pyarrow(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InvalidInputError(
            "parquet needs the package pyarrow, which is not installed; pip install pyarrow, or use .csv or .jsonl"
        ) from None


# ------------------------------------------------------------------ samples


def _detected(row: Mapping[str, Any]) -> str:
    for format, names in FORMATS.items():
        if all(name in row for name in names) or (
            format == "ruler" and {"input", "output"} <= set(row)
        ):
            return format
    known = "; ".join(f"{format} has {', '.join(names)}" for format, names in FORMATS.items())
    raise InvalidInputError(f"fields {', '.join(map(str, row))} are of no known format: {known}")


def _samples(
    row: Mapping[str, Any], format: str, path: Path, index: int, prompts: str | None
) -> list[Sample]:
    missing = [name for name in FORMATS[format] if name not in row and name != "outputs"]
    if missing:
        raise InvalidInputError(f"{', '.join(missing)} missing, which format {format} has")
    if format == "samples":
        values = _defaults(row, path, index) | dict(row)
        if isinstance(values["id"], int):
            values["id"] = f"{values['task']}-{values['id']}"
        return [Sample.from_dict(values)]
    task = _text(row, "task", _task(path, format))
    number = next((row[name] for name in ("id", "index") if row.get(name) not in (None, "")), index)
    size = _named_size(path)
    # (Numbers begin anew in every file.)
    id = (
        number
        if isinstance(number, str)
        else "-".join([task, *([str(size)] if size else []), str(number)])
    )
    if format in ("babilong", "infinitebench", "scbench"):
        if format == "scbench":
            samples = shared.samples_of_row(row, task=task, id=id)
        elif format == "babilong":
            samples = [babilong.sample_of_row(row, task=task, id=id, prompts=prompts)]
        else:
            samples = [infinitebench.sample_of_row(row, task=task, id=id)]
        return [replace(sample, length=sample.length or size) for sample in samples]
    prefix = _text(row, "answer_prefix", "")
    if format == "kvpress":
        context, query = _text(row, "context"), _text(row, "question")
        answers = _answers(row["answer"], read_lists=path.suffix == ".csv")
    else:
        answers = _answers(row.get("outputs", row.get("output")))
        if format == "ruler":
            whole = _text(row, "input")
            cut, _ = _cut(whole, task)
            context, query = whole[:cut], whole[cut:]
        else:
            context, query = _text(row, "input_context"), _text(row, "input_query")
    if format != "kvpress" and prefix:
        query = query.removesuffix(prefix)  # both formats may have it at the query's end as well
    metric, max_new_tokens = _known(task, strict=format == "kvpress" and not row.get("metric"))
    return [
        Sample(
            id=id,
            task=task,
            length=_number(row, "length", 0) or size,
            context=context,
            query=query,
            answer_prefix=prefix,
            answers=answers,
            max_new_tokens=_number(row, "max_new_tokens", max_new_tokens),
            metric=_text(row, "metric", metric),
            meta=_meta(row.get("meta")),
        )
    ]


def _defaults(row: Mapping[str, Any], path: Path, index: int) -> dict[str, Any]:
    """What a sample of our own may leave out."""
    task = _text(row, "task", _task(path, "samples"))
    metric, max_new_tokens = _known(task, strict=False)
    return {
        "id": f"{task}-{index}",
        "task": task,
        "length": _named_size(path),
        "answer_prefix": "",
        "max_new_tokens": max_new_tokens,
        "metric": metric,
    }


def _task(path: Path, format: str) -> str:
    if format == "babilong":
        stem, *folders = _names(path)
        named = re.search(r"(?<![a-z0-9])qa\d+(?!\d)", stem)
        task = (
            named[0]
            if named
            else next((name for name in folders if re.fullmatch(r"qa\d+", name)), None)
        )
        if task is not None:
            return task
        raise InvalidInputError(
            "the task is named neither in a field task nor by the file or its folders; call it qa1.jsonl or alike"
        )
    return path.resolve().parent.name if _PLACEHOLDER.fullmatch(path.stem) else path.stem


def _named_size(path: Path) -> int:
    """Tokens that the file or the nearest folder is named by; 0 where none is."""
    for name in _names(path):
        named = re.fullmatch(r"([1-9]\d*)([kK]?)", name)
        if named and (named[2] or int(named[1]) % 128 == 0):
            return parse_size(name, "length")
    return 0


def _names(path: Path) -> list[str]:
    """The file's, without its suffix, and its folders', from the nearest on."""
    return [path.stem, *(folder.name for folder in path.resolve().parents)]


def _known(task: str, *, strict: bool) -> tuple[str, int]:
    """Metric and tokens to generate of a task by its name.

    Raises `InvalidInputError` for one of unknown name where `strict`.
    """
    if task in babilong.TASKS:
        return "babilong", babilong.MAX_NEW_TOKENS
    if task in infinitebench.KINDS:
        return infinitebench.KINDS[task].metric, infinitebench.KINDS[task].max_new_tokens
    family = _family(task)
    if family is None and strict:
        raise InvalidInputError(f"no metric is known for task {task!r}; add a column metric")
    return (
        "string_match_part" if task.startswith("qa") else "string_match_all",
        128 if family is None else _RULER[family][0],
    )


def _family(task: str) -> str | None:
    return next((family for family in _RULER if re.match(rf"{family}(?:_|$)", task)), None)


def _cut(text: str, task: str) -> tuple[int, str]:
    """Where the last question of a RULER prompt begins, and its family: the task's own, or whichever question comes last.

    Raises `InvalidInputError` where there is none.
    """
    family = _family(task)
    found = [
        (match.start(), name)
        for name in ([family] if family else _RULER)
        for match in re.finditer(_RULER[name][1], text)
    ]
    if not found:
        raise InvalidInputError(
            "no question of RULER's is in input, so that context and query cannot be told apart; use format star-attention"
        )
    return max(found)


def _text(row: Mapping[str, Any], name: str, otherwise: str | None = None) -> str:
    value = row.get(name)
    if value is None and otherwise is not None:
        return otherwise
    if not isinstance(value, str):
        raise InvalidInputError(f"{name} {value!r} is no text")
    return value


def _number(row: Mapping[str, Any], name: str, otherwise: int) -> int:
    value = row.get(name)
    if value is None or value == "":
        return otherwise
    if isinstance(value, bool) or not re.fullmatch(r"\d+", str(value)):
        raise InvalidInputError(f"{name} {value!r} is no number of tokens")
    return int(value)


def _answers(value: Any, *, read_lists: bool = False) -> tuple[str, ...]:
    """Of a text, a number or a list of them. read_lists: also from a text that is a list in JSON or Python, as in CSV."""
    if read_lists and isinstance(value, str) and value.startswith("["):
        for parse in (json.loads, ast.literal_eval):
            try:
                found = parse(value)
            except (ValueError, SyntaxError):
                continue
            if isinstance(found, list):
                value = found
                break
    answers = value if isinstance(value, list) else [value]
    if not answers or not all(isinstance(one, str | int | float) and str(one) for one in answers):
        raise InvalidInputError(f"answer {value!r} is no text and no list of texts")
    return tuple(str(one) for one in answers)


def _meta(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise InvalidInputError(f"meta {value!r} is no JSON") from None
    if value and not isinstance(value, dict):
        raise InvalidInputError(f"meta {value!r} has no named fields")
    return dict(value or {})
