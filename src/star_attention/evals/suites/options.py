"""Options that suites declare, and that the command line is built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from star_attention.errors import InvalidInputError, quote, quote_path


@dataclass(frozen=True, kw_only=True)
class SuiteOption:
    """An option of a suite, `--name` on the command line and a key of `options` in Python.

    Attributes:
        name: Key in `options`. The flag is `--` and the name.
        help: What it sets, as `--help` shows it.
        metavar: Placeholder of its value in `--help`.
        default: How `--help` describes the default; None for an option without one.
        type: Type of the value on the command line, str or int.
        min: Smallest value of an int.
        choices: Permitted values; empty for any value.
        is_path: True if the value is a path, which must exist.
        tasks: Tasks that cannot be generated without the option.
    """

    name: str
    help: str
    metavar: str
    default: str | None = None
    type: type[str] | type[int] = str
    min: int | None = None
    choices: tuple[str, ...] = ()
    is_path: bool = False
    tasks: tuple[str, ...] = ()

    def check(self, options: Mapping[str, Any]) -> None:
        """Check this option's value in `options`, if it has one.

        Raises:
            InvalidInputError: The value is not one of `choices`, or a path that does not exist.
        """
        value = options.get(self.name)
        if value is None:
            return
        if self.choices and value not in self.choices:
            choices = ", ".join(self.choices)
            raise InvalidInputError(
                f"{self.name} {quote(value)} is unknown; choose one of {choices}, or leave it out"
            )
        if self.is_path and not Path(value).exists():
            raise InvalidInputError(
                f"{self.name} '{quote_path(value)}' does not exist; check the path"
            )


ESSAYS = SuiteOption(
    name="essays",
    help="Prose for the haystack: a .json file with a `text` field, a folder of .txt files, or a"
    " text file.",
    metavar="PATH",
    default="the language reference of the running Python",
    is_path=True,
)
WORDS = SuiteOption(
    name="words",
    help="Words that keys and lists are made of: `train` for those the bundled model was trained"
    " on, `eval` for the others.",
    metavar="PART",
    default="all",
    # `samples.sources.PARTS`, which is not imported here to keep `--help` quick.
    choices=("train", "eval"),
)
