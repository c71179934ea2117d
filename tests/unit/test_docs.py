"""The documents keep up with the code: examples run, links lead somewhere, families are listed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.families import FAMILIES, REFUSED, UNUSUAL

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "models" / "needle-17m" / "README.md",
    ROOT / "training" / "README.md",
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_wrapped_at_100_columns(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    unbroken = re.compile(r"[|!]|<!--|.*https?://")
    long = [line for line in text.splitlines() if len(line) > 100 and not unbroken.match(line)]
    assert long == []


def test_serving_lists_every_code_of_an_error() -> None:
    """Forbids an answer that nobody can look up."""
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "src" / "star_attention" / "serve").rglob("*.py"))
    )
    calls = re.findall(r"\b(?:unavailable|_missing)\([^()]*?\"(\w+)\"\)", source)
    codes = {*re.findall(r"\bcode=\"(\w+)\"", source), *calls}
    assert {"pin_budget", "warming_up", "response_not_found"} <= codes
    table = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    table = table.partition("\n## Errors\n")[2].partition("\n## ")[0]
    assert sorted(code for code in codes if f"`{code}`" not in table) == []


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_models_lists_every_tested_family() -> None:
    listed = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    tested, _, refused = listed.partition("## Refused families")
    assert [name for name in FAMILIES | UNUSUAL if f"`{name}`" not in tested] == []
    # These were refused before transformers 5.24.
    newer = {"gptj", "codegen"}
    assert [name for name in REFUSED if f"`{name}`" not in refused and name not in newer] == []


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md", "docs/method.md"])
def test_named_files_define_the_named_symbols(name: str) -> None:
    """Forbids `path.py: symbol` in a document after the symbol has moved."""
    text = " ".join((ROOT / name).read_text(encoding="utf-8").split())
    for path, symbols in re.findall(r"`([\w/]+\.py)(?:: ([\w., ]+))?`", text):
        if "NAME" in path:
            continue
        places = [ROOT / "src" / "star_attention" / path, ROOT / path]
        file = next((place for place in places if place.exists()), None)
        assert file is not None, path
        source = file.read_text(encoding="utf-8")
        for symbol in filter(None, symbols.split(", ")):
            for part in symbol.split("."):
                defined = rf"^\s*(?:(?:async )?def|class) {part}\b|^\s*(?:\w+, )*{part}\b.*="
                assert re.search(defined, source, re.MULTILINE), f"{path} does not define {symbol}"
