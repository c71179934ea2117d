"""Run Triton kernels in its interpreter where there is no GPU; set before Triton is imported."""

from __future__ import annotations

import os
import shutil

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
