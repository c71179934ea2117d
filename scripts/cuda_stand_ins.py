"""Let a CUDA build of torch run on a machine without CUDA libraries: for CPU tests of old versions only.

    some-venv/bin/python scripts/cuda_stand_ins.py

Old torch versions for Linux come as one CUDA build that will not load unless a dozen CUDA libraries (two
more gigabytes) are there, although CPU tests call none of them. The CUDA runtime itself (2 MB) must be real:
torch asks it whether there is a device. For each of the others that is missing, this script compiles a
stand-in of some kilobytes in which every function that torch looks up returns an error, and drops the CUDA
packages from that torch's list of requirements, so that pip does not fetch them after all. It acts on the
environment of the interpreter that runs it, which must be a virtual environment, and does nothing where no
library is missing.
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

# But not libcuda, the driver: torch loads without it.
CUDA_LIBRARY = re.compile(r"lib(cu|nccl|nvshmem)(?!da\.so)")
CUDA_FUNCTION = re.compile(r"_*(cu|nccl|nvshmem)")
CUDA_REQUIREMENT = re.compile(r"Requires-Dist: (cuda|nvidia|triton)")


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def needed(libraries: list[Path]) -> set[str]:
    tables = [output("readelf", "-dW", lib) for lib in libraries]
    return {name for table in tables for name in re.findall(r"NEEDED.*\[(.+)\]", table)}


def wanted_functions(libraries: list[Path]) -> tuple[dict[str, dict[str, set[str]]], set[str]]:
    """Functions that torch looks up: {library: {symbol version: names}}, and those that name no library."""
    versioned: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    unversioned: set[str] = set()
    for lib in libraries:
        library_of: dict[str, str] = {}
        for line in output("readelf", "-VW", lib).splitlines():
            if found := re.search(r"File: (\S+)", line):
                file = found[1]
            elif found := re.search(r"Name: (\S+)  Flags", line):
                library_of[found[1]] = file
        for name, version in re.findall(
            r" UND (\w+)(?:@(\S+))?", output("readelf", "--dyn-syms", "-W", lib)
        ):
            if version:
                versioned[library_of.get(version, "")][version].add(name)
            elif CUDA_FUNCTION.match(name):
                unversioned.add(name)
    return versioned, unversioned


def compile_stand_in(target: Path, functions: dict[str, set[str]]) -> None:
    """One shared library that defines `functions`, {symbol version or "": names}."""
    names = sorted(set().union(*functions.values()))
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "stand_in.c"), Path(folder, "versions.map")
        source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in names))
        command = ["cc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{target.name}"]
        if "" not in functions:
            nodes = [
                f"{version} {{ {'; '.join(sorted(own))}; }};\n"
                for version, own in functions.items()
            ]
            script.write_text("".join(nodes))
            command.append(f"-Wl,--version-script={script}")
        output(*command, "-o", target, source)


def drop_requirements(distribution: importlib.metadata.Distribution) -> None:
    metadata = next(Path(str(f.locate())) for f in distribution.files or () if f.name == "METADATA")
    lines = metadata.read_text().splitlines(keepends=True)
    metadata.write_text("".join(line for line in lines if not CUDA_REQUIREMENT.match(line)))


def main() -> int:
    if not sys.platform.startswith("linux"):
        return 0  # torch has CPU builds only, or brings its libraries along
    if sys.prefix == sys.base_prefix:
        print(
            "cuda_stand_ins: this changes the installed torch, so it only works in a virtual environment"
        )
        return 1
    torch = importlib.metadata.distribution("torch")
    folder = Path(str(torch.locate_file("torch/lib")))
    if not (folder / "libtorch_cuda.so").exists():
        return 0  # a CPU build
    if missing_tools := [tool for tool in ("cc", "readelf") if shutil.which(tool) is None]:
        print(
            f"cuda_stand_ins: torch {torch.version} is a CUDA build, and {' and '.join(missing_tools)} "
            "cannot be found. Install a C compiler with binutils, or show pip a CPU build of this version "
            "(for example through PIP_FIND_LINKS)."
        )
        return 1
    libraries = sorted(folder.glob("*.so*"))
    packages = (
        folder.parent.parent / "nvidia"
    )  # where pip's CUDA packages lie and torch's libraries look
    present = {lib.name for lib in packages.rglob("lib*.so*")}
    missing = sorted(name for name in needed(libraries) - present if CUDA_LIBRARY.match(name))
    if not missing:
        return 0
    if "libcudart.so.13" in missing:
        print(
            "cuda_stand_ins: the CUDA runtime must be real: pip install --no-deps nvidia-cuda-runtime"
        )
        return 1
    versioned, unversioned = wanted_functions(libraries)
    target = packages / "cu13" / "lib"
    target.mkdir(parents=True, exist_ok=True)
    for name in missing:
        compile_stand_in(target / name, versioned.get(name) or {"": unversioned})
    drop_requirements(torch)
    print(
        f"torch {torch.version} runs on the CPU only here: stand-ins for {len(missing)} CUDA libraries"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
