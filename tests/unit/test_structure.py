"""The house rules of the tree: short files and classes, no private reaches, no names compared,
values in messages cut.

`test_layers.py` has the rules about imports.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from star_attention.config import METHODS

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "star_attention"


@functools.cache
def trees() -> dict[str, ast.Module]:
    """Each file's tree; not read by processes of pytest that only collect these tests."""
    return {
        str(path.relative_to(SOURCE)): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(SOURCE.rglob("*.py"))
    }


MOST_LINES = 400
MOST_METHODS = 15
MOST_ROOT_MODULES = 13


def test_files_can_be_read_in_one_go() -> None:
    folders = ("src", "tests", "training", "scripts", "examples")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert len(lengths) > 200
    assert [str(path) for path, lines in lengths.items() if lines > MOST_LINES] == []


def test_the_root_holds_few_modules() -> None:
    assert sum("/" not in file for file in trees()) <= MOST_ROOT_MODULES


def large_classes(tree: ast.Module) -> Iterator[str]:
    """Yield classes with too many public, or private, methods; overloads count once."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            names = {member.name for member in node.body if isinstance(member, ast.FunctionDef)}
            public = {name for name in names if not name.startswith("_")}
            private = {name for name in names if is_private(name)}
            if max(len(public), len(private)) > MOST_METHODS:
                yield node.name


def test_classes_have_one_subject() -> None:
    assert [(file, name) for file, tree in trees().items() for name in large_classes(tree)] == []


def test_a_large_class_is_seen() -> None:
    methods = "".join(f"    def method_{index}(self): ...\n" for index in range(MOST_METHODS + 1))
    assert list(large_classes(ast.parse(f"class Large:\n{methods}"))) == ["Large"]


# --------------------------------------------------------------------------- private members


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_names(tree: ast.Module) -> set[str]:
    """Return the private functions, classes, attributes and fields that a module defines."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    # `_version` is an attribute of torch's tensors, and a module of ours.
    return {name for name in names if is_private(name)} - {"_version"}


def private_reaches(tree: ast.Module, ours: set[str]) -> Iterator[str]:
    """Yield uses of other modules' private names.

    Args:
        tree: a module.
        ours: private names that this package defines; those of other libraries do not count.
    """
    others = ours - private_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("star_attention"):
            yield from (
                f"import {alias.name}"
                for alias in node.names
                if is_private(alias.name) and alias.name != "_version"
            )
        elif isinstance(node, ast.Attribute) and node.attr in others:
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls"):
                yield f"{owner}.{node.attr}"


def test_modules_leave_the_private_parts_of_others_alone() -> None:
    ours = set().union(*map(private_names, trees().values()))
    assert len(ours) > 300
    reaches = [(file, use) for file, tree in trees().items() for use in private_reaches(tree, ours)]
    assert reaches == []


def test_a_private_reach_is_seen() -> None:
    tree = ast.parse(
        "from star_attention.engine import _helper\n"
        "star._handle\nself._handle\nmodel._hf_hook\nother._own\nself._own = 1"
    )
    reaches = list(private_reaches(tree, {"_handle", "_own"}))
    assert reaches == ["import _helper", "star._handle"]


# ----------------------------------------------------------------------------- method's names


def method_name_checks(tree: ast.Module) -> Iterator[str]:
    """Yield comparisons with the name of an attention method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(
            isinstance(part, ast.Constant) and part.value in METHODS
            for operand in (node.left, *node.comparators)
            for part in ast.walk(operand)
        ):
            yield ast.unparse(node)


def test_a_method_answers_for_itself() -> None:
    """Forbids a comparison with a method's name, which a new method would have to find."""
    checks = [
        (file, check)
        for file, tree in trees().items()
        if not file.startswith("methods/")
        for check in method_name_checks(tree)
    ]
    assert checks == []


def test_a_comparison_with_a_methods_name_is_seen() -> None:
    tree = ast.parse("a.method == 'star'\nb in ('dense', x)\nc = 'ring'\nd == 'other'")
    assert list(method_name_checks(tree)) == ["a.method == 'star'", "b in ('dense', x)"]


# ------------------------------------------------------------------------- values in messages


def test_messages_quote_values_through_one_helper() -> None:
    """Forbids `{value!r}` in a message: a value that is a whole document would be printed."""
    places = [f"{file}:{line}" for file, tree in trees().items() for line in unbounded(tree)]
    assert places == [], "show values by errors.quote"


def unbounded(tree: ast.Module) -> Iterator[int]:
    """Yield the lines of messages with a `{value!r}` that is neither a constant nor a slice."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if not re.search(r"warn|\bsay\b|[a-z]Error|Parameter", name) or name == "AttributeError":
            continue
        for part in ast.walk(node):
            if isinstance(part, ast.FormattedValue) and part.conversion == ord("r"):
                text = ast.unparse(part.value)
                if not re.fullmatch(r"[A-Z]\w*(\.\w+)?|.*\[-?\d*:-?\d*\]", text):
                    yield part.lineno


def test_an_unbounded_value_is_seen() -> None:
    tree = ast.parse("raise TextError(f'{a!r}')\nwarnings.warn(f'{a[-12:]!r} {B!r}')\nf(f'{a!r}')")
    assert list(unbounded(tree)) == [1]
