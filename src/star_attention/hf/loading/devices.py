"""Which device `auto` is, without torch, which takes seconds to import."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.metadata import version

from star_attention.hf.loading.packages import has_cuda_driver

_NVML = {"win32": "nvml.dll"}.get(sys.platform, "libnvidia-ml.so.1")


def default_device() -> str:
    """Return what `load.pick_device("auto")` returns; asks torch only where nothing else knows."""
    build, visible = version("torch"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if "rocm" not in build:
        is_hidden = visible is not None and visible.strip() in ("", "-1")
        if build.endswith("+cpu") or is_hidden or not has_cuda_driver():
            return "cpu"
        first = "0" if visible is None else visible.partition(",")[0].strip()
        # Others are names of GPUs.
        if first.isdecimal() and int(first) < _count_gpus():
            return "cuda"
    from star_attention.hf.loading import load

    return load.pick_device("auto")


def _count_gpus() -> int:
    """Return the GPUs that NVIDIA's management library counts, which starts nothing on them."""
    try:
        library = ctypes.CDLL(_NVML)
        count = ctypes.c_uint(0)
        if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return 0
        library.nvmlShutdown()
    except (OSError, AttributeError):
        return 0
    return count.value
