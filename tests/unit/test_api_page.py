"""docs/api.md says everything about the public names; `test_cli_help.py` tests that it is fresh."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import star_attention
from star_attention.cli import api_page
from star_attention.cli.api_page import public_members

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
CLASSES = (
    "BlockPlan",
    "EncodedContext",
    "Generation",
    "StarConfig",
    "StarLLM",
    "Stream",
    "Batch",
    "Row",
)


def section(heading: str) -> str:
    """The text of the page under a heading, up to the next of any level."""
    (text,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", PAGE, re.DOTALL | re.M)
    return str(text)


@pytest.mark.parametrize("name", [name for name in star_attention.__all__ if name[0] != "_"])
def test_every_public_name_has_a_section_and_a_line_in_the_table(name: str) -> None:
    assert len(section(name).split()) > 10
    assert f"| [`{name}`](#{name.lower()}) | " in PAGE


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_member_is_described(name: str) -> None:
    cls = getattr(star_attention, name)
    members = public_members(cls)
    assert members
    for member, value in members.items():
        if isinstance(value, property):
            assert f"- `{member}`: " in section(name), member
        else:
            signature, text = section(f"{name}.{member}").split("\n```\n", 1)
            assert f"{member}(" in signature
            assert text.strip(), member


def test_every_class_that_a_call_returns_has_a_section() -> None:
    """Forbids a new result class that the page does not explain."""
    returned = set(re.findall(r"^.*\) -> (.*)$", PAGE, re.MULTILINE))
    names = {name for annotation in returned for name in re.findall(r"[A-Z]\w+", annotation)}
    assert {"AsyncStream", "EncodedContext", "Generation", "Support"} <= names
    # Of typing and torch.
    for name in names - {"Any", "Iterator", "None", "Tensor"}:
        assert section(name), name


def test_calls_are_shown_as_they_are_written() -> None:
    assert (
        '    *,\n    config: StarConfig | None = None,\n    dtype: str | torch.dtype = "auto",'
        in (section("StarLLM.from_pretrained"))
    )
    # The first overload, not the implementation that returns Any.
    generate = section("StarLLM.generate").replace("async ", "")
    assert "    **settings: Unpack[GenerateOptions],\n) -> Generation\n" in generate
    assert "self" not in re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)[1]
    assert "<class " not in PAGE
    assert "<function " not in PAGE


def test_sections_of_docstrings_become_lists() -> None:
    parts = list(
        api_page.docstring(
            "Do a thing.\n\n    code(1)\n\nArgs:\n    a, b: first line\n        second\n"
            "    c: x: y\n\nReturns:\n    A number.\n\nAfter all.\n\nRaises:\n"
            "    ValueError: never.\n"
        )
    )
    assert parts == [
        "Do a thing.",
        "```text\ncode(1)\n```",
        "Args:",
        "- `a`, `b`: first line second\n- `c`: x: y",
        "Returns: A number.",
        "After all.",
        "Raises:",
        "- `ValueError`: never.",
    ]
