"""Our own format: the fields of `Sample`."""

from __future__ import annotations

from star_attention.evals.formats.choices import check_choices
from star_attention.evals.formats.format import Format
from star_attention.evals.formats.known_tasks import metric_of
from star_attention.evals.formats.row import Row
from star_attention.evals.samples.sample import Sample


def _read(row: Row) -> list[Sample]:
    task = row.task
    metric, max_new_tokens = metric_of(task, strict=False)
    defaults = {
        "id": f"{task}-{row.index}",
        "task": task,
        "length": row.named_length,
        "answer_prefix": "",
        "max_new_tokens": max_new_tokens,
        "metric": metric,
    }
    values = defaults | dict(row.values)
    if isinstance(values["id"], int):
        values["id"] = f"{values['task']}-{values['id']}"
    sample = Sample.from_dict(values)
    check_choices(row, sample)
    return [sample]


SAMPLES = Format(
    name="samples",
    fields=("context", "query", "answers"),
    read=_read,
    write=lambda sample, index: sample.as_dict(),
)
