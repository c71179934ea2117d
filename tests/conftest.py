"""Settings of a whole session: Triton's interpreter, no defaults of the user, quick collections.

Triton kernels run in its interpreter where there is no GPU; that is set before Triton is imported.
"""

from __future__ import annotations

import gc
import os
import shutil

from tests.interpreter import quicken

# Defaults of whoever runs the tests do not count.
os.environ["STAR_ATTENTION_CONFIG"] = ""
os.environ.pop("STAR_ATTENTION_MODEL", None)
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    quicken()


def pytest_collection_finish() -> None:
    """Leave all modules out of garbage collections, which take half a second with torch's."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()
