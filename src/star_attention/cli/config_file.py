"""Defaults of options from a file in TOML.

The file is `$STAR_ATTENTION_CONFIG`, or else `~/.config/star-attention/config.toml`
(`$XDG_CONFIG_HOME`). A key is an option's name without the dashes before it. At the top it holds
for every command with that option but `bench` and `demo`, in a table for the command of that name:

    model = "/models/Llama-3.1-8B-Instruct"
    [generate]
    max-new-tokens = 512
    [eval.run]
    skip-too-long = true
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from star_attention.errors import InvalidInputError

VARIABLE = "STAR_ATTENTION_CONFIG"
_NOT_FOR_SAVED = ("model", "adapter", "subfolder", "revision", "model_kwargs", "rope_scaling")
"""Options that a saved context answers by itself."""

_SAVED = "ask"
_ON_THEIR_OWN = ("bench", "demo")
"""Commands with a choice of models of their own, which shared defaults would contradict."""


def path() -> Path | None:
    """Return the file; None if there is none.

    Raises:
        InvalidInputError: If the variable names a file that does not exist.
    """
    named = os.environ.get(VARIABLE)
    if named is not None:
        if named and not Path(named).is_file():
            raise InvalidInputError(
                f"there is no settings file {named}; correct or unset {VARIABLE}"
            )
        return Path(named) if named else None
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    file = Path(home) / "star-attention" / "config.toml"
    return file if file.is_file() else None


def defaults(root: Any) -> dict[str, Any]:
    """Return the defaults of all commands by name, as click's `default_map`.

    Args:
        root: The command line's group of commands.

    Raises:
        InvalidInputError: If the file is not TOML, or names an unknown option or command.
    """
    file = path()
    if file is None:
        return {}
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"the settings file {file} cannot be read: {error}; correct or remove it"
        ) from None
    shared = {_name(key): value for key, value in values.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    taken: set[str] = set()
    result = _defaults(root, shared, tables, str(file), taken)
    for key in shared:
        if key not in taken:
            raise InvalidInputError(
                f"{file}: no command has an option --{key.replace('_', '-')}; correct or remove it"
            )
    return result


def _defaults(
    group: Any, shared: dict[str, Any], tables: dict[str, Any], file: str, taken: set[str]
) -> dict[str, Any]:
    """Return the defaults of a group's commands; add the shared options that they take."""
    unknown = sorted(tables.keys() - group.commands.keys())
    if unknown:
        raise InvalidInputError(
            f"{file}: there is no command {unknown[0]}; choose from {', '.join(group.commands)}"
        )
    result: dict[str, Any] = {}
    for name, command in group.commands.items():
        table = tables.get(name, {})
        inherited = {} if name in _ON_THEIR_OWN else shared
        if hasattr(command, "commands"):
            result[name] = _defaults(command, inherited, table, file, taken)
            continue
        options = {p.name for p in command.params if p.param_type_name == "option"}
        own = {_name(key): value for key, value in table.items()}
        for key in own:
            if key not in options:
                raise InvalidInputError(
                    f"{file}: {name} has no option --{key.replace('_', '-')}; see"
                    f" `star-attention {name} --help`"
                )
        taken |= options
        common = {
            key: value
            for key, value in inherited.items()
            if key in options and not (name == _SAVED and key in _NOT_FOR_SAVED)
        }
        result[name] = common | own
    return result


def _name(key: str) -> str:
    return key.removeprefix("--").replace("-", "_")
