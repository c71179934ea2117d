"""Run Triton kernels in its interpreter where there is no GPU; set before Triton is imported."""

from __future__ import annotations

import os
import shutil

# Defaults of whoever runs the tests do not count.
os.environ["STAR_ATTENTION_CONFIG"] = ""
os.environ.pop("STAR_ATTENTION_MODEL", None)
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
