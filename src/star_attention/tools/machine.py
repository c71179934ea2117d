"""Measuring: timing, the machine's ceilings, and a record of the circumstances."""

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
from star_attention.planning.sizes import counted
from star_attention.storage.host import pinned

Progress = Callable[[str], None]
"""Called with a line about the next measurement."""

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
"""No memory left on the device or the machine; `star_attention.OutOfMemoryError` is included."""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The rates that bound all work on a device: it needs time for its operations and its bytes.

    Attributes:
        flops_per_s: of a large square matrix product in the model's precision.
        bytes_per_s: of a large copy, counting bytes read and bytes written.
    """

    flops_per_s: float
    bytes_per_s: float

    def __str__(self) -> str:
        return (
            f"ceilings: matrix product {self.flops_per_s / 1e12:,.3g} TFLOP/s,"
            f" copy {self.bytes_per_s / 1e12:,.3g} TB/s"
        )


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the ceilings of a device, in about a second."""
    large = device.type == "cuda"
    size = 8192 if large else 1024
    # On zeros a device may run faster than it ever does on data.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product_s = median(time_repeatedly(lambda: a @ b, repeats=10, device=device))
    source = torch.empty(2**32 if large else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = median(time_repeatedly(lambda: target.copy_(source), repeats=10, device=device))
    return Ceilings(flops_per_s=2 * size**3 / product_s, bytes_per_s=2 * source.numel() / copy_s)


def measure_link(device: torch.device) -> float | None:
    """Return the bytes per second of large copies from pinned memory to a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    source = pinned.empty((2**28,), torch.uint8, device).zero_()
    target = torch.empty_like(source, device=device)

    def copies() -> None:
        for _ in range(4):
            target.copy_(source, non_blocking=True)

    return 4 * source.numel() / median(time_repeatedly(copies, repeats=5, device=device))


def time_repeatedly(work: Callable[[], Any], *, repeats: int, device: torch.device) -> list[float]:
    """Return the seconds of each of `repeats` runs, after one that is not counted.

    The result of a run is freed before the next.
    """
    work()
    return [time_once(work, device) for _ in range(repeats)]


def time_once(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one run, until the device has finished."""
    _synchronize(device)
    started = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_with_peak(work: Callable[[], Any], device: torch.device) -> tuple[float, int | None]:
    """Return the seconds of one run and its peak device memory in bytes (None on a CPU)."""
    if device.type != "cuda":
        return time_once(work, device), None
    # Garbage of an earlier row's compilation would count.
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    seconds = time_once(work, device)
    return seconds, torch.cuda.max_memory_allocated(device)


def record(device: torch.device, ceilings: Ceilings) -> dict[str, Any]:
    """Return date, command, hardware, versions, commit and ceilings."""
    return {
        **circumstances(),
        "hardware": hardware(device),
        "ceilings": asdict(ceilings),
    }


def circumstances() -> dict[str, Any]:
    """Return date, command, versions and commit."""
    return {
        "date": date.today().isoformat(),
        "command": command(),
        "versions": {
            "star_attention": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
        },
        "git": git_revision(),
    }


def read_record(path: Path, *benchmarks: str) -> dict[str, Any]:
    """Read the JSON that one of these benchmarks has written.

    Raises:
        InvalidInputError: the file is missing, unreadable, not such JSON, or another benchmark's.
    """
    commands = " or ".join(f"`bench {name}`" for name in benchmarks)
    try:
        contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        benchmark = contents["benchmark"]
    except FileNotFoundError:
        raise InvalidInputError(
            f"there is no file {path}; give the JSON that {commands} wrote to its --out"
        ) from None
    except IsADirectoryError:
        raise InvalidInputError(
            f"{path} is a folder; give the JSON file of {commands} in it"
        ) from None
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise InvalidInputError(f"{path} is not JSON of {commands}") from None
    if benchmark not in benchmarks:
        raise InvalidInputError(
            f"{path} is the JSON of `bench {benchmark}`; give that of {commands}"
        )
    return contents


def command() -> str:
    """Return the command line of this process."""
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
    """Return the commit of this checkout, with `+` for local changes; None if it is installed."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", str(here))
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None
