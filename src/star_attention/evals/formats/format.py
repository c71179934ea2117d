"""The declaration of a format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from star_attention.evals.formats.row import Row
from star_attention.evals.samples.sample import Sample

_EXTRAS = ("id", "task", "length", "answer_prefix", "max_new_tokens", "metric", "meta")
"""Our fields that published formats are written with."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of data sets.

    Attributes:
        name: Its name.
        fields: Fields that it requires and is recognized by.
        read: Returns the samples of a row.
        write: Returns the fields of the n-th sample, or None if the format cannot be written.
        suffixes: Suffixes of files that it can be written to.
    """

    name: str
    fields: tuple[str, ...]
    read: Callable[[Row], list[Sample]]
    write: Callable[[Sample, int], dict[str, Any]] | None = None
    suffixes: tuple[str, ...] = (".jsonl",)

    def missing(self, values: Mapping[str, Any]) -> list[str]:
        """Return the fields that a row lacks; the official files have `output` for `outputs`."""
        return [
            field
            for field in self.fields
            if field not in values and not (field == "outputs" and "output" in values)
        ]


def with_extras(fields: Mapping[str, Any], sample: Sample) -> dict[str, Any]:
    """Return a format's own fields and our remaining ones."""
    values = sample.as_dict()
    return dict(fields) | {name: values[name] for name in _EXTRAS}
