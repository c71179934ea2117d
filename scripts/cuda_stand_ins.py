"""Let a CUDA build of torch run without CUDA libraries, for CPU tests of old versions only.

    some-venv/bin/python scripts/cuda_stand_ins.py

Old torch versions for Linux come as a single CUDA build. It does not load without a dozen CUDA
libraries (two more gigabytes), although CPU tests call none of them. The CUDA runtime itself (2 MB)
must be real: torch asks it whether there is a device.

For each other missing library this script compiles a stand-in of a few kilobytes, in which every
function that torch looks up returns an error. It also drops the CUDA packages from that torch's
requirements, so that pip does not fetch them after all. It changes the environment of the
interpreter that runs it, which must be a virtual environment, and does nothing if no library is
missing.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

# libcuda, the driver, is left out: torch loads without it.
CUDA_LIBRARY = re.compile(r"lib(cu|nccl|nvshmem)(?!da\.so)")
CUDA_FUNCTION = re.compile(r"_*(cu|nccl|nvshmem)")
CUDA_REQUIREMENT = re.compile(r"Requires-Dist: (cuda|nvidia|triton)")


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def needed_libraries(libraries: list[Path]) -> set[str]:
    """Return the names of the libraries that these are linked against."""
    tables = [run("readelf", "-dW", lib) for lib in libraries]
    return {name for table in tables for name in re.findall(r"NEEDED.*\[(.+)\]", table)}


def wanted_functions(libraries: list[Path]) -> tuple[dict[str, dict[str, set[str]]], set[str]]:
    """Return the functions that torch looks up.

    Returns:
        {library: {symbol version: names}}, and the names that come without a library.
    """
    versioned: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    unversioned: set[str] = set()
    for lib in libraries:
        library_of: dict[str, str] = {}
        for line in run("readelf", "-VW", lib).splitlines():
            if match := re.search(r"File: (\S+)", line):
                file = match[1]
            elif match := re.search(r"Name: (\S+)  Flags", line):
                library_of[match[1]] = file
        for name, version in re.findall(
            r" UND (\w+)(?:@(\S+))?", run("readelf", "--dyn-syms", "-W", lib)
        ):
            if version:
                versioned[library_of.get(version, "")][version].add(name)
            elif CUDA_FUNCTION.match(name):
                unversioned.add(name)
    return versioned, unversioned


def compile_stand_in(target: Path, functions: dict[str, set[str]]) -> None:
    """Compile a shared library that defines `functions`: {symbol version or "": names}."""
    names = sorted(set().union(*functions.values()))
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "stand_in.c"), Path(folder, "versions.map")
        source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in names))
        command = ["cc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{target.name}"]
        if "" not in functions:
            nodes = [
                f"{version} {{ {'; '.join(sorted(defined))}; }};\n"
                for version, defined in functions.items()
            ]
            script.write_text("".join(nodes))
            command.append(f"-Wl,--version-script={script}")
        run(*command, "-o", target, source)


def drop_requirements(distribution: importlib.metadata.Distribution) -> None:
    """Remove the CUDA packages from the requirements of an installed package."""
    metadata = next(Path(str(f.locate())) for f in distribution.files or () if f.name == "METADATA")
    lines = metadata.read_text().splitlines(keepends=True)
    metadata.write_text("".join(line for line in lines if not CUDA_REQUIREMENT.match(line)))


def main() -> int:
    if not sys.platform.startswith("linux"):
        # torch has only CPU builds there, or brings its libraries along.
        return 0
    if sys.prefix == sys.base_prefix:
        print(
            "cuda_stand_ins: this changes the installed torch, so it only works in a virtual"
            " environment"
        )
        return 1
    torch = importlib.metadata.distribution("torch")
    folder = Path(str(torch.locate_file("torch/lib")))
    if not (folder / "libtorch_cuda.so").exists():
        # A CPU build.
        return 0
    if missing_tools := [tool for tool in ("cc", "readelf") if shutil.which(tool) is None]:
        print(
            f"cuda_stand_ins: torch {torch.version} is a CUDA build, and"
            f" {' and '.join(missing_tools)} cannot be found. Install a C compiler with binutils,"
            " or point pip to a CPU build of this version (for example through PIP_FIND_LINKS)."
        )
        return 1
    libraries = sorted(folder.glob("*.so*"))
    # Where pip installs CUDA packages, and torch's libraries look for them.
    packages = folder.parent.parent / "nvidia"
    present = {lib.name for lib in packages.rglob("lib*.so*")}
    missing = sorted(
        name for name in needed_libraries(libraries) - present if CUDA_LIBRARY.match(name)
    )
    if not missing:
        return 0
    if "libcudart.so.13" in missing:
        print(
            "cuda_stand_ins: the CUDA runtime must be real; run: pip install --no-deps"
            " nvidia-cuda-runtime"
        )
        return 1
    versioned, unversioned = wanted_functions(libraries)
    target = packages / "cu13" / "lib"
    target.mkdir(parents=True, exist_ok=True)
    for name in missing:
        compile_stand_in(target / name, versioned.get(name) or {"": unversioned})
    drop_requirements(torch)
    print(
        f"torch {torch.version} now runs, on the CPU only: made stand-ins for {len(missing)} CUDA"
        " libraries"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
