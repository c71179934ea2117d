"""Layers point downwards only: no module imports one from a higher layer (docs/architecture.md)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "star_attention"
SOURCE = Path(__file__).parents[2] / "src" / PACKAGE

# The first name under `star_attention` decides the layer. A module may import its own layer and
# those below, except that programs do not import each other.
LAYERS = {
    # L0: the standard library only
    "_version": 0,
    "config": 0,
    "errors": 0,
    "planning": 0,
    # L1: torch
    "attention": 1,
    # L2: other ranks, and where keys and values live
    "distributed": 2,
    "storage": 2,
    # L3: all contact with transformers' models
    "hf": 3,
    # L4: the two phases
    "phase1": 4,
    "phase2": 4,
    # L5: what differs between methods
    "methods": 5,
    # L6: the facade; `from star_attention import StarLLM` reaches it through the package itself
    "__init__": 6,
    "engine": 6,
    "question_answering": 6,
    "generation": 6,
    "inputs": 6,
    "encoding": 6,
    "runtime": 6,
    # L7: what several programs share
    "tools": 7,
    # L8: programs over the facade, each by itself
    "bench": 8,
    "demo": 8,
    "evals": 8,
    # L9: the command line, which starts them all
    "cli": 9,
    "__main__": 10,
}
PROGRAMS = {"bench", "demo", "evals"}

FILES = sorted(SOURCE.rglob("*.py"))


def component(module: str) -> str:
    """The table's name for a dotted module: `star_attention.hf.cache.base` -> `hf`."""
    return module.split(".")[1] if "." in module else "__init__"


def layer(name: str, where: str) -> int:
    assert name in LAYERS, (
        f"{where}: `{name}` has no layer yet; add it to LAYERS in {Path(__file__).name}"
    )
    return LAYERS[name]


def absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The dotted name that an import statement inside `module` refers to."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *(node.module or "").split(".")]).rstrip(".")


def own_imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and component of every import of this package, wherever it stands: late ones count too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = absolute(node, module, is_package)
            # `from star_attention import plan` is an import of plan, `... import StarLLM` one of the facade.
            names = [source]
            if source == PACKAGE:
                names = [
                    f"{PACKAGE}.{a.name}" if is_module(a.name) else PACKAGE for a in node.names
                ]
        else:
            continue
        for name in names:
            if name == PACKAGE or name.startswith(f"{PACKAGE}."):
                yield node.lineno, component(name)


