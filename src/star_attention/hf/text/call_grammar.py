"""What an answer follows that has to be the call of a tool: a JSON schema, or a grammar of tags."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from star_attention.hf.text.argument_calls import ArgumentForm
from star_attention.hf.text.json_values import kinds_of

Format = dict[str, Any]
"""A format of xgrammar's structural tags."""


class CallSchema(dict[str, Any]):
    """A JSON schema of calls of tools."""


class TagGrammar(dict[str, Any]):
    """A structural tag of xgrammar's, where a JSON schema may stand."""


def call_schema(functions: list[dict[str, Any]]) -> CallSchema:
    """Return the JSON schema of one call of one of several functions.

    Args:
        functions: dicts with `name` and `parameters`, a JSON schema.
    """
    shared, calls = {}, []
    for number, function in enumerate(functions):
        # References are from the root, which is another one here.
        place = f"tool{number}"
        shared[place] = _moved(function.get("parameters") or {"type": "object"}, place)
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "arguments": {"$ref": f"#/$defs/{place}"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return CallSchema({**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": shared})


def _moved(schema: Any, place: str) -> Any:
    """Return a schema for a place among `$defs`, with its own references."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = f"#/$defs/{place}{reference[1:]}"
    return moved


def call_grammar(form: ArgumentForm, functions: Iterable[dict[str, Any]]) -> TagGrammar:
    """Return the grammar of one call of one of several functions, as a chat template writes it.

    Arguments come in the order of the schema; those that it does not require may be left out.

    Args:
        form: how the template writes calls.
        functions: dicts with `name` and `parameters`, a JSON schema.
    """
    calls = [_call(form, function) for function in functions]
    return TagGrammar(type="structural_tag", format=_either(calls))


def _call(form: ArgumentForm, function: dict[str, Any]) -> Format:
    schema = function.get("parameters")
    properties = schema.get("properties") if isinstance(schema, dict) else None
    required = schema.get("required") if isinstance(schema, dict) else None
    elements: list[Format] = [_text(form.opening + function["name"] + form.name_end)]
    for key, own in properties.items() if isinstance(properties, dict) else ():
        argument = {
            "type": "tag",
            "begin": form.before_key + key + form.after_key,
            "content": _value(own, schema),
            "end": form.after_value,
        }
        is_required = isinstance(required, list) and key in required
        elements.append(argument if is_required else {"type": "optional", "content": argument})
    return {"type": "sequence", "elements": [*elements, _text(form.end)]}


def _value(schema: Any, root: Any) -> Format:
    """Return the format of a value: text where it may be a string, which has no quotes, or JSON."""
    kinds = kinds_of(schema, root)
    if kinds and "string" not in kinds:
        shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
        return {"type": "json_schema", "json_schema": {**schema, **shared}}
    if kinds == {"string"} and ("enum" in schema or "const" in schema):
        return _either([_text(each) for each in schema.get("enum", [schema.get("const")])])
    return {"type": "any_text"}


def _text(text: str) -> Format:
    return {"type": "const_string", "value": text}


def _either(formats: list[Format]) -> Format:
    return formats[0] if len(formats) == 1 else {"type": "or", "elements": formats}
