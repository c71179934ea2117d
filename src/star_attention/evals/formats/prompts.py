"""Formats that hold whole prompts: Star Attention's, kvpress's and RULER's."""

from __future__ import annotations

import re
from typing import Any

from star_attention.errors import InvalidInputError
from star_attention.evals.formats.choices import check_choices
from star_attention.evals.formats.format import Format, with_extras
from star_attention.evals.formats.known_tasks import RULER, family_of, metric_of
from star_attention.evals.formats.row import Row, parse_answers
from star_attention.evals.samples.sample import Sample


def sample_of_row(
    row: Row, *, context: str, query: str, answers: tuple[str, ...], strict: bool = False
) -> Sample:
    """Return the sample of a row with these texts; `strict` refuses tasks of unknown metrics."""
    task = row.task
    strict = strict and not row.values.get("metric")
    query, answer_prefix = _split_prefix(query, row.text("answer_prefix", ""))
    metric, max_new_tokens = metric_of(task, strict=strict)
    return Sample(
        id=row.id_for(task),
        task=task,
        length=row.tokens("length", 0) or row.named_length,
        context=context,
        query=query,
        answer_prefix=answer_prefix,
        answers=answers,
        max_new_tokens=row.tokens("max_new_tokens", max_new_tokens),
        metric=row.text("metric", metric),
        meta=row.meta,
    )


def _outputs(row: Row) -> tuple[str, ...]:
    return parse_answers(row.values.get("outputs", row.values.get("output")))


def _split_prefix(query: str, prefix: str) -> tuple[str, str]:
    """Return query and answer prefix; the file's query may end with the prefix, which is sent once.

    The two joined are then the file's query, with its own white space.
    """
    bare = prefix.strip()
    if not bare or not query.rstrip().endswith(bare):
        return query, prefix
    start = len(query) - len(prefix)
    if not query.endswith(prefix):
        start = query.rindex(bare)
        start = len(query[:start].rstrip()) if prefix[0].isspace() else start
    return query[:start], query[start:]


def _read_star_attention(row: Row) -> list[Sample]:
    answers = _outputs(row)
    context = row.text("input_context")
    query = row.text("input_query")
    return [sample_of_row(row, context=context, query=query, answers=answers)]


def _write_star_attention(sample: Sample, index: int) -> dict[str, Any]:
    fields = {
        "index": index,
        "input_context": sample.context,
        "input_query": sample.query + sample.answer_prefix,
        "outputs": list(sample.answers),
    }
    return with_extras(fields, sample)


def _read_kvpress(row: Row) -> list[Sample]:
    context, query = row.text("context"), row.text("question")
    answers = parse_answers(row.values["answer"], parse_lists=row.path.suffix == ".csv")
    # Its data sets name their tasks, of many metrics; other people's files seldom do.
    strict = row.values.get("task") is not None
    sample = sample_of_row(row, context=context, query=query, answers=answers, strict=strict)
    check_choices(row, sample)
    return [sample]


def _write_kvpress(sample: Sample, index: int) -> dict[str, Any]:
    fields = {
        "context": sample.context,
        "question": sample.query,
        "answer": list(sample.answers),
    }
    return with_extras(fields, sample)


def _read_ruler(row: Row) -> list[Sample]:
    answers = _outputs(row)
    prompt = row.text("input")
    cut = _question_start(prompt, row.task)
    return [sample_of_row(row, context=prompt[:cut], query=prompt[cut:], answers=answers)]


def _write_ruler(sample: Sample, index: int) -> dict[str, Any]:
    prompt = sample.context + sample.query
    if _question_start(prompt, sample.task) != len(sample.context):
        raise InvalidInputError(
            f"sample {sample.id} cannot be written as ruler, which is read by cutting lines where"
            " RULER's questions begin; write another format"
        )
    fields = {"index": index, "input": prompt, "outputs": list(sample.answers)}
    return with_extras(fields, sample)


def _question_start(prompt: str, task: str) -> int:
    """Return where the last question of a RULER prompt begins: the task's own, or any.

    Raises:
        InvalidInputError: There is no question.
    """
    family = family_of(task)
    starts = [
        match.start()
        for name in ([family] if family else RULER)
        for match in re.finditer(RULER[name].question, prompt)
    ]
    if not starts:
        raise InvalidInputError(
            "input contains no question of RULER's, so that it cannot be split into context and"
            " query; give the long text as context, the question as query and the answers as"
            " answers, or use format star-attention"
        )
    return max(starts)


STAR_ATTENTION = Format(
    name="star-attention",
    fields=("input_context", "input_query"),
    read=_read_star_attention,
    write=_write_star_attention,
)
KVPRESS = Format(
    name="kvpress",
    fields=("context", "question", "answer"),
    read=_read_kvpress,
    write=_write_kvpress,
    suffixes=(".jsonl", ".csv", ".parquet"),
)
RULER_PROMPTS = Format(
    name="ruler", fields=("input", "outputs"), read=_read_ruler, write=_write_ruler
)
