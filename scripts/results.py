"""Measure a model, several evaluations at a time; print the tables of docs/results.md.

    python scripts/results.py --out results --jobs 16          # on a GPU, about 25 minutes; resumes
    python scripts/results.py --set real --model build/smollm2 --out results-real --jobs 14

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
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from star_attention.errors import InvalidInputError
from star_attention.evals.reports.remarks import in_short
from star_attention.evals.reports.report import write
from star_attention.evals.reports.results import DENSE, Results
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
# This model works across blocks in its middle and upper layers.
LOOKBACK_VARIANTS = (
    "dense,star:/4,star:/4:lookback=2@4-8,star:/4:lookback=2@upper,star:/4:lookback=1,"
    "star:/4:lookback=3@upper,star:/4:second_look=0.1"
)
LOOKBACK_TASKS = "niah_multivalue,cwe,fwe,vt,niah_single_2,niah_multikey_3"
STORIES = "qa2,qa3"
# Every other task, and all of them at lengths where the others were not run.
PRESET_VARIANTS = (
    "dense,star:/4,star:/4:lookback=2@4-8,star:/4:lookback=3@upper,star:/4:second_look=0.1,"
    "streaming_llm:/4:64"
)
OTHER_TASKS = "niah_single_1,niah_single_3,niah_multikey_1,niah_multikey_2,niah_multiquery"
OTHER_STORIES = "qa1,qa4,qa5"
PRESET_TASKS = {
    # cwe does not fit in 4K: some of its samples take more.
    "4k": (f"{OTHER_TASKS},{LOOKBACK_TASKS.replace('cwe,', '')}", f"{OTHER_STORIES},{STORIES}"),
    "8k": (f"{OTHER_TASKS},{LOOKBACK_TASKS}", f"{OTHER_STORIES},{STORIES}"),
    "16k": (OTHER_TASKS, OTHER_STORIES),
    "32k": (OTHER_TASKS, OTHER_STORIES),
}
"""Of each length RULER's tasks and the stories that `PRESET_VARIANTS` answer."""

_SWEEP = f"sweep --length 16k --task {SWEPT}"
BUNDLED: dict[str, str] = {
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
    # A task each, so that they run side by side.
    **{
        f"lookback-{length}-{label}-{task}": f"{suite} --length {length} --task {task}"
        f" --variants {LOOKBACK_VARIANTS}"
        for length in ("16k", "32k")
        for label, suite, tasks in (
            ("ruler", "ruler", LOOKBACK_TASKS),
            ("stories", "babilong", STORIES),
        )
        for task in tasks.split(",")
    },
    **{
        f"presets-{length}-{label}-{task}": f"{suite} --length {length} --task {task}"
        f" --variants {PRESET_VARIANTS}"
        for length, sets in PRESET_TASKS.items()
        for (label, suite), tasks in zip(
            (("ruler", "ruler"), ("stories", "babilong")), sets, strict=True
        )
        for task in tasks.split(",")
    },
}
"""Arguments of `star-attention eval` for the bundled model, by name."""

REAL_TASKS = (
    "niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,niah_multivalue,niah_multiquery"
)
REAL_SIZES = (("4k", 8), ("4k", 16), ("2k", 8), ("8k", 8))
"""Lengths, and the number of blocks."""
REAL_SWEEPS = (
    ("ablations-4k", "ablations", ""),
    ("blocks-4k", "sweep", "--blocks 256,512,1k,2k"),
    ("anchors-4k", "sweep", "--blocks /8 --anchors 0,16,64,256,="),
)


def _real_variants(divisor: int) -> str:
    """Star's price first: the paper's method and `balanced`, alone and with a second look."""
    star, balanced = f"star:/{divisor}", f"star:/{divisor}:lookback=2@lower"
    return ",".join(
        [
            "dense",
            star,
            balanced,
            f"star:/{divisor}:lookback=6@lower",
            f"{star}:second_look=0.1",
            f"{balanced}:second_look=0.1",
            f"streaming_llm:/{divisor}:64",
        ]
    )


# Answers end with the line: a small model would go on, and only time would be lost.
_REAL_ANSWER = "--max-new-tokens 64"
REAL: dict[str, str] = {
    **{
        f"ruler-{length}-{divisor}-{task}": f"ruler --length {length} --task {task}"
        f" --variants {_real_variants(divisor)} {_REAL_ANSWER}"
        for length, divisor in REAL_SIZES
        for task in REAL_TASKS.split(",")
    },
    "niah": f"niah --length 4k --variants {_real_variants(8)} {_REAL_ANSWER}",
    **{
        f"{label}-{task}": f"{suite} --length 4k --task {task} {options} {_REAL_ANSWER}"
        for label, suite, options in REAL_SWEEPS
        for task in REAL_TASKS.split(",")
        if task != "niah_multiquery"  # at 4K dense attention itself finds few
    },
}
"""The same for a real model, whose positions end at 8K."""

SETS = {"bundled": BUNDLED, "real": REAL}

WITH_WORDS = ("ruler", "ablations", "sweep", "niah", "shared")
"""Commands that draw words; the bundled model gets those that its training has not seen."""

JOINED = (
    *(f"ruler-{length}-{blocks}" for length, blocks in REAL_SIZES),
    *(f"lookback-{length}-{suite}" for length in ("16k", "32k") for suite in ("ruler", "stories")),
    *(f"presets-{length}-{suite}" for length in PRESET_TASKS for suite in ("ruler", "stories")),
    *(name for name, *_ in REAL_SWEEPS),
    "ruler",
    "babilong",
    "infinitebench",
)
"""Beginnings of names whose runs are joined into one, for the figures."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run, on which model, and where the results go.

    Attributes:
        evaluations: arguments of `star-attention eval`, by name.
        model: folder or hub id.
        words: which words samples draw; None for all.
        out: folder that holds a folder of each evaluation.
        samples: of each task and length.
        rows: answers of an evaluation at a time.
    """

    evaluations: dict[str, str]
    model: str
    words: str | None
    out: Path
    samples: int
    rows: int = 1

    def command(self, name: str) -> list[str]:
        """Arguments of `star-attention` for one evaluation."""
        subcommand, *options = self.evaluations[name].split()
        if self.words is not None and subcommand in WITH_WORDS:
            options += ["--words", self.words]
        count = {
            # At each of eleven depths.
            "niah": max(1, self.samples // 10),
            # Ten questions on each context.
            "shared-16k": 10 * self.samples,
            # A quick look beyond the lengths of the training.
            "ruler-64k": max(1, self.samples * 2 // 5),
        }.get(name, self.samples)
        sizes = ["--samples", str(count), "--out", str(self.out / name)]
        rows = ["--rows", str(self.rows)] if self.rows > 1 else []
        return ["eval", subcommand, "-m", self.model, *options, *sizes, *rows]


def run(plan: Plan, jobs: int) -> bool:
    """Run evaluations, the longest first, and return True if all succeed."""
    plan.out.mkdir(parents=True, exist_ok=True)
    waiting = sorted(
        plan.evaluations,
        key=lambda name: ("32k" in name, "16k" in name, name == "niah"),
        reverse=True,
    )
    running: dict[str, subprocess.Popen[bytes]] = {}
    started, succeeded = time.monotonic(), True
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            running[name] = _start(name, plan.command(name), plan.out)
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                succeeded &= process.returncode == 0
                status = "done" if process.returncode == 0 else f"FAILED, see {plan.out / name}.log"
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
        print_shares(results)


def print_shares(results: Results) -> None:
    """Print how much of the loss from dense attention to Star Attention each variant wins back.

    Star Attention is the first variant without look-back; the mean is over all tasks and lengths,
    with its 95 % interval.
    """
    names = results.variants
    star = next((name for name in names if name.startswith("star") and "=" not in name), None)
    beyond = [name for name in names if "lookback=" in name or "second_look=" in name]
    if star is None or DENSE not in names:
        return
    for variant in beyond:
        try:
            share = results.won_back(variant, star)
        except InvalidInputError as error:
            print(f"no share of the loss of {star} won back by {variant}: {error}")
            continue
        ends = "" if share.low is None else f" ({share.low:.2f} to {share.high:.2f})"
        print(f"share of the loss of {star} won back by {variant}: {share.value:.2f}{ends}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", choices=SETS, default="bundled", help="evaluations of which model")
    parser.add_argument("--model", default="models/needle-17m")
    parser.add_argument("--samples", type=int, default=50, help="of each task and length")
    parser.add_argument("--jobs", type=int, default=4, help="evaluations at a time")
    parser.add_argument("--rows", type=int, default=1, help="answers of an evaluation at a time")
    parser.add_argument("--only", default="", help="prefixes of names, separated by commas")
    parser.add_argument(
        "--tables", action="store_true", help="run nothing, and print the tables of finished runs"
    )
    options = parser.parse_args()
    prefixes = tuple(options.only.split(","))
    evaluations = {
        name: arguments
        for name, arguments in SETS[options.set].items()
        if name.startswith(prefixes)
    }
    plan = Plan(
        evaluations=evaluations,
        model=options.model,
        words="eval" if options.set == "bundled" else None,
        out=options.out,
        samples=options.samples,
        rows=options.rows,
    )
    succeeded = options.tables or run(plan, options.jobs)
    print_tables(join_lengths([*evaluations], options.out), options.out)
    sys.exit(not succeeded)


if __name__ == "__main__":
    main()
