"""Where there is no GPU, Triton's kernels run in its interpreter, which has to be said before anything imports Triton."""

from __future__ import annotations

import os
import shutil

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
