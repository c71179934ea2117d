"""Groups of commands that import a command's module when the command is used."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True)
class Entry:
    """A command that is not imported yet.

    Attributes:
        summary: the first paragraph of its docstring, for the group's help.
        function: where it is, as "module:function".
        argument: what that function returns the command for; None if it is the command itself.
    """

    summary: str
    function: str
    argument: str | None = None

    def load(self, name: str) -> Any:
        """Import the function, and return its command."""
        from star_attention.cli.command import Command, command

        module, _, attribute = self.function.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        if self.argument is not None:
            function = function(self.argument)
        single = typer.Typer(add_completion=False, rich_markup_mode="markdown")
        single.command(name, cls=Command)(command(function))
        return typer.main.get_command(single)


class LazyCommands(Mapping[str, Any]):
    """Commands by name: those of entries are loaded when they are looked up, once.

    Args:
        entries: commands that are not imported yet.
        others: commands that are listed after them.
    """

    def __init__(self, entries: Mapping[str, Entry], others: Mapping[str, Any]) -> None:
        self._entries, self._loaded = entries, dict(others)
        self._names = [*entries, *others]

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = self._entries[name].load(name)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def for_listing(self) -> dict[str, Any]:
        """Return commands that have a name and a summary, and nothing else."""
        return {
            name: TyperCommand(name, help=self._entries[name].summary)
            if name in self._entries
            else self._loaded[name]
            for name in self._names
        }


class LazyGroup(TyperGroup):
    """A group whose help imports none of its commands. Subclasses set `entries`."""

    entries: ClassVar[Mapping[str, Entry]] = {}

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = LazyCommands(self.entries, self.commands)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        listing = copy.copy(self)
        listing.commands = self.commands.for_listing()
        super(LazyGroup, listing).format_help(ctx, formatter)