def is_module(name: str) -> bool:
    return name in LAYERS or (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").is_file()


def foreign_imports_at_import_time(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and top-level name of the imports that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name.split(".")[0]) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and not child.level:
            yield child.lineno, (child.module or "").split(".")[0]
        yield from foreign_imports_at_import_time(child)


def violations(text: str, module: str, is_package: bool = False) -> list[str]:
    """Every breach of the layering in one file's text."""
    tree = ast.parse(text)
    own = component(module)
    own_layer = layer(own, module)
    breaches = []
    for line, name in own_imports(tree, module, is_package):
        where = f"{module}:{line}"
        if (other := layer(name, where)) > own_layer:
            breaches.append(f"{where}: layer {own_layer} ({own}) imports layer {other} ({name})")
        elif own in PROGRAMS and name in PROGRAMS - {own}:
            breaches.append(f"{where}: the program {own} imports the program {name}")
    if own_layer == 0:
        for line, name in foreign_imports_at_import_time(tree):
            if name != PACKAGE and name not in sys.stdlib_module_names:
                breaches.append(
                    f"{module}:{line}: layer 0 imports {name}, which is not in the standard library"
                )
    return breaches


def module_of(path: Path) -> str:
    parts = [PACKAGE, *path.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_package_is_found() -> None:
    """Forbids a green run over no files at all."""
    assert {"errors", "planning", "attention"} <= {component(module_of(path)) for path in FILES}


def test_the_table_has_no_entry_without_a_module() -> None:
    """Forbids entries for modules that have moved: a table of the past."""
    assert set(LAYERS) == {component(module_of(path)) for path in FILES}


def test_each_program_stands_between_tools_and_the_command_line() -> None:
    assert PROGRAMS <= set(LAYERS)
    for program in PROGRAMS:
        assert LAYERS["engine"] < LAYERS["tools"] < LAYERS[program] < LAYERS["cli"]
    assert LAYERS["__main__"] == max(LAYERS.values())


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_downwards(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert violations(text, module_of(path), is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "is_package", "text"),
    [
        ("star_attention.planning.plan", False, "from star_attention.engine import StarLLM"),
        ("star_attention.planning.plan", False, "import star_attention.hf.cache"),
        ("star_attention.planning.plan", False, "from star_attention import attention"),
        ("star_attention.planning.plan", False, "from star_attention import StarLLM"),
        ("star_attention.planning.plan", False, "from .. import storage"),
        ("star_attention.planning.plan", False, "from ..storage.kv import ContextKV"),
        ("star_attention.planning.plan", False, "import torch"),
        (
            "star_attention.planning.plan",
            False,
            "try:\n    import numpy.linalg\nexcept ImportError:\n    pass",
        ),
        (
            "star_attention.planning.plan",
            False,
            "def late():\n    from star_attention.hf.cache import StarCache",
        ),
        ("star_attention.hf.cache.base", False, "from ...phase1 import encode"),
        ("star_attention.hf", True, "from ..phase1 import encode"),
        ("star_attention.attention.kernels", True, "from ...storage.kv import ContextKV"),
        ("star_attention.engine", False, "from star_attention.cli import main"),
        ("star_attention", True, "from .cli import main"),
        ("star_attention.evals.suites", True, "from star_attention.demo.heatmap import svg"),
        ("star_attention.evals.runs.runner", False, "from ...bench import subject"),
        ("star_attention.bench.plots", False, "from star_attention import demo"),
        ("star_attention.bench.plots", False, "import star_attention.evals.reports.plots"),
        ("star_attention.demo.run", False, "def late():\n    from ..bench import plots"),
        ("star_attention.demo.page", False, "from star_attention.cli.output import table"),
        ("star_attention.tools.machine", False, "from star_attention.bench import subject"),
        ("star_attention.engine", False, "from star_attention.tools import machine"),
        ("star_attention.cli", True, "import star_attention.__main__"),
    ],
)
def test_a_breach_is_seen(module: str, is_package: bool, text: str) -> None:
    assert len(violations(text, module, is_package)) == 1


@pytest.mark.parametrize(
    ("module", "is_package", "text"),
    [
        (
            "star_attention.planning.plan",
            False,
            "import math\nfrom star_attention.errors import SizeError",
        ),
        ("star_attention.planning.plan", False, "def late():\n    import torch"),
        ("star_attention.planning.plan", False, "if TYPE_CHECKING:\n    import torch"),
        (
            "star_attention.hf.cache.base",
            False,
            "import torch, transformers\nfrom ..storage.kv import ContextKV",
        ),
        (
            "star_attention.hf",
            True,
            "from .cache.base import StarCache\nfrom ..planning.plan import BlockPlan",
        ),
        (
            "star_attention.attention.kernels.math",
            False,
            "from . import Call\nfrom .. import state",
        ),
        ("star_attention.cli.main", False, "from star_attention import StarLLM, errors"),
        ("star_attention", True, "from .engine import StarLLM"),
        (
            "star_attention.evals.reports.plots",
            False,
            "from ..suites import babilong\nfrom star_attention.tools import plotting",
        ),
        (
            "star_attention.cli.bench",
            False,
            "from star_attention import bench, demo, evals, tools",
        ),
        ("star_attention.__main__", False, "from star_attention.cli import main"),
    ],
)
def test_what_points_downwards_passes(module: str, is_package: bool, text: str) -> None:
    assert violations(text, module, is_package) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [("star_attention.novel", ""), ("star_attention.cli", "import star_attention.novel.part")],
)
def test_an_unknown_module_must_be_given_a_layer(module: str, text: str) -> None:
    with pytest.raises(AssertionError, match="`novel` has no layer yet; add it to LAYERS"):
        violations(text, module)
