"""Optional packages that some models need, and the error when one is missing. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from typing import Any

from star_attention.errors import InvalidInputError, MissingPackageError, quote

_EXTRAS = ("gguf", "peft", "torchao")

_QUANTIZATION = {
    "aqlm": ("aqlm",),
    "auto-round": ("auto_round",),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "compressed-tensors": ("compressed_tensors",),
    "eetq": ("kernels",),
    "fbgemm_fp8": ("fbgemm_gpu",),
    "gptq": ("optimum", "gptqmodel"),
    "hqq": ("hqq",),
    "quanto": ("optimum.quanto",),
    "quark": ("quark",),
    "spqr": ("spqr_quant",),
    "torchao": ("torchao",),
    "vptq": ("vptq",),
}
"""Packages by `quant_method` of a config; transformers checks again, also those not listed here."""

_KINDS = (
    *("cpu", "cuda", "fpga", "hip", "hpu", "ideep", "ipu", "lazy", "maia", "meta", "mkldnn", "mps"),
    *("mtia", "opencl", "opengl", "privateuseone", "ve", "vulkan", "xla", "xpu"),
)
"""Kinds of devices that torch knows by itself."""

UNKNOWN_METHOD = "an unknown method"
"""What `quantization` returns for a config that does not name its method."""

_INSTALL = {
    "auto_round": "auto-round",
    "compressed_tensors": "compressed-tensors",
    "fbgemm_gpu": "fbgemm-gpu-genai",
    "optimum.quanto": "optimum-quanto",
    "quark": "amd-quark",
    "spqr_quant": "spqr_quant[gpu]",
}
"""Names for pip that differ from the module's."""


def need_packages(modules: Iterable[str], reason: str) -> None:
    """Check that modules can be imported, without importing them.

    Raises:
        MissingPackageError: one of them cannot; names the command that installs it.
    """
    missing = [module for module in modules if not _is_there(module)]
    if not missing:
        return
    packages = [_INSTALL.get(module, module) for module in missing]
    install = [
        f'"star-attention[{module}]"' if module in _EXTRAS else package
        for module, package in zip(missing, packages, strict=True)
    ]
    kind = "package" if len(missing) == 1 else "packages"
    raise MissingPackageError(
        f"{reason}, which needs the {kind} {' and '.join(packages)}; run: pip install"
        f" {' '.join(install)}"
    )


def need_quantization_packages(name: str, config: dict[str, Any]) -> None:
    """Check that the packages which a config's quantized weights need are installed.

    Args:
        name: what to call the model in an error.
        config: the contents of a config.json.

    Raises:
        MissingPackageError: one is missing; names the command that installs it.
    """
    method = quantization(config)
    modules = _QUANTIZATION.get(method or "", ())
    need_packages(modules, f"the weights at {name} are quantized with {method}")


def check_device_is_here(device: str) -> None:
    """Refuse a kind of device that torch does not have, and a GPU where it cannot have one.

    Before torch is imported.

    Raises:
        InvalidInputError: for a device of no kind, or a CUDA device with a torch for the CPU, with
            all GPUs hidden, or without NVIDIA's driver.
    """
    kind = device.partition(":")[0]
    # Packages may bring kinds of their own.
    if kind not in (*_KINDS, "auto") and not entry_points(group="torch.backends"):
        raise InvalidInputError(f"device {quote(device)} is unknown; use auto, cpu, cuda or cuda:1")
    if kind != "cuda":
        return
    build, hidden = version("torch"), os.environ.get("CUDA_VISIBLE_DEVICES")
    problem = None
    if build.endswith("+cpu"):
        problem = f"torch {build} was built without CUDA; use cpu, or install a torch with CUDA"
    elif "rocm" in build:
        # AMD's GPUs are CUDA devices, too, and have another driver.
        return
    elif hidden is not None and hidden.strip() in ("", "-1"):
        problem = f"CUDA_VISIBLE_DEVICES={hidden} hides every GPU; unset it, or use cpu"
    elif not has_cuda_driver():
        problem = "this machine has no driver of NVIDIA (libcuda); install it, or use cpu"
    if problem is not None:
        raise InvalidInputError(f"device {quote(device)} is not available: {problem}")


def has_cuda_driver() -> bool:
    """Return True if the driver that torch would load is here. Starts nothing on a GPU."""
    name = {"win32": "nvcuda.dll"}.get(sys.platform, "libcuda.so.1")
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def quantization(config: dict[str, Any]) -> str | None:
    """Return how a config's weights are quantized; None if they are not."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        settings = part.get("quantization_config")
        if isinstance(settings, dict):
            if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
                return "bitsandbytes"
            return str(settings.get("quant_method") or UNKNOWN_METHOD)
    return None


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        # The parent package is missing, or is only half installed.
        return False
