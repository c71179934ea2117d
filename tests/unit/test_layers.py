"""Imports point downwards, programs are separate, and there are no import cycles.

docs/architecture.md shows the layers.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "star_attention"
SOURCE = Path(__file__).parents[2] / "src" / PACKAGE

# The first name under `star_attention` determines the layer. A module may import its own layer and
# those below, except that programs do not import each other.
LAYERS = {
    # L0: the standard library only
    "_version": 0,
    "config": 0,
    "errors": 0,
    "planning": 0,
    # L1: torch
    "attention": 1,
    "linear": 1,
    # L2: other ranks, and where keys and values live
    "distributed": 2,
    "storage": 2,
    # L3: files of users; all contact with transformers' models
    "files": 3,
    "hf": 3,
    # L4: the two phases
    "phase1": 4,
    "phase1_versions": 4,
    "phase2": 4,
    # L5: what differs between methods
    "methods": 5,
    # L6: a loaded model on its ranks
    "runtime": 6,
    # L7: the parts of a request
    "encoding": 7,
    "generation": 7,
    "inputs": 7,
    # L8: the facade; `from star_attention import StarLLM` reaches it through the package itself
    "__init__": 8,
    "engine": 8,
    "question_answering": 8,
    # L9: what several programs share
    "tools": 9,
    # L10: programs over the facade, separate from each other
    "bench": 10,
    "calibration": 10,
    "demo": 10,
    "evals": 10,
    "serve": 10,
    # L11: the command line, which starts them all
    "cli": 11,
    "__main__": 12,
}
PROGRAMS = {"bench", "calibration", "demo", "evals", "serve"}

FILES = sorted(SOURCE.rglob("*.py"))


def module_of(path: Path) -> str:
    """Return the dotted name of a file's module."""
    parts = [PACKAGE, *path.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def component(module: str) -> str:
    """Return the table's name of a dotted module: `hf` for `star_attention.hf.cache.base`."""
    return module.split(".")[1] if "." in module else "__init__"


def layer(name: str, where: str) -> int:
    assert name in LAYERS, (
        f"{where}: `{name}` has no layer yet; add it to LAYERS in {Path(__file__).name}"
    )
    return LAYERS[name]


def absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """Return the dotted name that an import statement inside `module` refers to."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *(node.module or "").split(".")]).rstrip(".")


def own_imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield line and dotted module of every import of this package, including late ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = absolute(node, module, is_package)
            names = [imported_module(source, alias.name) for alias in node.names]
        else:
            continue
        for name in names:
            if name == PACKAGE or name.startswith(f"{PACKAGE}."):
                yield node.lineno, name


def imported_module(source: str, name: str) -> str:
    """Return the module that `from source import name` imports.

    `from star_attention import errors` imports the module `errors`; `from star_attention import
    StarLLM` imports the package.
    """
    submodule = f"{source}.{name}"
    return submodule if submodule in MODULES or (source == PACKAGE and name in LAYERS) else source


def foreign_imports_at_import_time(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and top-level name of the imports that run when the module is imported."""
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
    """Return every breach of the layering in one file's text."""
    tree = ast.parse(text)
    own = component(module)
    own_layer = layer(own, module)
    breaches = []
    for line, imported in own_imports(tree, module, is_package):
        where, name = f"{module}:{line}", component(imported)
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


def import_cycle(texts: dict[str, tuple[str, bool]]) -> list[str]:
    """Return the modules of an import cycle, with late imports counted; [] if there is none.

    `texts` has the text of each module, and True for packages. Imports of the package itself, for
    its public names, do not count.
    """
    graph = {
        module: {
            imported
            for _, imported in own_imports(ast.parse(text), module, is_package)
            if imported not in (PACKAGE, module)
        }
        for module, (text, is_package) in texts.items()
        if module != PACKAGE
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_the_package_is_found() -> None:
    """Forbids passing because no file was found."""
    assert {"errors", "planning", "attention"} <= {component(module) for module in MODULES}


def test_the_table_has_no_entry_without_a_module() -> None:
    """Forbids entries for modules that have moved."""
    assert set(LAYERS) == {component(module) for module in MODULES}


def test_each_program_is_between_tools_and_the_command_line() -> None:
    assert PROGRAMS <= set(LAYERS)
    for program in PROGRAMS:
        assert LAYERS["engine"] < LAYERS["tools"] < LAYERS[program] < LAYERS["cli"]
    assert LAYERS["__main__"] == max(LAYERS.values())


def test_there_are_no_import_cycles() -> None:
    texts = {
        module_of(path): (path.read_text(encoding="utf-8"), path.name == "__init__.py")
        for path in FILES
    }
    assert import_cycle(texts) == []


@pytest.mark.parametrize(
    ("texts", "is_cycle"),
    [
        ({"a": "from star_attention import b", "b": "from star_attention.a import f"}, True),
        (
            {"a": "from . import b", "b": "def late():\n    from .c import f", "c": "import {a}"},
            True,
        ),
        ({"a": "from . import b", "b": "from .c import f", "c": "import math"}, False),
        ({"a": "from star_attention import StarLLM", "b": "from .a import f"}, False),
    ],
)
def test_an_import_cycle_is_seen(
    texts: dict[str, str], is_cycle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "MODULES", {f"{PACKAGE}.{name}" for name in texts})
    modules = {
        f"{PACKAGE}.{name}": (text.format(a=f"{PACKAGE}.a"), False) for name, text in texts.items()
    }
    assert bool(import_cycle(modules)) == is_cycle


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
        ("star_attention.encoding", False, "from star_attention.engine import StarLLM"),
        ("star_attention.runtime", False, "from star_attention.inputs import checked_ids"),
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
