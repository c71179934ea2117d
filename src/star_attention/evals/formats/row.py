"""A row of a data set, its fields, and the facts in the names of its file and folders."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.planning.sizes import parse_size

_SPLIT = re.compile(r"(?:validation|test|train)(?:-\d+-of-\d+)?")
"""Names of splits and their shards, which do not name a task."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a data set.

    Attributes:
        values: Fields by name.
        path: Its file.
        index: Number of rows before it.
        prompts: Path of BABILong's published prompts, or None.
    """

    values: Mapping[str, Any]
    path: Path
    index: int
    prompts: str | None = None

    def text(self, name: str, default: str | None = None) -> str:
        """Return a string field, or the default if it is missing.

        Raises:
            InvalidInputError: The field is not a string, or missing without a default.
        """
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise InvalidInputError(f"expected {name} to be a string, got {quote(value)}")
        return value

    def tokens(self, name: str, default: int) -> int:
        """Return a field that counts tokens, or the default if it is missing or empty.

        Raises:
            InvalidInputError: The field is not a number of tokens.
        """
        value = self.values.get(name)
        if value is None or value == "":
            return default
        # Tables turn whole numbers into floats where some rows have none.
        number = re.fullmatch(r"([0-9]{1,10})(\.0)?", str(value))
        if isinstance(value, bool) or number is None:
            raise InvalidInputError(f"expected {name} to be a number of tokens, got {quote(value)}")
        return int(number[1])

    @property
    def meta(self) -> dict[str, Any]:
        """The field `meta`, an object or its JSON; empty if it is missing."""
        value = self.values.get("meta")
        if isinstance(value, str) and value:
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise InvalidInputError(f"expected meta to be JSON, got {quote(value)}") from None
        if value and not isinstance(value, dict):
            raise InvalidInputError(f"expected meta to be an object, got {quote(value)}")
        return dict(value or {})

    @property
    def task(self) -> str:
        """The field `task`, else the name of the file, or of the folder if that names a split."""
        if _SPLIT.fullmatch(self.path.stem):
            return self.text("task", self.path.resolve().parent.name)
        return self.text("task", self.path.stem)

    @property
    def named_length(self) -> int:
        """Tokens that the file or the closest folder is named after; 0 if there is none."""
        for name in self.names:
            match = re.fullmatch(r"([1-9]\d*)([kK]?)", name)
            if match and (match[2] or int(match[1]) % 128 == 0):
                return parse_size(name, "length")
        return 0

    @property
    def names(self) -> list[str]:
        """The names of the file, without its suffix, and of its folders, the closest first."""
        return [self.path.stem, *(folder.name for folder in self.path.resolve().parents)]

    def id_for(self, task: str) -> str:
        """Return the id of the row's sample: the field `id` or `index` if it is a string.

        Numbers, which start over in every file, are preceded by the task and the named length.
        """
        numbers = (self.values[name] for name in ("id", "index") if self._has(name))
        number = next(numbers, self.index)
        if isinstance(number, str):
            return number
        if isinstance(number, bool) or not isinstance(number, int):
            raise InvalidInputError(
                f"expected id or index to be a string or an integer, got {quote(number)}"
            )
        length = [str(self.named_length)] if self.named_length else []
        return "-".join([task, *length, str(number)])

    def _has(self, name: str) -> bool:
        return self.values.get(name) not in (None, "")


def parse_answers(value: Any, *, parse_lists: bool = False) -> tuple[str, ...]:
    """Return the answers in a string, a number, or a list of them.

    Args:
        value: The field.
        parse_lists: True to parse strings that hold a list in JSON or Python, as in CSV.

    Raises:
        InvalidInputError: The field has another value, or is empty.
    """
    if parse_lists and isinstance(value, str) and value.startswith("["):
        for parse in (json.loads, ast.literal_eval):
            try:
                parsed = parse(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(parsed, list):
                value = parsed
                break
    answers = value if isinstance(value, list) else [value]
    if not answers or not all(map(_is_answer, answers)):
        raise InvalidInputError(
            f"expected answer to be a string or a list of them, got {quote(value)}"
        )
    return tuple(str(answer) for answer in answers)


def _is_answer(value: Any) -> bool:
    """True for a text that is not blank, and for a finite number."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)
