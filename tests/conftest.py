"""Settings of a whole session: Triton's interpreter, no defaults of the user, quick collections.

Tests go to processes in parts (`parts`).

Triton kernels run in its interpreter where there is no GPU; that is set before Triton is imported.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Generator
from typing import Any

import pytest

from tests.interpreter import quicken

# Defaults of whoever runs the tests do not count.
os.environ["STAR_ATTENTION_CONFIG"] = ""
os.environ.pop("STAR_ATTENTION_MODEL", None)
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    quicken()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Import torch and all tests without garbage collections: they take a quarter of that time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.parts import InParts

    return InParts(config, log) if config.getoption("dist") == "loadgroup" else None


def pytest_collection_finish() -> None:
    """Leave all modules out of garbage collections, which take half a second with torch's."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()
