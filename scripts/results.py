"""Measure the bundled model, several evaluations at a time; print the tables of docs/results.md.

    python scripts/results.py --out results --jobs 16          # on a GPU, about 25 minutes; resumes

Each evaluation is one `star-attention eval` with a folder of its own; its command is printed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from star_attention.evals.reports.remarks import in_short
from star_attention.evals.reports.report import write
from star_attention.evals.reports.results import Results
from star_attention.evals.reports.wording import accuracy
from star_attention.evals.runs.merge import join
from star_attention.evals.runs.predictions import read_predictions
from star_attention.planning.sizes import format_size

LENGTHS = ("4k", "8k", "16k", "32k")
NEEDLES = (
    "niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,niah_multikey_2,niah_multikey_3,"
    "niah_multiquery"
)
SWEPT = f"{NEEDLES},niah_multivalue,vt"
BEYOND_TRAINING = "niah_single_1,niah_single_2,niah_multikey_1,niah_multikey_2,vt"

RULER_VARIANTS = "dense,star:/4,star:2k,star:/4:0,streaming_llm:/4:64"
STORY_VARIANTS = "dense,star:/4,star:/4:0,streaming_llm:/4:64"
VARIANTS = "dense,star:/4,star:/4:0"

_SWEEP = f"sweep --length 16k --task {SWEPT}"
EVALUATIONS: dict[str, str] = {
    **{f"ruler-{n}": f"ruler --length {n} --variants {RULER_VARIANTS}" for n in LENGTHS},
    **{
        f"babilong-{n}": f"babilong --length {n} --variants {STORY_VARIANTS}"
        for n in ("1k", *LENGTHS)
    },
    **{f"ablations-{n}": f"ablations --length {n} --task {NEEDLES}" for n in ("4k", "16k")},
    "blocks-16k": f"{_SWEEP} --blocks 512,1k,2k,4k,8k",
    "anchors-16k": f"{_SWEEP} --blocks /4 --anchors 0,16,64,256,1k,=",
    **{
        f"infinitebench-{n}": f"infinitebench --length {n} --variants {VARIANTS}"
        for n in ("16k", "32k")
    },
    "ruler-64k": f"ruler --length 64k --task {BEYOND_TRAINING} --variants dense,star:/4",
    "shared-16k": f"shared --length 16k --variants {VARIANTS}",
    "niah": f"niah --length 4k,8k,16k,32k --variants {VARIANTS}",
}
"""Arguments of `star-attention eval`, by name."""

WITH_WORDS = ("ruler", "ablations", "sweep", "niah", "shared")
"""Commands that draw words; they get those that training has not seen."""

JOINED = ("ruler", "babilong", "infinitebench")
"""Suites whose lengths are joined into one run, for the figures."""


def command(name: str, model: str, out: Path, samples: int) -> list[str]:
    """Arguments of `star-attention` for one evaluation."""
    subcommand, *options = EVALUATIONS[name].split()
    words = ["--words", "eval"] if subcommand in WITH_WORDS else []
    count = {
        # At each of eleven depths.
        "niah": max(1, samples // 10),
        # Ten questions on each context.
        "shared-16k": 10 * samples,
        # A quick look beyond the lengths of the training.
        "ruler-64k": max(1, samples * 2 // 5),
    }.get(name, samples)
    return [
        "eval",
        subcommand,
        "-m",
        model,
        *options,
        *words,
        "--samples",
        str(count),
        "--out",
        str(out / name),
    ]


def run(names: Sequence[str], model: str, out: Path, samples: int, jobs: int) -> bool:
    """Run evaluations, the longest first, and return True if all succeed."""
    out.mkdir(parents=True, exist_ok=True)
    waiting = sorted(
        names, key=lambda name: ("32k" in name, "16k" in name, "niah" in name), reverse=True
    )
    running: dict[str, subprocess.Popen[bytes]] = {}
    started, succeeded = time.monotonic(), True
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            running[name] = _start(name, command(name, model, out, samples), out)
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                succeeded &= process.returncode == 0
                status = "done" if process.returncode == 0 else f"FAILED, see {out / name}.log"
                seconds = time.monotonic() - started
                print(f"{name}: {status}, {seconds:.0f} s after the start", flush=True)
        time.sleep(0.5)
    return succeeded


def _start(name: str, arguments: Sequence[str], out: Path) -> subprocess.Popen[bytes]:
    print("star-attention", *arguments, flush=True)
    with (out / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "star_attention", *arguments],
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def join_lengths(names: Sequence[str], out: Path) -> list[str]:
    """Join the lengths of each suite; returns the names of all folders with results."""
    finished = [name for name in names if _has_predictions(out / name)]
    shutil.rmtree(out / "joined", ignore_errors=True)
    for suite in JOINED:
        parts = [name for name in finished if name.startswith(suite) and name != "ruler-64k"]
        if len(parts) < 2:
            continue
        joined = f"joined/{suite}"
        join([out / name for name in parts], out / joined)
        write(out / joined)
        finished[finished.index(parts[0])] = joined
        finished = [name for name in finished if name not in parts]
    return finished


def _has_predictions(folder: Path) -> bool:
    return any(True for _ in read_predictions(folder, required=False))


def print_tables(names: Sequence[str], out: Path) -> None:
    """Print the means by task, in percent, and the result in short of each run."""
    for name in names:
        results = Results.read(out / name)
        variants = results.variants
        print(f"\n## {name}\n")
        print(f"| task | length | samples | {' | '.join(variants)} |")
        print(f"|{'---|' * (3 + len(variants))}")
        for task, length in product(results.tasks, results.lengths):
            cells = [results.compared(variant, task=task, length=length) for variant in variants]
            counts = [cell.mean.n for cell in cells if cell is not None]
            if counts:
                means = ["" if cell is None else accuracy(cell.mean) for cell in cells]
                print(f"| {task} | {format_size(length)} | {max(counts)} | {' | '.join(means)} |")
        print("\n" + "\n".join(in_short(results)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="models/needle-17m")
    parser.add_argument("--samples", type=int, default=50, help="of each task and length")
    parser.add_argument("--jobs", type=int, default=4, help="evaluations at a time")
    parser.add_argument("--only", default="", help="prefixes of names, separated by commas")
    parser.add_argument(
        "--tables", action="store_true", help="run nothing, and print the tables of finished runs"
    )
    options = parser.parse_args()
    prefixes = tuple(options.only.split(","))
    names = [name for name in EVALUATIONS if name.startswith(prefixes)]
    succeeded = options.tables or run(
        names, options.model, options.out, options.samples, options.jobs
    )
    print_tables(join_lengths(names, options.out), options.out)
    sys.exit(not succeeded)


if __name__ == "__main__":
    main()
