"""Fixtures for tests of the command line, and what no test may leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import CHAT, NEEDLE, NOISE, OTHER, ok
from tests.engines import BUNDLED, left_in_shared_models


@pytest.fixture(autouse=True)
def models_as_they_were() -> Iterator[None]:
    """Blame the test that changes a shared model, not one that fails by it in the same process."""
    yield
    assert left_in_shared_models() == []


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `book.txt`, `more.txt` (a needle each) and the book as `book.star`.

    Tests must not change its files.
    """
    folder = tmp_path_factory.mktemp("texts")
    (folder / "book.txt").write_text(8 * NOISE + NEEDLE + 8 * NOISE, encoding="utf-8")
    (folder / "more.txt").write_text(4 * NOISE + OTHER + 4 * NOISE, encoding="utf-8")
    ok("encode", *CHAT, folder / "book.txt", "-o", folder / "book.star", "--quiet")
    return folder


@pytest.fixture
def bare_config(tmp_path: Path) -> Path:
    """Return a model folder with nothing but its config."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((Path(BUNDLED) / "config.json").read_bytes())
    return folder
