"""Values that a model writes as text get the types of a schema."""

from __future__ import annotations

from typing import Any

import pytest

from star_attention.hf.text.json_values import typed


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("42", {"type": "string"}, "42"),
        (" 42\n", {"type": "integer"}, 42),
        ("4.0", {"type": "integer"}, 4),
        ("4.5", {"type": "integer"}, "4.5"),
        ("4", {"type": "number"}, 4),
        ("forty", {"type": "number"}, "forty"),
        ("9" * 5000, {"type": "number"}, "9" * 5000),
        ("NaN", {"type": "number"}, "NaN"),
        ("1e999", {"type": "number"}, "1e999"),
        ("True", {"type": "boolean"}, True),
        ("FALSE", {"type": "boolean"}, False),
        ("1", {"type": "boolean"}, "1"),
        ("None", {"type": "object", "nullable": True}, None),
        ("None", {"type": "string", "nullable": True}, None),
        ("None", {}, "None"),
        ("null", {}, None),
        ('{"a": 1}', {"type": "object"}, {"a": 1}),
        ("{'a': 1}", {"type": "object"}, "{'a': 1}"),
        ('{"a": 1', {"type": "object"}, '{"a": 1'),
        ('{"a": 1} x', {"type": "object"}, '{"a": 1} x'),
        ("[" * 100_000, {"type": "array"}, "[" * 100_000),
        ('"Paris"', {}, '"Paris"'),
        ("Paris", {}, "Paris"),
        ("12", None, 12),
        ("12", {"allOf": [{"description": "x"}, {"type": "string"}]}, "12"),
        ("12", {"const": "12"}, "12"),
        ("[1]", {"items": {"type": "integer"}}, [1]),
        ('{"a": 1}', {"$ref": "#/$defs/loop"}, {"a": 1}),
        ("x", {"$ref": "https://example.com/schema"}, "x"),
        ("12", {"type": 7}, 12),
    ],
)
def test_a_value_is_typed_by_its_schema(text: str, schema: Any, value: Any) -> None:
    """Forbids strings that turn into numbers, and values that are lost."""
    found = typed(text, schema, {"$defs": {"loop": {"$ref": "#/$defs/loop"}}})
    assert (found, type(found)) == (value, type(value))
