"""Options that are declared elsewhere: `DeclaredOptions`, and those of `StarConfig`'s fields."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from star_attention.config import StarConfig
from star_attention.planning.quality import QUALITIES, QUALITY_HELP

_FIELDS = {field.name: field for field in dataclasses.fields(StarConfig)}


_PRESET = frozenset(QUALITIES["paper"])
"""Fields that a preset stands for. Their options have no default, to tell those that were given."""


class DeclaredOptions(ABC):
    """Marks a parameter of a command that is built from several options, declared elsewhere."""

    @abstractmethod
    def parameters(self) -> Iterator[inspect.Parameter]:
        """Return one parameter per option, annotated for typer."""

    @abstractmethod
    def settings(self, values: dict[str, Any]) -> Any:
        """Return the value of the marked parameter, from the values of all options."""


@dataclass(frozen=True, init=False)
class ConfigOptions(DeclaredOptions):
    """Marks a `dict[str, Any]` of `StarConfig` settings: each becomes an option of a command.

    Values are as given on the command line, for `StarConfig.of` to parse and check. With
    `lookback` comes `--quality`; fields that it stands for are left out unless they were given.

    Args:
        names: Fields of `StarConfig`; without any, all of them.
        without: Fields to leave out.
    """

    names: tuple[str, ...]

    def __init__(self, *names: str, without: tuple[str, ...] = ()) -> None:
        selected = tuple(name for name in names or _FIELDS if name not in without)
        object.__setattr__(self, "names", selected)

    def parameters(self) -> Iterator[inspect.Parameter]:
        """Return one parameter per setting, annotated for typer."""
        for name in self.names:
            if name == "lookback":
                yield _quality()
            default = None if name in _PRESET else _FIELDS[name].default
            kind: Any = str if default is not None else str | None
            if _is_flag(name):
                kind = bool | None
            yield inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default if default is None or _is_flag(name) else str(default),
                annotation=Annotated[kind, _option(name)],
            )

    def settings(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the settings among the values of all options."""
        names = [*self.names, *(["quality"] if "lookback" in self.names else [])]
        presettable = {*_PRESET, "quality"}
        return {
            name: values[name]
            for name in names
            if name not in presettable or values[name] is not None
        }


def _is_flag(name: str) -> bool:
    """True for a setting that is switched on or off, and takes no value."""
    return not _FIELDS[name].metadata["metavar"]


def _option(name: str) -> Any:
    setting = _FIELDS[name].metadata
    default = setting["default_text"]
    if name in _PRESET and default is None:
        default = str(_FIELDS[name].default)
    # Explicit: typer 0.27 derives the name from a metavar that differs in case only.
    option = name.replace("_", "-")
    return typer.Option(
        f"--{option}/--no-{option}" if _is_flag(name) else f"--{option}",
        help=setting["help"],
        metavar=setting["metavar"] or None,
        rich_help_panel=setting["panel"],
        show_default=default or True,
    )


def _quality() -> inspect.Parameter:
    setting = _FIELDS["lookback"].metadata
    option = typer.Option(
        "--quality",
        help=QUALITY_HELP,
        metavar="NAME",
        rich_help_panel=setting["panel"],
        show_default="paper",
    )
    return inspect.Parameter(
        "quality",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[str | None, option],
    )
