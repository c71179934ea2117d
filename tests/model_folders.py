"""Model folders for tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.engines import BUNDLED, tiny


def complete_model(folder: Path) -> Path:
    """Write a tiny Llama with the bundled tokenizer into a folder, and return the folder."""
    tiny("llama").save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{BUNDLED}/{name}", folder / name)
    return folder


def edit(folder: Path, **fields: Any) -> Path:
    """Change fields of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder
