"""Measure the bundled model, several evaluations at a time, and print tables as in docs/results.md.

    python scripts/results.py --out results --jobs 16          # on a GPU, about 25 minutes; a run that is cut off goes on

Each evaluation is a `star-attention eval` of its own, in a folder of its own; the commands are printed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

from star_attention.evals.reports.remarks import in_short
from star_attention.evals.reports.report import write
from star_attention.evals.reports.results import Results
from star_attention.evals.reports.wording import accuracy
from star_attention.evals.runs.merge import join
from star_attention.evals.runs.predictions import read_predictions
from star_attention.planning.plan import format_size

LENGTHS = ("4k", "8k", "16k", "32k")
ONE_BLOCK_TASKS = "niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,niah_multikey_2,niah_multikey_3,niah_multiquery"
SWEPT = f"{ONE_BLOCK_TASKS},niah_multivalue,vt"

JOBS: dict[str, tuple[str, ...]] = {
    **{
        f"ruler-{length}": (
            "ruler",
            "--length",
            length,
            "--variants",
            "dense,star:/4,star:2k,star:/4:0,streaming_llm:/4:64",
        )
        for length in LENGTHS
    },
    **{
        f"babilong-{length}": (
            "babilong",
            "--length",
            length,
            "--variants",
            "dense,star:/4,star:/4:0,streaming_llm:/4:64",
        )
        for length in ("1k", *LENGTHS)
    },
    **{
        f"ablations-{length}": ("ablations", "--length", length, "--task", ONE_BLOCK_TASKS)
        for length in ("4k", "16k")
    },
    "blocks-16k": ("sweep", "--length", "16k", "--task", SWEPT, "--blocks", "512,1k,2k,4k,8k"),
    "anchors-16k": (
        "sweep",
        "--length",
        "16k",
        "--task",
        SWEPT,
        "--blocks",
        "/4",
        "--anchors",
        "0,16,64,256,1k,=",
    ),
    **{
        f"infinitebench-{length}": (
            "infinitebench",
            "--length",
            length,
            "--variants",
            "dense,star:/4,star:/4:0",
        )
        for length in ("16k", "32k")
    },
    "ruler-64k": (
        *(
            "ruler",
            "--length",
            "64k",
            "--task",
            "niah_single_1,niah_single_2,niah_multikey_1,niah_multikey_2,vt",
        ),
        *("--variants", "dense,star:/4"),
    ),
    "shared-16k": ("shared", "--length", "16k", "--variants", "dense,star:/4,star:/4:0"),
    "niah": ("niah", "--length", "4k,8k,16k,32k", "--variants", "dense,star:/4,star:/4:0"),
}
"""By name: the command of `star-attention eval` and its options."""

WORDS = ("ruler", "ablations", "sweep", "niah", "shared")
"""Commands that draw words, of which training has not seen these."""


def command(name: str, model: str, out: Path, samples: int) -> list[str]:
    suite, *others = JOBS[name]
    words = ["--words", "eval"] if suite in WORDS else []
    each = {
        "niah": max(1, samples // 10),
        "shared": 10 * samples,
        "ruler-64k": max(1, samples * 2 // 5),
    }  # (at each of many depths; ten questions to a context; a look beyond what the model was trained on)
    count = ["--samples", str(each.get(name, each.get(suite, samples)))]
    return ["eval", suite, "-m", model, *others, *words, *count, "--out", str(out / name)]


def run(names: list[str], model: str, out: Path, samples: int, jobs: int) -> bool:
    """Whether all of them ended well. Long texts begin first, so that none of them is left over at the end."""
    out.mkdir(parents=True, exist_ok=True)
    waiting = sorted(
        names, key=lambda name: ("32k" in name, "16k" in name, "niah" in name), reverse=True
    )
    running: dict[str, subprocess.Popen[bytes]] = {}
    started, good = time.monotonic(), True
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            arguments = command(name, model, out, samples)
            print("star-attention", *arguments, flush=True)
            with (out / f"{name}.log").open("ab") as log:
                running[name] = subprocess.Popen(
                    [sys.executable, "-m", "star_attention", *arguments],
                    stdout=log,
                    stderr=log,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                good &= process.returncode == 0
                verdict = "done" if process.returncode == 0 else f"FAILED, see {out / name}.log"
                print(
                    f"{name}: {verdict}, {time.monotonic() - started:.0f} s after the start",
                    flush=True,
                )
        time.sleep(0.5)
    return good


def joined(names: list[str], out: Path) -> list[str]:
    """Evaluations of one suite at several lengths as one, for the pictures; the names of what is there then."""
    left = [
        name for name in names if any(True for _ in read_predictions(out / name, required=False))
    ]
    shutil.rmtree(out / "joined", ignore_errors=True)
    for suite in ("ruler", "babilong", "infinitebench"):
        parts = [name for name in left if name.startswith(suite) and name != "ruler-64k"]
        if len(parts) < 2:
            continue
        whole = f"joined/{suite}"
        join([out / name for name in parts], out / whole)
        write(out / whole)
        left[left.index(parts[0])] = whole
        left = [name for name in left if name not in parts]
    return left


def tables(names: list[str], out: Path) -> None:
    """Of each evaluation that is there: means by task, in percent, and what `eval` says of all of it."""
    for name in names:
        results = Results.read(out / name)
        variants = results.variants
        print(
            f"\n## {name}\n\n| task | length | samples | {' | '.join(variants)} |\n|{'---|' * (3 + len(variants))}"
        )
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
    parser.add_argument("--only", default="", help="beginnings of names, with commas between")
    parser.add_argument(
        "--tables", action="store_true", help="print the tables of what is there, and run nothing"
    )
    given = parser.parse_args()
    names = [name for name in JOBS if name.startswith(tuple(given.only.split(",")))]
    good = given.tables or run(names, given.model, given.out, given.samples, given.jobs)
    tables(joined(names, given.out), given.out)
    sys.exit(not good)


if __name__ == "__main__":
    main()
