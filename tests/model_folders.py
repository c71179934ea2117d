"""Model folders for tests."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.engines import BUNDLED, tiny


def complete_model(folder: Path) -> Path:
    """Write a tiny Llama with the bundled tokenizer into a folder, and return the folder."""
    tiny("llama").save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{BUNDLED}/{name}", folder / name)
    return folder
