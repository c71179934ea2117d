"""What a measurement stands on: the machine's ceilings, how times are taken, and a record of everything that matters to them."""

from __future__ import annotations

import gc
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from star_attention import __version__
from star_attention.errors import InvalidInputError
from star_attention.planning.plan import counted

Progress = Callable[[str], None]
"""Told what is measured next."""

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
"""Of the device or of the machine (this library's own error is one of the latter)."""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the device does at most, measured here: no work is done faster than its operations or its bytes allow.

    flops_per_s: of a large square matrix product in the model's precision. bytes_per_s: of a large copy, read and written.
    """

    flops_per_s: float
    bytes_per_s: float

    def __str__(self) -> str:
        return f"ceilings: matrix product {self.flops_per_s / 1e12:,.3g} TFLOP/s, copy {self.bytes_per_s / 1e12:,.3g} TB/s"


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Both, in about a second."""
    large = device.type == "cuda"
    size = 8192 if large else 1024
    # (On zeros a device may run faster than it ever will on data.)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product_s = median(timed(lambda: a @ b, repeats=10, device=device))
    source = torch.empty(2**32 if large else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = median(timed(lambda: target.copy_(source), repeats=10, device=device))
    return Ceilings(flops_per_s=2 * size**3 / product_s, bytes_per_s=2 * source.numel() / copy_s)


def timed(work: Callable[[], Any], *, repeats: int, device: torch.device) -> list[float]:
    """Seconds of each of `repeats` runs after one that is not counted; what a run returns is freed before the next."""
    work()
    return [once(work, device) for _ in range(repeats)]


def once(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run, with the device's work in it."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once_with_peak(work: Callable[[], Any], device: torch.device) -> tuple[float, int | None]:
    """The same, and the most device memory during the run; None where that is not measured (CPU)."""
    if device.type != "cuda":
        return once(work, device), None
    gc.collect()  # (what an earlier row's compiling has left behind would count)
    torch.cuda.reset_peak_memory_stats(device)
    seconds = once(work, device)
    return seconds, torch.cuda.max_memory_allocated(device)


def record(device: torch.device, measured: Ceilings) -> dict[str, Any]:
    """Hardware, versions and date."""
    return {
        "date": date.today().isoformat(),
        "command": command(),
        "hardware": hardware(device),
        "versions": {
            "star_attention": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
        },
        "git": git_revision(),
        "ceilings": asdict(measured),
    }


def recorded(path: Path, *kinds: str) -> dict[str, Any]:
    """What a benchmark of one of these kinds has written.

    Raises `InvalidInputError` for a file that is not there, is none, or holds another benchmark.
    """
    wanted = " or ".join(f"`bench {kind}`" for kind in kinds)
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = found["benchmark"]
    except FileNotFoundError:
        raise InvalidInputError(
            f"there is no file {path}; give the JSON that {wanted} wrote to its --out"
        ) from None
    except IsADirectoryError:
        raise InvalidInputError(
            f"{path} is a folder; give the JSON of {wanted} in it by name"
        ) from None
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise InvalidInputError(f"{path} is no JSON of {wanted}") from None
    if kind not in kinds:
        raise InvalidInputError(f"{path} is the JSON of `bench {kind}`; give that of {wanted}")
    return found


def command() -> str:
    """What this process was started with."""
    return " ".join(["star-attention", *sys.argv[1:]])


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')} ({platform.machine()})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """The commit that this package is a checkout of, with `+` for changes; None for an installed one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--", str(here)) else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None
