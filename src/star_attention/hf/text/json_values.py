"""JSON values that a model writes: read as they stand, or typed by the schema of an argument."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

_MOST_STEPS = 16
"""Most references and unions that are followed to the type of one argument."""
_WORDS: dict[str, tuple[str, bool | None]] = {
    "true": ("boolean", True),
    "false": ("boolean", False),
    "null": ("null", None),
    "none": ("null", None),
}
"""Words of JSON and Python, which templates write both, with their types."""


def decoded(text: str, at: int = 0) -> tuple[Any, int]:
    """Return the JSON value at a place of a text, and where it ends.

    Raises:
        ValueError: there is none, or one that JSON cannot hold (NaN, infinity).
    """
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        raise ValueError("too many lists or objects in each other") from None


def typed(text: str, schema: Any, root: Any = None) -> Any:
    """Return the value that a text is by a schema; the text itself where it fits no other type.

    Args:
        text: a value as a model writes it: strings without quotes.
        schema: the JSON schema of the value; anything else allows all types.
        root: the schema that references are looked up in.
    """
    kinds = kinds_of(schema, root)
    if kinds == {"string"}:
        return text
    for value in _readings(text.strip(), kinds):
        kind = _kind(value)
        if kind == "string":
            continue
        if not kinds or kind in kinds or (kind == "integer" and "number" in kinds):
            return value
    return text


def kinds_of(schema: Any, root: Any) -> frozenset[str]:
    """Return the types that a schema allows, in the words of schemas; none for all.

    Args:
        schema: a JSON schema; anything else allows all.
        root: the schema that references are looked up in.
    """
    return _kinds(schema, root, _MOST_STEPS)


def _readings(text: str, kinds: frozenset[str]) -> Iterator[Any]:
    """Yield what a text may be besides a string."""
    kind, value = _WORDS.get(text.lower(), ("", None))
    if kind in kinds:
        yield value
    try:
        value, end = decoded(text)
    except ValueError:
        return
    if end == len(text):
        if isinstance(value, float) and value.is_integer() and kinds & {"integer"}:
            yield int(value)
        yield value


def _kind(value: Any) -> str:
    """Return the type of a JSON value, in the words of schemas."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    kinds = {int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return kinds[type(value)]


def _kinds(schema: Any, root: Any, steps: int) -> frozenset[str]:
    """Return the types that a schema allows; none for all."""
    if not isinstance(schema, dict) or not steps:
        return frozenset()
    own = schema.get("type")
    if own is not None:
        names = [own] if isinstance(own, str) else own if isinstance(own, list) else []
        more = ["null"] if schema.get("nullable") is True else []
        return frozenset(name for name in [*names, *more] if isinstance(name, str))
    if "const" in schema:
        return frozenset({_kind(schema["const"])})
    if isinstance(schema.get("enum"), list):
        return frozenset(map(_kind, schema["enum"]))
    if "$ref" in schema:
        return _kinds(_referenced(schema["$ref"], root), root, steps - 1)
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list):
            found = [_kinds(each, root, steps - 1) for each in schema[name]]
            return frozenset().union(*found) if all(found) else frozenset()
    if isinstance(schema.get("allOf"), list):
        found = [_kinds(each, root, steps - 1) for each in schema["allOf"]]
        return next(filter(None, found), frozenset())
    if "properties" in schema or "additionalProperties" in schema:
        return frozenset({"object"})
    return frozenset({"array"}) if "items" in schema else frozenset()


def _referenced(reference: Any, root: Any) -> Any:
    """Return what a reference within a schema names; None for another one."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found = root
    for part in reference.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


_DECODER = json.JSONDecoder(strict=False, parse_constant=_constant, parse_float=_finite)
