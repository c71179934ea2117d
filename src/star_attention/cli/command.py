"""Turn a function into a command: groups of options become single options."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from star_attention.cli.config_options import DeclaredOptions
from star_attention.cli.errors import Reporting, cli_errors
from star_attention.cli.streams import guarded_stdout
from star_attention.cli.torchrun import rank_failures

_DEBUG = inspect.Parameter(
    "debug",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")],
)
_VERBOSE = inspect.Parameter(
    "verbose",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Also print the libraries' log messages, the settings in use and the block plan.",
        ),
    ],
)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Wrap `function` for typer.

    A parameter annotated with a dataclass takes one option per field; a parameter marked with
    `DeclaredOptions` takes the options that the mark declares. Fields of a dataclass may be groups
    themselves.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    builders: dict[str, _Builder] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        options, builders[name] = _expand(name, hints[name], parameter.default)
        parameters += options
    # Help lists groups by their first option. Those of several ranks matter to few.
    parameters.sort(key=_is_about_ranks)
    parameters += [_VERBOSE, _DEBUG]

    def run(**values: Any) -> None:
        reporting = Reporting(
            debug=values.pop("debug"),
            verbose=values.pop("verbose"),
            quiet=values.get("quiet", False),
        )
        with cli_errors(reporting), rank_failures(), guarded_stdout():
            function(**{name: build(values) for name, build in builders.items()})

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _is_about_ranks(parameter: inspect.Parameter) -> bool:
    marks = get_args(parameter.annotation)[1:]
    return any(getattr(mark, "rich_help_panel", None) == "Ranks" for mark in marks)


_Builder = Callable[[dict[str, Any]], Any]
"""Builds an argument of the function from the values of all options."""


def _expand(name: str, hint: Any, default: Any) -> tuple[list[inspect.Parameter], _Builder]:
    """Return a parameter's options, and a function that builds its value from their values."""
    for mark in get_args(hint)[1:]:
        if isinstance(mark, DeclaredOptions):
            return list(mark.parameters()), mark.settings
    if dataclasses.is_dataclass(hint):
        return _expand_group(hint)
    option = inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint
    )
    return [option], lambda values: values[name]


def _expand_group(group: Any) -> tuple[list[inspect.Parameter], _Builder]:
    hints = get_type_hints(group, include_extras=True)
    parameters: list[inspect.Parameter] = []
    builders: dict[str, _Builder] = {}
    for field in dataclasses.fields(group):
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        options, builders[field.name] = _expand(field.name, hints[field.name], default)
        parameters += options
    return parameters, lambda values: group(**{n: build(values) for n, build in builders.items()})


class Command(TyperCommand):
    """A typer command whose error for a bad value always names the value.

    Newer versions of typer leave the message to pydantic, which omits it.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            details = getattr(error.__cause__, "errors", None)
            if details is not None:
                error.message += f", not {details()[0]['input']}"
            raise
